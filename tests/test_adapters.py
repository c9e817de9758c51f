"""The adapter layer against slicing, PEFT and a dense SVD."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TARGETS, small_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from matryoshka_lora.core.adapter import (
    adapter_layers,
    adapter_parameters,
    add_adapters,
    at_rank,
    diagonal,
    principal_factors,
    set_diagonal,
    use_factors,
)
from matryoshka_lora.core.diagonals import matryoshka_diagonal, prefix_diagonal
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.core.storage import load_adapter, read_adapter, save_adapter
from matryoshka_lora.loading import warn_of_narrow_layers

RANK = 8
P = matryoshka_diagonal([1, 2, 4, 8], RANK, "none")
SPEC = AdapterSpec(RANK, "sqrt", tuple(P.tolist()), trains_prefixes=False)


def adapted(dtype=torch.float32, spec=SPEC, fill_B=True):
    model = small_llama(dtype=dtype)
    add_adapters(model, spec, TARGETS, dtype=dtype, seed=3)
    if fill_B:
        generator = torch.Generator().manual_seed(1)
        for layer in adapter_layers(model).values():
            B = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
            layer.lora_B.data.copy_(0.1 * B)
    return model


def tokens(rows=3, length=10):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def test_with_B_zero_the_logits_are_the_bases():
    expected = small_llama()(tokens()).logits
    assert torch.equal(adapted(fill_B=False)(tokens()).logits, expected)


def test_the_base_stays_frozen_and_keeps_its_names():
    base, model = small_llama().state_dict(), adapted().state_dict()
    assert base.keys() < model.keys()
    assert all(torch.equal(base[name], model[name]) for name in base)
    assert all(".lora_" in name for name in model.keys() - base.keys())
    trained = {name for name, p in adapted().named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(adapted()))


def test_start_does_not_depend_on_the_global_random_state():
    first = adapter_parameters(adapted(fill_B=False))
    torch.manual_seed(999)
    again = small_llama(seed=5)
    torch.manual_seed(998)
    add_adapters(again, SPEC, TARGETS, seed=3)
    for name, parameter in adapter_parameters(again).items():
        assert torch.equal(parameter, first[name])


@pytest.mark.parametrize(("init", "fan"), [("lora", 32), ("paper", RANK)])
def test_initialiser_bounds(init, fan):
    model = small_llama()
    add_adapters(model, SPEC, ["q_proj"], init=init)
    A = torch.cat([layer.lora_A.flatten() for layer in adapter_layers(model).values()])
    assert A.abs().max() <= fan**-0.5
    assert A.abs().max() > 0.95 * fan**-0.5
    assert abs(A.std() * (3 * fan) ** 0.5 - 1) < 0.1  # uniform(-b, b) has deviation b / sqrt(3)
    assert all((layer.lora_B == 0).all() for layer in adapter_layers(model).values())


def test_lora_forward_and_gradients_equal_pefts():
    spec = AdapterSpec(RANK, "rank", (1 / RANK,) * RANK, trains_prefixes=False)
    ours = adapted(torch.float64, spec)
    settings = LoraConfig(r=RANK, lora_alpha=1, target_modules=TARGETS, lora_dropout=0.0)
    peft = get_peft_model(small_llama(dtype=torch.float64), settings, autocast_adapter_dtype=False)
    theirs = dict(peft.named_parameters())
    pairs = []
    for name, parameter in adapter_parameters(ours).items():
        other = theirs[f"base_model.model.{name}.default.weight"]
        other.data.copy_(parameter)
        pairs.append((parameter, other))
    x = tokens()
    mine, reference = ours(x, labels=x), peft(x, labels=x)
    torch.testing.assert_close(mine.logits, reference.logits, rtol=1e-12, atol=1e-12)
    mine.loss.backward()
    reference.loss.backward()
    for parameter, other in pairs:
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_prefix_equals_sliced_factors(rank):
    model = adapted(torch.float64)
    with at_rank(model, rank, "prefix"):
        logits = model(tokens()).logits
    for layer in adapter_layers(model).values():
        layer.lora_A.data[rank:] = 0
        layer.lora_B.data[:, rank:] = 0
    set_diagonal(model, torch.full((RANK,), rank**-0.5))
    torch.testing.assert_close(logits, model(tokens()).logits, rtol=1e-6, atol=1e-7)


def test_trained_rule_at_full_rank_is_what_was_trained():
    model = adapted()
    expected = model(tokens()).logits
    with at_rank(model, RANK, "trained"):
        assert torch.equal(model(tokens()).logits, expected)
    with at_rank(model, RANK, "prefix"):
        assert not torch.allclose(model(tokens()).logits, expected)


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_svd_is_the_best_approximation_of_the_dense_update(rank):
    model = adapted(torch.float64)
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    dense = {
        name: layer.lora_B @ torch.diag(P.double()) @ layer.lora_A
        for name, layer in adapter_layers(model).items()
    }
    with use_factors(model, "svd"):
        for name, layer in adapter_layers(model).items():
            U, S, Vh = torch.linalg.svd(dense[name])
            best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            ours = layer.lora_B[:, :rank] @ layer.lora_A[:rank]
            torch.testing.assert_close(ours, best, rtol=1e-9, atol=1e-12)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, before[name])


def test_svd_of_a_layer_narrower_than_the_rank():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    B = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    A_new, B_new = principal_factors(A, B, torch.ones(6))
    assert A_new.shape == A.shape and B_new.shape == B.shape
    torch.testing.assert_close(B_new @ A_new, B @ A)


def test_rank_zero_is_the_base():
    with at_rank(model := adapted(), 0):
        assert torch.equal(model(tokens()).logits, small_llama()(tokens()).logits)


def test_rows_with_their_own_diagonals_equal_the_rows_one_by_one():
    model, x = adapted(torch.float64), tokens(4)
    diagonals = [prefix_diagonal(r, RANK, "none") for r in (1, 2, 4, 8)]
    with diagonal(model, torch.stack(diagonals)[:, None]):
        together = model(x).logits
    for row, p in enumerate(diagonals):
        with diagonal(model, p):
            alone = model(x[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-10, atol=1e-12)


def test_everything_is_restored_bit_exactly_even_after_an_error():
    model = adapted()
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    with pytest.raises(RuntimeError, match="inside"), at_rank(model, 2, "svd"):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())
    assert all(torch.equal(layer.p, P) for layer in adapter_layers(model).values())


def test_bf16_compute_with_float32_masters():
    model = small_llama(dtype=torch.bfloat16)
    add_adapters(model, SPEC, TARGETS)
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    for parameter in adapter_parameters(model).values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_targets_are_exact_and_must_match():
    with pytest.raises(ValueError, match="proj.*match no module; linear layers.*q_proj"):
        add_adapters(small_llama(), SPEC, ["proj"])
    with pytest.raises(ValueError, match="not a plain linear layer"):
        add_adapters(small_llama(), SPEC, ["self_attn"])
    with pytest.raises(ValueError, match="not a plain linear layer"):
        add_adapters(adapted(), SPEC, ["q_proj"])


@pytest.mark.parametrize(
    ("rank", "rule", "message"),
    [(9, "prefix", "above"), (-1, "prefix", "positive"), (4, "best", "unknown")],
)
def test_unknown_readings_are_refused(rank, rule, message):
    with pytest.raises(ValueError, match=message), at_rank(adapted(), rank, rule):
        pass


def test_saved_state_loads_strictly(tmp_path):
    model, path = adapted(), tmp_path / "adapter.safetensors"
    save_adapter(path, model, {"method": "matryoshka"})
    other = adapted(fill_B=False)
    assert load_adapter(path, other) == {"method": "matryoshka"}
    for name, parameter in adapter_parameters(other).items():
        assert torch.equal(parameter, adapter_parameters(model)[name])
    fewer = small_llama()
    add_adapters(fewer, SPEC, ["q_proj"])
    with pytest.raises(ValueError, match="0 tensors missing.*unknown"):
        load_adapter(path, fewer)
    narrow = small_llama()
    add_adapters(narrow, AdapterSpec(2, "none", (1.0, 1.0), False), TARGETS)
    with pytest.raises(ValueError, match="its rank is 8, the model's adapters have 2"):
        load_adapter(path, narrow)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as an adapter"):
        load_adapter(path, other)


def logits_at(model, rank, rule, x):
    with at_rank(model, rank, rule):
        return model(x).logits


@pytest.mark.parametrize("outer", ["prefix", "trained", "svd"])
@pytest.mark.parametrize("inner", ["prefix", "trained", "svd"])
def test_readings_inside_each_other(outer, inner):
    model, x = adapted(torch.float64), tokens()
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    expected = {(r, rule): logits_at(model, r, rule, x) for r, rule in ((4, outer), (2, inner))}
    with at_rank(model, 4, outer):
        assert torch.equal(logits_at(model, 2, inner, x), expected[2, inner])
        assert torch.equal(model(x).logits, expected[4, outer])
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 5, 32), (2, 3, 5, 32)])
def test_any_leading_shape(shape):
    layer = adapter_layers(adapted(torch.float64))["model.layers.0.self_attn.q_proj"]
    x = torch.randn(shape, dtype=torch.float64)
    expected = x @ layer.weight.T + ((x @ layer.lora_A.T) * P.double()) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)


def test_a_diagonal_for_each_sequence_where_the_layer_sees_tokens_flattened():
    layer = adapter_layers(adapted(torch.float64))["model.layers.0.self_attn.q_proj"]
    x = torch.randn(4, 5, 32, dtype=torch.float64)
    layer.p = torch.stack([prefix_diagonal(r, RANK, "none") for r in (1, 2, 4, 8)])[:, None]
    torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))
    layer.p = layer.p.repeat_interleave(5, 0).transpose(0, 1)  # (1, tokens, R)
    torch.testing.assert_close(layer(x.flatten(0, 1)[None])[0], layer(x.flatten(0, 1)))


class Doubled(torch.nn.Linear):
    """Like a quantised layer: a linear map that F.linear of its weight does not give."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_another_module_sits_in_base_and_is_called():
    model = small_llama(dtype=torch.float64)
    for block in model.model.layers:
        block.mlp.up_proj.__class__ = Doubled
    x = tokens()
    expected = model(x).logits
    add_adapters(model, SPEC, TARGETS, dtype=torch.float64)
    assert torch.equal(model(x).logits, expected)
    layer = adapter_layers(model)["model.layers.0.mlp.up_proj"]
    assert isinstance(layer.base, Doubled) and "rank=8" in repr(layer)
    layer.lora_B.data.normal_()
    y = torch.randn(3, 32, dtype=torch.float64)
    update = ((y @ layer.lora_A.T) * P.double()) @ layer.lora_B.T
    torch.testing.assert_close(layer(y), layer.base(y) + update)
    assert not layer.base.weight.requires_grad


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast(base):
    model = small_llama(dtype=base)
    add_adapters(model, SPEC, TARGETS, seed=3)
    for layer in adapter_layers(model).values():
        layer.lora_B.data.normal_(std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens(), labels=tokens())
    out.loss.backward()
    reference = model.double()(tokens(), labels=tokens())
    assert abs(float(out.loss) - float(reference.loss)) < 0.05 * float(reference.loss)
    assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_the_diagonal_follows_the_model_and_stays_float32():
    model = adapted().to(torch.bfloat16)
    assert all(layer.p.dtype == torch.float32 for layer in adapter_layers(model).values())
    meta = adapted().to("meta")
    assert all(layer.p.is_meta for layer in adapter_layers(meta).values())


def test_another_default_dtype_changes_nothing():
    expected = adapted()(tokens()).logits
    torch.set_default_dtype(torch.float64)
    try:
        model = small_llama(dtype=torch.float32)
        add_adapters(model, SPEC, TARGETS, seed=3)
        again = adapter_parameters(model)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in adapter_parameters(adapted(fill_B=False)).items():
        assert torch.equal(parameter, again[name]), name
    assert expected.dtype == torch.float32


def test_gradients_reach_the_diagonal_and_each_layer_may_have_its_own():
    model, x = adapted(torch.float64), tokens()
    own = {name: torch.rand(RANK, requires_grad=True) for name in adapter_layers(model)}
    with diagonal(model, own):
        model(x, labels=x).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad(), diagonal(model, own):
        y = torch.randn(2, 48, dtype=torch.float64)
        layer = adapter_layers(model)[name]
        update = ((y @ layer.lora_A.T) * own[name].double()) @ layer.lora_B.T
        torch.testing.assert_close(layer(y), y @ layer.weight.T + update)


def gated(dtype=torch.float64):
    model = adapted(dtype, dataclasses.replace(SPEC, gated=True))
    generator = torch.Generator().manual_seed(5)
    for layer in adapter_layers(model).values():
        layer.lora_gate.data.uniform_(-1, 1, generator=generator)
    return model


def test_a_learned_gate_multiplies_the_diagonal(tmp_path):
    model, x = gated(), tokens()
    assert sum(name.endswith("lora_gate") for name in adapter_parameters(model)) == 14
    gates = {n: layer.lora_gate.detach().clone() for n, layer in adapter_layers(model).items()}
    plain = adapted(torch.float64)
    with diagonal(plain, {name: P * gate for name, gate in gates.items()}):
        torch.testing.assert_close(model(x).logits, plain(x).logits)
    torch.testing.assert_close(logits_at(model, RANK, "svd", x), model(x).logits)
    model(x, labels=x).loss.backward()
    assert all(layer.lora_gate.grad.abs().sum() > 0 for layer in adapter_layers(model).values())
    save_adapter(tmp_path / "a", model)
    other = adapted(torch.float64, dataclasses.replace(SPEC, gated=True), fill_B=False)
    load_adapter(tmp_path / "a", other)
    torch.testing.assert_close(other(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="its gated is True"):
        load_adapter(tmp_path / "a", adapted())


def test_a_file_is_read_with_its_own_diagonal_and_refused_for_another_adapter(tmp_path):
    path, x = tmp_path / "a.safetensors", tokens()
    spec = dataclasses.replace(SPEC, method="matryoshka", train_ranks=(1, 2, 4, 8))
    model = adapted(spec=spec)
    save_adapter(path, model, {"run": 1})
    first = path.read_bytes()
    save_adapter(path, model, {"run": 1})
    assert path.read_bytes() == first
    edited = dataclasses.replace(spec, p_full=(7.0,) * RANK)
    other = adapted(spec=edited, fill_B=False)
    load_adapter(path, other)
    assert torch.equal(other(x).logits, model(x).logits)
    assert torch.equal(logits_at(other, 4, "trained", x), logits_at(model, 4, "trained", x))
    for change in (
        {"method": "lora"},
        {"train_ranks": (1, 8)},
        {"scaling": "none"},
    ):
        asked = adapted(spec=dataclasses.replace(spec, **change))
        with pytest.raises(ValueError, match=f"its {next(iter(change))} is"):
            load_adapter(path, asked)
    layer = adapter_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.lora_B.data[0, 0] = float("nan")
    save_adapter(path, model)
    with pytest.raises(ValueError, match="q_proj.lora_B holds numbers that are not finite"):
        load_adapter(path, other)


@pytest.mark.parametrize("shape", [(RANK,), (3, 1, RANK), (3, 10, RANK)])
def test_the_diagonal_may_stay_float32_in_the_product(shape):
    """As in the released code, where only the product is rounded, here to bfloat16."""
    p = torch.rand(shape, generator=torch.Generator().manual_seed(4)) + 0.3
    x = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    errors = {}
    for kept in (False, True):
        spec = dataclasses.replace(SPEC, float32_diagonal=kept)
        layer = next(iter(adapter_layers(adapted(torch.bfloat16, spec)).values()))
        layer.p = p
        h = x @ layer.lora_A.T
        scaled = (h.float() * p).bfloat16() if kept else h * p.bfloat16()
        found = layer.scaled(x)
        assert found.dtype == torch.bfloat16 and torch.equal(found, scaled)
        errors[kept] = (found.double() - h.double() * p.double()).norm()
        # Without rounding there is no difference.
        layer.float()
        assert torch.equal(layer.scaled(x.float()), (x.float() @ layer.lora_A.T) * p)
    assert errors[True] < 0.8 * errors[False]


def test_a_file_tells_how_the_diagonal_is_multiplied(tmp_path):
    path, plain = tmp_path / "kept.safetensors", tmp_path / "plain.safetensors"
    rounded = dataclasses.replace(SPEC, p_full=tuple((P / 3).tolist()))  # no bfloat16 numbers
    spec = dataclasses.replace(rounded, float32_diagonal=True)
    save_adapter(path, adapted(torch.bfloat16, spec))
    other = adapted(torch.bfloat16, spec, fill_B=False)
    load_adapter(path, other)
    assert torch.equal(other(tokens()).logits, adapted(torch.bfloat16, spec)(tokens()).logits)
    rounding = adapted(torch.bfloat16, rounded)
    assert not torch.equal(other(tokens()).logits, rounding(tokens()).logits)
    with pytest.raises(ValueError, match="its float32_diagonal is True, the model's"):
        load_adapter(path, rounding)
    save_adapter(plain, rounding)  # as written before there was a choice
    assert read_adapter(plain).spec == rounded


def test_layers_narrower_than_the_rank_are_named(caplog):
    warn_of_narrow_layers(adapted())
    assert caplog.text == ""
    spec = AdapterSpec(40, "none", (1.0,) * 40, trains_prefixes=False)
    warn_of_narrow_layers(adapted(spec=spec, fill_B=False))
    assert "adapter.rank=40 is more than some layers are wide" in caplog.text
    assert "k_proj 16" in caplog.text and "down_proj 32" in caplog.text


def test_files_of_earlier_versions_are_read(tmp_path):
    model, path = adapted(), tmp_path / "old.safetensors"
    state = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    header = {
        "method": "matryoshka",
        "rank": "8",
        "train_ranks": "[1, 2, 4, 8]",
        "scaling": "sqrt",
        "p_full": json.dumps(P.tolist()),
        "base_model": "{}",
        "run_hash": "abc",
    }
    save_file(state, path, header)
    other = adapted(fill_B=False)
    assert load_adapter(path, other) == {"run_hash": "abc", "base_model": {}}
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match="no adapter of this project"):
        load_adapter(path, other)


def test_the_core_needs_torch_alone():
    program = (
        "import sys, matryoshka_lora.core.adapter, matryoshka_lora.core.storage\n"
        "import matryoshka_lora\n"
        "heavy = 'hydra omegaconf transformers lm_eval wandb accelerate pandas datasets'.split()\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "from matryoshka_lora import add_adapters, at_rank, AdapterSpec\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
