"""Fused parts of transformers models against the models as they are."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma3TextConfig,
    Glm4Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from matryoshka_lora.core.adapter import adapter_layers, add_adapters, set_diagonal
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.evaluation.engines.batched import fused
from matryoshka_lora.ops.kernels import gated_silu, rms_norm, rotate

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
PARTIAL = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
# Which parts the kernels have another form of.
CASES = [
    (LlamaConfig(**SHAPE), {"norm", "mlp", "rotary"}),
    (MistralConfig(**SHAPE), {"norm", "mlp", "rotary"}),
    (Qwen3Config(**SHAPE), {"norm", "mlp", "rotary"}),
    (Gemma3TextConfig(**SHAPE), {"rotary"}),  # norms times 1 + weight, tanh-GELU
    (Phi3Config(**SHAPE, rope_parameters=PARTIAL), {"norm", "rotary"}),  # gate and up are one layer
    (Glm4Config(**SHAPE), {"norm"}),  # likewise, and neighbours are rotated
    (Olmo2Config(**SHAPE), {"mlp", "rotary"}),  # norms are rounded once, cosines are float32
]
NAMES = [type(config).__name__ for config, _ in CASES]


def build(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2, mean=1.0 if "norm" in name else 0.0)
    return model.to(dtype)


def parts(model: PreTrainedModel) -> set[str]:
    """What is replaced now."""
    module = sys.modules[type(model.get_decoder().layers[0].self_attn).__module__]
    found = {"rotary"} if vars(module)[fused.ROTARY].__module__ == fused.__name__ else set()
    layer = model.get_decoder().layers[0]
    for name, part in (("norm", layer.post_attention_layernorm), ("mlp", layer.mlp)):
        found |= {name} if "forward" in vars(part) else set()
    return found


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plain functions that round as the kernels do, on a CPU; the calls that they get."""
    calls = []

    def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        calls.append("rotate")
        return x * cos[:, None] + modeling_llama.rotate_half(x) * sin[:, None]

    def plain_gate(gate: Tensor, up: Tensor) -> Tensor:
        calls.append("gate")
        return gate.copy_(F.silu(gate) * up)

    def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls.append("norm")
        exact = x.float()
        return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(
            x.dtype
        )

    monkeypatch.setattr(fused, "AVAILABLE", True)
    monkeypatch.setattr(fused, "rms_norm", plain_norm)
    monkeypatch.setattr(fused, "on_device", lambda x: True)
    monkeypatch.setattr(fused, "rotate", plain_rotate)
    monkeypatch.setattr(fused, "gated_silu", plain_gate)
    return calls


@torch.no_grad()
@pytest.mark.parametrize(("config", "expected"), CASES, ids=NAMES)
def test_parts_are_replaced_where_they_are_alike(
    config: PretrainedConfig, expected: set[str], stand_ins: list[str]
) -> None:
    model = build(config)
    ids = torch.randint(1, 50, (1, 30))
    before = model(ids).logits
    with fused.fused(model):
        assert parts(model) == expected
        stand_ins.clear()
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
        # Phi3's function is the same for a whole head, but here half of each is rotated.
        whole = "rotary" in expected and not isinstance(config, Phi3Config | Olmo2Config)
        assert ("rotate" in stand_ins) == whole
        assert ("gate" in stand_ins) == ("mlp" in expected)
        assert ("norm" in stand_ins) == ("norm" in expected)
    assert parts(model) == set()
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


@torch.no_grad()
def test_adapters_and_what_is_not_ours(stand_ins: list[str]) -> None:
    """A diagonal of another shape does not matter; a replaced forward and a batch stay theirs."""
    model = build(LlamaConfig(**SHAPE))
    spec = AdapterSpec(4, "none", (1.0,) * 4, False)
    add_adapters(model, spec, ["q_proj", "gate_proj", "down_proj"])
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    p = torch.rand(1, 30, 4)
    set_diagonal(model, p)
    norm = model.model.norm
    own = norm.forward = lambda x: 2 * type(norm).forward(norm, x)
    ids = torch.randint(1, 50, (1, 30))
    before = model(ids).logits
    with fused.fused(model):
        assert parts(model) == {"norm", "mlp", "rotary"}
        assert norm.forward is own
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
        assert all(torch.equal(layer.p, p) for layer in adapter_layers(model).values())
        set_diagonal(model, p[:, 0])
        stand_ins.clear()
        model(ids.expand(2, -1))
        assert "rotate" not in stand_ins, "a batch is left to transformers"
    assert norm.forward is own


def test_linear_layers_without_a_weight_are_left_alone(stand_ins: list[str]) -> None:
    """An adapter around a quantised layer is a linear layer that keeps no weight of its own."""

    class Wrapping(nn.Linear):
        def __init__(self, base: nn.Linear) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = base.in_features, base.out_features
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)

    mlp = build(LlamaConfig(**SHAPE)).model.layers[0].mlp
    assert fused.fused_mlp(mlp) is not None
    for name in ("gate_proj", "up_proj", "down_proj"):
        part = getattr(mlp, name)
        setattr(mlp, name, Wrapping(part))
        assert fused.fused_mlp(mlp) is None
        setattr(mlp, name, part)


def test_gradients_are_left_to_transformers(stand_ins: list[str]) -> None:
    """Another model of the kind may be trained while an engine waits."""
    model = build(LlamaConfig(**SHAPE))
    other = build(LlamaConfig(**SHAPE))
    ids = torch.randint(1, 50, (1, 30))
    with fused.fused(model):
        stand_ins.clear()
        other(ids, labels=ids).loss.backward()
        assert not stand_ins
        with torch.no_grad():
            other(ids)
        assert stand_ins == ["rotate"] * 4
    assert other.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_two_runs_may_end_in_any_order(stand_ins: list[str]) -> None:
    first, second = (build(LlamaConfig(**SHAPE)) for _ in range(2))
    runs = fused.fused(first), fused.fused(second)
    for a_run in runs:
        a_run.__enter__()
    assert parts(first) == parts(second) == {"norm", "mlp", "rotary"}
    runs[0].__exit__(None, None, None)
    assert parts(first) == set() and parts(second) == {"norm", "mlp"}
    runs[1].__exit__(None, None, None)
    assert parts(first) == parts(second) == set()


def test_kernels_that_do_not_run_are_not_used(
    stand_ins: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(gate: Tensor, up: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fused, "gated_silu", broken)
    model = build(LlamaConfig(**SHAPE))
    with fused.fused(model):
        assert parts(model) == set()
    assert caplog.messages == ["fused kernels do not run here, using slower functions: no compiler"]


def test_other_activations_are_noticed(
    stand_ins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit shows in large inputs only, GELU beside large weights in small ones."""
    mlp = build(LlamaConfig(**SHAPE)).model.layers[0].mlp
    assert fused.fused_mlp(mlp) is not None
    monkeypatch.setattr(mlp.act_fn, "forward", lambda x: F.silu(x).clamp(max=7))
    assert fused.fused_mlp(mlp) is None
    nn.init.normal_(mlp.gate_proj.weight, std=3)
    monkeypatch.setattr(mlp.act_fn, "forward", lambda x: F.gelu(x, approximate="tanh"))
    assert fused.fused_mlp(mlp) is None
    # What does not fit together is left to raise where it is used.
    mlp.down_proj = nn.Linear(7, 64, dtype=torch.bfloat16)
    assert fused.fused_mlp(mlp) is None


def test_a_norm_stays_where_the_kernel_has_no_other_form_of_it(stand_ins: list[str]) -> None:
    class ScaledRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 1.005 * super().forward(hidden_states)

    class TwofoldRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(hidden_states), None

    for kind in (modeling_llama.LlamaRMSNorm, ScaledRMSNorm, TwofoldRMSNorm, nn.RMSNorm):
        for dtype in (torch.bfloat16, torch.float16):
            norm = kind(16, eps=1e-5).to(dtype)
            nn.init.uniform_(norm.weight, 0.1, 2)
            fuses = kind is modeling_llama.LlamaRMSNorm  # torch's rounds once
            assert (fused.fused_norm(norm) is not None) == fuses


def test_nothing_is_replaced_on_a_cpu() -> None:
    model = build(LlamaConfig(**SHAPE))
    with fused.fused(model):
        assert parts(model) == set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [(32, 64), (9, 64), (3, 80), (8, 128), (1, 256)])
def test_kernels_round_as_transformers_does(dtype: torch.dtype, heads: int, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 77, heads, width, device="cuda", dtype=dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 1, 77, width, device="cuda", dtype=dtype)
    expected, _ = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(rotate(x, cos, sin), expected)
    wide = torch.randn(1, 77, heads + 3, width + 16, device="cuda", dtype=dtype).transpose(1, 2)
    part = wide[:, 2:-1, :, 16:]
    expected, _ = modeling_llama.apply_rotary_pos_emb(part, part, cos, sin)
    assert torch.equal(rotate(part, cos, sin), expected)
    norm = modeling_llama.LlamaRMSNorm(heads * width).to("cuda", dtype)
    torch.nn.init.uniform_(norm.weight, 0.1, 2)
    states = torch.randn(1, 77, heads * width, device="cuda", dtype=dtype)
    assert torch.equal(rms_norm(states, norm.weight, norm.variance_epsilon), norm(states))
    once = F.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)
    assert (once != norm(states)).float().mean() > 0.05
    gate, up = torch.randn(2, 77, heads * width, device="cuda", dtype=dtype).mul(3)
    product = F.silu(gate) * up
    found = gated_silu(gate, up)
    assert found.data_ptr() == gate.data_ptr()
    # An exponential of another last digit may round to the neighbour.
    assert (found != product).float().mean() < 1e-3
    torch.testing.assert_close(found, product, rtol=0.01, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("config", "expected"), CASES, ids=NAMES)
def test_parts_are_replaced_on_cuda(
    config: PretrainedConfig, expected: set[str], dtype: torch.dtype
) -> None:
    model = build(config, dtype).to("cuda")
    ids = torch.randint(1, 50, (1, 30), device="cuda")
    exact = build(config, dtype).float().to("cuda")(ids).logits
    before = model(ids).logits.float()
    with fused.fused(model):
        assert parts(model) == expected
        found = model(ids).logits.float()
    # Closer to the model as it is than that is to the exact one.
    assert (found - before).norm() <= 0.5 * (before - exact).norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("width", "inner", "heads", "key_heads"),
    [(576, 1536, 9, 3), (2048, 8192, 32, 8), (4096, 14336, 32, 8)],
)
def test_real_widths_are_replaced_on_cuda(
    dtype: torch.dtype, width: int, inner: int, heads: int, key_heads: int
) -> None:
    """Of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B, with the random weights they start from."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "head_dim": width // heads}
    counts = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    config = LlamaConfig(**(SHAPE | sizes | counts | {"num_hidden_layers": 1}))
    model = AutoModelForCausalLM.from_config(config).to("cuda", dtype)
    with fused.fused(model):
        assert parts(model) == {"norm", "mlp", "rotary"}
