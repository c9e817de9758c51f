"""LoRAs that PEFT has written, through scripts/import_lora.py, against what PEFT computes."""

import dataclasses
import importlib.util
import json
import re

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_evaluate import script as evaluate
from transformers import AutoModelForCausalLM

from matryoshka_lora.cli import exit_with_one_line, parse_options
from matryoshka_lora.core.adapter import at_rank
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.export import export_peft
from matryoshka_lora.loading import load_run, read_run
from matryoshka_lora.models import EMBEDDED
from matryoshka_lora.pipeline import run
from matryoshka_lora.reporting import format_run_table, rank_tables
from matryoshka_lora.runs.folder import RECORD
from matryoshka_lora.runs.record import read_record

spec = importlib.util.spec_from_file_location("import_lora", ROOT / "scripts" / "import_lora.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TOKENS = torch.arange(40).reshape(2, 20)
KINDS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"down_proj": 7, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 1, "down_proj": 3},
    },
    "some_layers": {"r": 3, "lora_alpha": 3, "layers_to_transform": [1]},
}


def base_model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def make_adapter(folder, **settings):
    """A PEFT folder with random factors; the logits of its model."""
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base_model(), LoraConfig(**targets | settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return logits(model)


def import_lora(*arguments):
    script.main(parse_options(script.Options, list(arguments)))


def only_run(folder):
    (path,) = (folder / "runs").rglob(RECORD)
    return path.parent


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_rank_it_computes_what_peft_computes(tmp_path, kind):
    expected = make_adapter(tmp_path / "peft", **KINDS[kind])
    import_lora(f"adapter={tmp_path / 'peft'}", f"output_dir={tmp_path}", "eval.tasks=[]")
    loaded = load_run(only_run(tmp_path))
    rank = 7 if kind == "patterns" else KINDS[kind]["r"]
    assert loaded.spec.rank == rank and loaded.record.status == "finished"
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(base_model()) - expected).abs().max() > 0.1
    for rule in ("trained", "svd", "global"):
        with at_rank(loaded.model, rank, rule):
            torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=1e-4)


def test_it_is_swept_shown_and_exported_at_lower_ranks(tmp_path, capsys):
    make_adapter(tmp_path / "peft", **KINDS["plain"])
    arguments = [f"adapter={tmp_path / 'peft'}", f"output_dir={tmp_path}", "eval.limit=3"]
    import_lora(*arguments)
    folder = only_run(tmp_path)
    record = read_record(folder / RECORD)
    assert record.status == "finished" and record.training == {}
    assert [phase["phase"] for phase in record.phases] == ["import", "evaluation"]
    assert set(record.phases[0]["adapter"]["sha256"]) == {
        *("adapter_config.json", "adapter_model.safetensors")
    }
    # Nothing that is not known: no data, no rate, no seed.
    assert not {"trainer", "seed"} & record.config.keys()
    assert record.config["dataset"] == {"name": "unknown"}
    readings = {(row.rank, row.rule) for row in record.rows}
    below = {(rank, rule) for rank in (1, 2) for rule in ("svd", "global")}
    assert readings == {(0, "base"), *below, *((4, rule) for rule in ("trained", "svd", "global"))}
    for name in ("adapter.safetensors", "config.yaml", "table.md", "plot.png"):
        assert (folder / name).stat().st_size > 0
    shown = capsys.readouterr().out
    assert f"run={folder}" in shown and "nan" not in shown
    assert "imported LoRA" in rank_tables([record])[0].rows[-1].method
    assert "nan" not in format_run_table(record)
    # Beside runs that say how they were trained it claims nothing of the kind.
    dylora = read_record(next((ROOT / "results/records/table2-tiny").glob("*-dylora-*.json")))
    dylora.config["trainer"]["clip_norm"] = 2.0
    beside = dataclasses.replace(record, config=record.config | {"dataset": {"name": "arithmetic"}})
    labels = {row.method for table in rank_tables([dylora, beside]) for row in table.rows}
    assert labels == {"base", "DyLoRA", "imported LoRA"}
    # The same command again computes nothing; further tasks and ranks are added.
    import_lora(*arguments)
    assert read_record(folder / RECORD).rows == record.rows
    further = [f"run={folder}", "eval.ranks=[3]", "eval.rules=[svd]"]
    evaluate.main(parse_options(evaluate.Options, further))
    assert {(row.rank, row.rule) for row in read_record(folder / RECORD).rows} == readings | {
        (3, "svd")
    }
    # Exported at rank 2 it is the best approximation of rank 2, as PEFT reads it.
    trained = read_run(folder)
    export_peft(trained, 2, "svd", tmp_path / "rank2")
    card = (tmp_path / "rank2" / "README.md").read_text()
    assert "# tiny, imported LoRA at rank 2\n" in card
    assert "from an adapter of rank 4 that other code trained on unknown data." in card
    loaded = load_run(folder)
    with at_rank(loaded.model, 2, "svd"):
        expected = logits(loaded.model)
    exported = PeftModel.from_pretrained(base_model(), tmp_path / "rank2")
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)
    for rule in ("prefix", "trained"):
        with pytest.raises(UserError, match="stand in no order of rank"):
            export_peft(trained, 2, rule, tmp_path / "refused")
    with pytest.raises(UserError, match="is not trained; choose one of lora"):
        run(trained.config)


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISTAKES = {
    "dora": (lambda f: rewrite(f, use_dora=True), "use_dora=True is refused: DoRA scales"),
    "bias": (lambda f: rewrite(f, bias="all"), "bias=all is refused: it changes biases"),
    "modules": (lambda f: rewrite(f, modules_to_save=["lm_head"]), "modules_to_save=.* is refused"),
    "conv1d": (lambda f: rewrite(f, fan_in_fan_out=True), "fan_in_fan_out=True is refused"),
    "unknown": (lambda f: rewrite(f, use_new=7), "use_new=7 is refused: this version"),
    "loha": (lambda f: rewrite(f, peft_type="LOHA"), "peft_type is LOHA; only LORA"),
    "pissa": (lambda f: rewrite(f, init_lora_weights="pissa"), "changes the weights of the base"),
    "base": (
        lambda f: rewrite(f, base_model_name_or_path="other/base-7b"),
        "was trained on other/base-7b, not on tiny",
    ),
    "alpha": (lambda f: rewrite(f, lora_alpha=0), "lora_alpha=0 is not a positive number"),
    "pattern": (lambda f: rewrite(f, alpha_pattern=["q"]), "alpha_pattern=.* is no object of"),
    "regex": (lambda f: rewrite(f, rank_pattern={"(": 2}), "rank_pattern=.* is no object of"),
    "huge": (lambda f: rewrite(f, lora_alpha=10**400), "lora_alpha=10+ is not a positive"),
    "rank": (lambda f: rewrite(f, r=5), "not those of a linear layer at the rank 5"),
    "missing": (lambda f: break_tensors(f, lambda t: t.pop(FIRST)), "lacks one of the two"),
    "nan": (lambda f: break_tensors(f, lambda t: t[FIRST].fill_(float("nan"))), "not finite"),
    "other": (
        lambda f: break_tensors(f, lambda t: t.update(extra=torch.ones(1))),
        "holds extra, which is no factor of a linear layer",
    ),
    "shape": (
        lambda f: break_tensors(f, lambda t: t.update({FIRST: torch.ones(4, 9)})),
        "maps 9 to .* in the adapter",
    ),
    "layer": (
        lambda f: break_tensors(
            f, lambda t: [t.update({k.replace(".0.", ".99."): t.pop(k)}) for k in [*t]]
        ),
        r"does not fit the model, which lacks \d+ of its layers",
    ),
    "damaged": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"no"),
        "adapter_model.safetensors is damaged",
    ),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "holds no adapter_model.safetensors",
    ),
    "none": (lambda f: (f / "adapter_config.json").unlink(), "is no folder of a PEFT adapter"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_plain_lora_of_this_base_is_refused_in_one_line(tmp_path, mistake, capsys):
    make_adapter(tmp_path / "peft", **KINDS["plain"])
    change, message = MISTAKES[mistake]
    change(tmp_path / "peft")
    capsys.readouterr()
    with pytest.raises(SystemExit), exit_with_one_line():
        import_lora(f"adapter={tmp_path / 'peft'}", f"output_dir={tmp_path}", "eval.tasks=[]")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    assert re.search(message, printed), printed
    assert not (tmp_path / "runs").exists()
