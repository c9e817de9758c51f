"""The adapter layer against slicing, PEFT and a dense SVD."""

import pytest
import torch
from conftest import TARGETS, small_llama
from peft import LoraConfig, get_peft_model

from matryoshka_lora.core.adapter import (
    AdapterSpec,
    adapter_layers,
    adapter_parameters,
    add_adapters,
    at_rank,
    diagonal,
    load_adapter,
    principal_factors,
    save_adapter,
    set_diagonal,
    use_factors,
)
from matryoshka_lora.core.diagonals import matryoshka_diagonal, prefix_diagonal

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
    with pytest.raises(ValueError, match="has shape"):
        load_adapter(path, narrow)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as an adapter"):
        load_adapter(path, other)
