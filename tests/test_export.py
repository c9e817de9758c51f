"""Exports against what the adapted model itself computes: PEFT and transformers read them back."""

import copy
import dataclasses
import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from matryoshka_lora.cli import parse_options
from matryoshka_lora.config import Config, adapter_spec_of
from matryoshka_lora.core import rules
from matryoshka_lora.core.adapter import (
    AdapterView,
    adapter_layers,
    adapter_parameters,
    adapter_view,
    add_adapters,
    at_rank,
    set_importance,
)
from matryoshka_lora.core.diagonals import prefix_diagonal
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.storage import HEADER, load_adapter, save_adapter
from matryoshka_lora.export import export_adapter, export_merged, export_peft
from matryoshka_lora.identity import model_identity
from matryoshka_lora.loading import adapter_facts, check_base, load_run, read_factors, read_run
from matryoshka_lora.methods import METHODS
from matryoshka_lora.methods.base import single
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.record import Record, read_record, write_record

ROOT = Path(__file__).parent.parent
RANK = 6
TRAIN_RANKS = [1, 2, 4]  # not up to R, so that the full Matryoshka diagonal ends in zeros
TOKENS = torch.arange(24).reshape(2, 12)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama, embeddings tied, and a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def make_run(
    folder: Path, base: Path, method: str, scaling: str, targets: list[str] = TARGETS
) -> Path:
    """A run's folder as training leaves it, with random factors in place of trained ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.model.name, config.model.path = "test/tiny-llama", str(base)
    config.method.name = method
    config.adapter.rank, config.adapter.scaling = RANK, scaling
    config.adapter.train_ranks, config.adapter.targets = TRAIN_RANKS, targets
    config.method.target_rank = 2
    model = adapted(config, base)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    identity = model_identity(config.model)
    save_adapter(RunFolder(folder).adapter, model, adapter_facts(identity, "01234567"))
    record = Record(
        status="finished",
        name=f"{method}-r{RANK}-{scaling}",
        config=dataclasses.asdict(config),
        run_hash="01234567",
        model=identity,
        data={},
        training={"steps": 1},
    )
    write_record(RunFolder(folder).record, record)
    return folder


def by_peft(model: LlamaForCausalLM, folder: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(model, folder).eval()


def by_transformers(model: LlamaForCausalLM, folder: Path) -> torch.nn.Module:
    model.load_adapter(str(folder))
    return model.eval()


READERS = (by_peft, by_transformers)


def adapted(config: Config, base: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    add_adapters(model, adapter_spec_of(config), config.adapter.targets)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), base, "matryoshka", "sqrt")


@pytest.mark.parametrize("scaling", ["none", "sqrt", "rank"])
@pytest.mark.parametrize("method", ["lora", "matryoshka", "dylora"])
def test_peft_computes_the_same(tmp_path: Path, base: Path, method: str, scaling: str) -> None:
    folder = make_run(tmp_path / "run", base, method, scaling)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    run = read_run(folder)
    model = adapted(run.config, base)
    load_adapter(folder / "adapter.safetensors", model)
    for rule in ("prefix", "trained", "svd"):
        for rank in (1, 3, RANK):
            out = tmp_path / f"{rule}-{rank}"
            export_peft(run, rank, rule, out)
            with at_rank(model, rank, rule):
                expected = logits(model)
            for read in READERS if rank == 3 else (by_peft,):
                actual = logits(read(copy.deepcopy(plain), out))
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            # PEFT only warns where names do not fit, and then computes the base model.
            assert (expected - logits(plain)).abs().max() > 1e-2


def test_an_adapter_without_a_run_is_exported_alike(
    tmp_path: Path, base: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = run / "adapter.safetensors"
    export_peft(read_run(run), 3, "svd", tmp_path / "run")
    export_adapter(adapter, 3, "svd", tmp_path / "file", str(base))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(other)
    shutil.copy(base / "tokenizer_config.json", other)
    wrong = {
        "rank 7 .*; allowed: 1 to 6": {"rank": 7},
        "rule 'svdd' is unknown.*did you mean svd": {"rule": "svdd"},
        "no adapter of this project": {"adapter": tmp_path / "file" / "adapter_model.safetensors"},
        "exists and is not an empty folder": {"out": tmp_path / "file"},
        "PEFT cannot carry this adapter on": {"base": str(other)},
    }
    asked = {"adapter": adapter, "rank": 3, "rule": "svd", "out": tmp_path / "o", "base": str(base)}
    for reason, changed in wrong.items():
        with pytest.raises(UserError, match=reason):
            export_adapter(**asked | changed)
        assert not (tmp_path / "o").exists()
    export_adapter(
        **asked | {"base": "nobody/nothing"}
    )  # what the hub does not give is not checked
    assert "it was not checked that PEFT can read this" in caplog.text


@pytest.mark.parametrize(
    ("scaling", "rule", "alpha", "rslora"),
    [
        ("none", "prefix", 4, False),
        ("sqrt", "prefix", 1, True),
        ("rank", "prefix", 1, False),
        ("sqrt", "trained", 4, False),
        ("sqrt", "svd", 4, False),
    ],
)
def test_peft_config_is_exact(
    tmp_path: Path, base: Path, scaling: str, rule: str, alpha: int, rslora: bool
) -> None:
    run = read_run(make_run(tmp_path / "run", base, "matryoshka", scaling))
    export_peft(run, 4, rule, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, alpha)
    # All that differs from PEFT's defaults, and nothing else: earlier versions refuse new keys.
    keys = "peft_type task_type base_model_name_or_path inference_mode r lora_alpha target_modules"
    assert written.keys() == {*keys.split(), *(["use_rslora"] if rslora else [])}
    assert written.get("use_rslora", False) == rslora
    assert isinstance(written["lora_alpha"], int)
    assert sorted(written["target_modules"]) == sorted(TARGETS)
    assert written["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("method", ["adalora", "sora", "lora"])
def test_each_layer_is_exported_at_its_own_rank(tmp_path: Path, base: Path, method: str) -> None:
    folder = make_run(tmp_path / "run", base, method, "sqrt")
    run = read_run(folder)
    model = adapted(run.config, base)
    load_adapter(folder / "adapter.safetensors", model)
    names = list(adapter_layers(model))
    adapter_layers(model)[names[0]].lora_B.data *= 1e-3  # it matters little
    if method != "lora":
        generator = torch.Generator().manual_seed(0)
        importance = {name: torch.rand(RANK, generator=generator) for name in names}
        importance[names[0]] *= 1e-3
        set_importance(model, importance)
    save_adapter(folder / "adapter.safetensors", model, adapter_facts(run.record.model, "01234567"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for rank in (2, 4):
        export_peft(run, rank, "global", tmp_path / f"peft{rank}")
        export_merged(run, rank, "global", tmp_path / f"merged{rank}")
        written = json.loads((tmp_path / f"peft{rank}" / "adapter_config.json").read_text())
        ranks = written["rank_pattern"]
        assert ranks == written["alpha_pattern"] and len(set(ranks.values())) > 1
        p = rules.read(adapter_view(model), rank, "global").p
        assert ranks == {name: int((own != 0).sum()) for name, own in p.items() if own.any()}
        assert set(written["target_modules"]) == set(ranks) < set(names)
        with at_rank(model, rank, "global"):
            expected = logits(model)
        found = [read(copy.deepcopy(plain), tmp_path / f"peft{rank}") for read in READERS]
        found.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{rank}"))
        for each in found:
            torch.testing.assert_close(logits(each), expected, rtol=1e-5, atol=1e-5)
        assert (expected - logits(plain)).abs().max() > 1e-2
    provenance = json.loads((tmp_path / "peft2" / "provenance.json").read_text())
    assert (provenance["rule"], provenance["trained_rank"]) == ("global", None)
    if method != "lora":
        with pytest.raises(ValueError, match="prefix is refused at rank 2.*allowed there: svd"):
            export_peft(run, 2, "prefix", tmp_path / "no")


@pytest.mark.parametrize("method", ["sora", "lora"])
def test_an_adapter_that_is_zero_everywhere_is_not_exported(
    tmp_path: Path, base: Path, method: str
) -> None:
    """As SoRA leaves it where the sparsity turns every gate off, and LoRA before its first step."""
    folder = make_run(tmp_path / "run", base, method, "none")
    run = read_run(folder)
    model = adapted(run.config, base)
    load_adapter(folder / "adapter.safetensors", model)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_gate" if method == "sora" else "lora_B"):
            parameter.data.zero_()
    if method == "sora":
        set_importance(model, {name: torch.zeros(RANK) for name in adapter_layers(model)})
    save_adapter(folder / "adapter.safetensors", model, adapter_facts(run.record.model, "01234567"))
    for rule in ("trained", "svd", "global"):
        with pytest.raises(UserError, match=f"nothing to export: at rank {RANK} under rule {rule}"):
            export_peft(run, RANK, rule, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_that_cannot_carry_an_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "base"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "glm4_moe",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    run = read_run(make_run(tmp_path / "run", folder, "lora", "none", ["gate_proj", "down_proj"]))
    # PEFT takes these names for those of its fused experts and drops the layers.
    with pytest.raises(UserError, match="PEFT cannot carry this adapter .*use format=merged"):
        export_peft(run, 2, "prefix", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_merged(run, 2, "prefix", tmp_path / "merged")
    model = adapted(run.config, folder)
    load_adapter(run.folder.adapter, model)
    with at_rank(model, 2, "prefix"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_peft_export_without_peft_says_that_it_was_not_checked(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    export_peft(read_run(run), 2, "prefix", tmp_path / "with")
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "peft", None)
    export_peft(read_run(run), 2, "prefix", tmp_path / "without")
    assert "not checked that PEFT can read this: peft is not installed" in caplog.text
    assert (
        len({(tmp_path / n / "adapter_config.json").read_bytes() for n in ("with", "without")}) == 1
    )


@pytest.mark.parametrize("rule", ["prefix", "trained", "svd", "global"])
def test_merged_computes_the_same(tmp_path: Path, base: Path, run: Path, rule: str) -> None:
    out = tmp_path / "merged"
    export_merged(read_run(run), 4, rule, out)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float32
    model = adapted(read_run(run).config, base)
    load_adapter(run / "adapter.safetensors", model)
    with at_rank(model, 4, rule):
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out)("w3")["input_ids"] == [3]


def test_a_rule_of_ones_own_exports_what_it_reads(
    tmp_path: Path, base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reads the last components instead of the first, and one that reads too many."""

    def last(adapter: AdapterView, rank: int) -> rules.Reading:
        return rules.Reading("trained", prefix_diagonal(rank, adapter.spec.rank, "none").flip(0))

    def everything(adapter: AdapterView, rank: int) -> rules.Reading:
        return rules.Reading("trained", torch.ones(adapter.spec.rank))

    for function in (last, everything):
        rule = rules.Rule(function, cuts=False, drops_p=False)
        monkeypatch.setitem(rules.RULES, function.__name__, rule)
    test_merged_computes_the_same(tmp_path, base, run, "last")
    with pytest.raises(UserError, match="rule=everything reads 6 components at rank 4"):
        export_merged(read_run(run), 4, "everything", tmp_path / "too-many")


def test_merged_is_rounded_once(tmp_path: Path, run: Path) -> None:
    export_merged(read_run(run), 4, "prefix", tmp_path / "exact")
    export_merged(read_run(run), 4, "prefix", tmp_path / "rounded", "bfloat16")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact").state_dict()
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded").state_dict()
    for name, value in exact.items():
        assert torch.equal(rounded[name], value.to(torch.bfloat16)), name


def test_provenance_says_what_it_is(tmp_path: Path, run: Path) -> None:
    export_peft(read_run(run), 3, "prefix", tmp_path / "peft")
    export_merged(read_run(run), 2, "svd", tmp_path / "merged")
    peft, merged = (
        json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("peft", "merged")
    )
    assert (peft["rank"], peft["rule"], peft["trained_rank"]) == (3, "prefix", False)
    assert (merged["rank"], merged["rule"], merged["trained_rank"]) == (2, "svd", None)
    assert peft["run_hash"] == "01234567"


def test_tied_layer_is_not_merged(tmp_path: Path, base: Path) -> None:
    run = read_run(make_run(tmp_path / "run", base, "lora", "none", ["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to .*use format=peft"):
        export_merged(run, 2, "prefix", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "rule", "message"),
    [
        (0, "prefix", "allowed: 1 to 6"),
        (7, "prefix", "above the adapter's rank 6.*allowed: 1 to 6"),
        (2, "prefx", "did you mean prefix"),
    ],
)
def test_unknown_rank_or_rule(
    tmp_path: Path, run: Path, rank: int, rule: str, message: str
) -> None:
    for export in (export_peft, export_merged):
        with pytest.raises(ValueError, match=message):
            export(read_run(run), rank, rule, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_occupied_folder(tmp_path: Path, run: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            export_peft(read_run(run), 2, "prefix", out)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export_peft(read_run(run), 2, "prefix", tmp_path / "empty")


def test_run_that_cannot_be_exported(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match=r"no record\.json"):
        read_run(tmp_path)
    folder = make_run(tmp_path / "run", base, "lora", "none")
    record = read_record(folder / "record.json")
    write_record(folder / "record.json", dataclasses.replace(record, training=None))
    with pytest.raises(ValueError, match="has not finished training"):
        read_run(folder)
    write_record(folder / "record.json", record)
    (folder / "adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read as an adapter"):
        export_peft(read_run(folder), 2, "prefix", tmp_path / "out")
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"safetensors is missing; restore it.*force=true"):
        read_run(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train_ranks", [1, 6], r"train_ranks is \(1, 6\)"),
        ("method", "lora", "method is lora"),
        ("scaling", "sqrt", "scaling is sqrt"),
        ("rank", 8, "(rank is 8|a diagonal of 6 entries for rank 8)"),
        ("run_hash", "76543210", "run_hash is 76543210 in the adapter and 01234567"),
        ("run_hash", None, "run_hash is None in the adapter and 01234567"),
    ],
)
def test_adapter_of_another_run_is_refused(
    tmp_path: Path, base: Path, field: str, value: object, message: str
) -> None:
    folder = RunFolder(make_run(tmp_path / "run", base, "matryoshka", "none"))
    with safe_open(folder.adapter, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
    header["facts" if field == "run_hash" else "spec"][field] = value
    save_file(load_file(folder.adapter), folder.adapter, {HEADER: json.dumps(header)})
    for read in (lambda path: read_factors(read_run(path)), load_run):
        with pytest.raises(ValueError, match=message) as caught:
            read(folder.path)
        assert str(folder.adapter) in str(caught.value)


def edit_method(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As somebody who changes the diagonal in a file of `methods/` after training."""
    info = METHODS[name]
    edited = dataclasses.replace(
        info, build=lambda shape, settings: single(torch.linspace(5, 2, shape.rank))
    )
    monkeypatch.setitem(METHODS, name, edited)


@pytest.mark.parametrize("rule", ["trained", "svd"])
def test_a_run_keeps_the_diagonal_it_was_trained_with(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    run = make_run(tmp_path / "run", base, "matryoshka", "none")
    before = load_run(run)
    export_peft(read_run(run), 4, rule, tmp_path / "before")
    edit_method(monkeypatch, "matryoshka")
    after = load_run(run)
    assert adapter_spec_of(read_run(run).config).p_full[0] == 5
    assert after.spec == before.spec and after.spec.p_full[0] == 3 == len(TRAIN_RANKS)
    with at_rank(before.model, 4, rule), at_rank(after.model, 4, rule):
        assert torch.equal(logits(before.model), logits(after.model))
    export_peft(read_run(run), 4, rule, tmp_path / "after")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_adapter_of_an_earlier_version_is_read(tmp_path: Path, base: Path) -> None:
    """Until commit 6b47c28 the header held its facts one by one."""
    folder = RunFolder(make_run(tmp_path / "run", base, "dylora", "sqrt"))
    run, factors = read_run(folder.path), load_file(folder.adapter)
    old = {
        "method": "dylora",
        "rank": str(RANK),
        "train_ranks": json.dumps(TRAIN_RANKS),
        "scaling": "sqrt",
        "p_full": json.dumps(run.spec.p_full),
        "base_model": json.dumps(run.record.model),
        "run_hash": run.record.run_hash,
    }
    save_file(factors, folder.adapter, old)
    file = read_factors(run)
    assert file.spec == run.spec
    assert all(torch.equal(file.state[name], factors[name]) for name in factors)
    save_file(factors, folder.adapter, old | {"run_hash": "76543210"})
    with pytest.raises(ValueError, match="run_hash is 76543210"):
        read_factors(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, factor: {name: factor.fill_(math.nan)},
            "{name} holds numbers that are not",
        ),
        (lambda name, factor: {name: factor[:4]}, "{name} has shape"),
        (lambda name, factor: {}, "(does not hold lora_A, lora_B|does not fit the model)"),
        (
            lambda name, factor: {name: factor, f"{name}_gate": factor.clone()},
            "(does not hold lora_A, lora_B|does not fit the model)",
        ),
    ],
)
def test_damaged_factors_are_refused_by_name(
    tmp_path: Path, base: Path, change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    folder = RunFolder(make_run(tmp_path / "run", base, "matryoshka", "none"))
    with safe_open(folder.adapter, framework="pt") as file:
        metadata = file.metadata()
    factors = load_file(folder.adapter)
    name = "model.layers.1.self_attn.v_proj.lora_A"
    factors |= change(name, factors.pop(name))
    save_file(factors, folder.adapter, metadata)
    run = read_run(folder.path)
    for read in (
        lambda: export_peft(run, 2, "prefix", tmp_path / "out"),
        lambda: export_merged(run, 2, "svd", tmp_path / "out"),
        lambda: load_run(folder.path),
    ):
        with pytest.raises(ValueError, match=message.format(name=name)):
            read()
    assert not (tmp_path / "out").exists()


def test_run_is_loaded_and_read_at_a_rank(tmp_path: Path, base: Path, run: Path) -> None:
    loaded = load_run(run)
    expected = adapted(read_run(run).config, base)
    load_adapter(RunFolder(run).adapter, expected)
    with at_rank(loaded.model, 2, "svd"), at_rank(expected, 2, "svd"):
        assert torch.equal(logits(loaded.model), logits(expected))
    assert loaded.tokenizer("w3")["input_ids"] == [3]
    copy = shutil.copytree(base, tmp_path / "elsewhere")
    moved = load_run(run, model_path=str(copy))
    assert torch.equal(logits(moved.model), logits(loaded.model))


def test_hub_model_is_read_at_the_recorded_revision(
    run: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = read_run(run)
    trained.record.model |= {"revision": "0123abc", "config_sha256": None}
    check_base(trained)  # a local folder in place of the hub's model, whose weights it has
    assert not caplog.text
    del trained.record.model["weights"]  # as in records of an older version
    check_base(trained)
    assert f"taking {base} for the base" in caplog.text
    trained.config.model.path = None
    check_base(trained)
    assert trained.config.model.revision == "0123abc"


def test_another_base_model_is_refused(tmp_path: Path, base: Path, run: Path) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    for export in (export_peft, export_merged):
        with pytest.raises(ValueError, match=r"not the one that .*weights is"):
            export(read_run(run, str(other)), 2, "prefix", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def command(arguments: list[str]) -> None:
    """`python scripts/export.py ARGUMENTS` in this process."""
    spec = importlib.util.spec_from_file_location("export_script", ROOT / "scripts" / "export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.main(parse_options(module.Options, arguments))


def test_command(tmp_path: Path, run: Path) -> None:
    command([f"run={run}", "rank=2", f"out={tmp_path / 'peft'}"])
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    merged = [f"run={run}", "rank=2", "rule=svd", "format=merged", "dtype=bfloat16"]
    command([*merged, f"out={tmp_path / 'merged'}"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rank=2"], "run, out not given"),
        (["run=x", "rank=2", "out=y", "format=gguf"], "allowed: peft, merged"),
        (["run=x", "rank=2", "out=y", "dtype=bfloat16"], "applies to format=merged"),
    ],
)
def test_command_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(arguments)


def test_the_page_on_python_runs(
    tmp_path: Path, base: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first two blocks; the examples, which other tests run, are the third."""
    page = (ROOT / "docs" / "python.md").read_text()
    finished, own_loop, _ = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    exec(finished.replace("results/runs/...", str(run)), {})
    assert (tmp_path / "exported" / "adapter_config.json").is_file()
    shutil.rmtree(tmp_path / "exported")
    found: dict = {}
    exec(own_loop, found)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    actual = PeftModel.from_pretrained(plain, tmp_path / "exported").eval()
    with torch.no_grad():
        torch.testing.assert_close(actual(found["tokens"]).logits, found["logits"])
