"""Parts of a transformers model as one kernel each, for half precision on CUDA.

transformers computes norms, rotary embeddings and gated activations one operation at a time, each a
pass over memory: a quarter of a prefill. Here those are replaced that a kernel computes in one pass
with the same roundings. Parts of the same name differ between models, so each is tried on random
data first.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matryoshka_lora.adapters import adapter_layers, diagonal
from matryoshka_lora.attention import FLASH_DTYPES
from matryoshka_lora.kernels import AVAILABLE, gated_silu, rms_norm, rotate

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

TOLERANCE = 1e-3
"""Relative difference allowed between two forms of a part: a few numbers in a thousand may be
rounded to the neighbour in bf16. Rounding once more or less everywhere makes 0.0025."""
TRIED = 64
"""Tokens that a part is tried on."""
ROTARY = "apply_rotary_pos_emb"
"""The name of the function in transformers' modules."""


def on_device(x: Tensor) -> bool:
    """Whether the kernels work on it."""
    return x.is_cuda and x.dtype in FLASH_DTYPES


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[None]:
    """RMS norms, SwiGLU activations and rotary embeddings as one kernel each, for a block."""
    with ExitStack() as stack:
        if AVAILABLE and on_device(next(model.parameters())):
            layers = list(adapter_layers(model).values())
            with diagonal(model, torch.ones(len(layers[0].lora_A) if layers else 1)):
                found = list(replacements(model))
            for owner, name, new in found:
                if name in vars(owner):
                    stack.callback(setattr, owner, name, vars(owner)[name])
                else:  # a method, which the class has
                    stack.callback(delattr, owner, name)
                setattr(owner, name, new)
        yield


def replacements(model: PreTrainedModel) -> Iterator[tuple[Any, str, Function]]:
    """(owner, attribute, function to put there)"""
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's
            continue
        if (forward := fused_norm(module) or fused_mlp(module)) is not None:
            yield module, "forward", forward
    config = model.config.get_text_config()
    like = next(model.parameters())
    for name in sorted({type(module).__module__ for module in model.modules()}):
        original = vars(sys.modules[name]).get(ROTARY)
        if original is not None and (function := fused_rotary(original, config, like)) is not None:
            yield sys.modules[name], ROTARY, function


def fused_norm(module: nn.Module) -> Function | None:
    """`rms_norm` in place of `module`; None if it gives something else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not on_device(weight):
        return None
    norm = partial(rms_norm, weight=weight, eps=eps)
    return norm if agree(module, norm, *random(weight, (1, TRIED, len(weight)))) else None


def fused_mlp(module: nn.Module) -> Function | None:
    """`down(silu(gate(x)) * up(x))` in place of `module`; None if it is something else."""
    parts = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return None
    gate, up, down = parts
    assert isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and down is not None
    if not on_device(gate.weight) or gate.out_features != up.out_features:
        return None

    def forward(x: Tensor) -> Any:
        return down(gated_silu(gate(x), up(x)))

    tried = random(gate.weight, (1, TRIED, gate.in_features))
    return forward if agree(module, forward, *tried) else None


def fused_rotary(original: Function, config: Any, like: Tensor) -> Function | None:
    """`rotate` in place of transformers' `original`; None if it gives something else."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        if rest or options or not all(fits(x, cos, sin) for x in (q, k)):
            return original(q, k, cos, sin, *rest, **options)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = [(1, n, TRIED, width) for n in (heads, key_heads)]
    tried = random(like, *sizes, (1, TRIED, width), (1, TRIED, width))
    return function if agree(original, function, *tried) else None


def fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` does what these ask for: all of d rotated, no batch, one dtype."""
    return (
        on_device(x)
        and x.dim() == 4
        and cos.shape == sin.shape == (x.shape[0], x.shape[2], x.shape[3])
        and x.shape[0] == 1
        and x.dtype == cos.dtype == sin.dtype
        and x.stride(3) == cos.stride(2) == sin.stride(2) == 1
    )


def random(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random numbers of these shapes, of any sign and not around 0."""
    generator = torch.Generator(like.device).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=like.device).add(0.5).to(like.dtype)
        for shape in shapes
    ]


@torch.no_grad()
def agree(original: Function, new: Function, *tried: Tensor) -> bool:
    """Whether both give the same, but for a few roundings."""
    name = getattr(original, "__name__", type(original).__name__)
    try:
        sides = [function(*(x.clone() for x in tried)) for function in (original, new)]
        expected, found = (
            torch.cat([x.float().flatten() for x in ([y] if isinstance(y, Tensor) else y)])
            for y in sides
        )
        error = float((found - expected).norm() / expected.norm())
    except Exception as reason:  # it wants or returns something else, or a compiler fails
        logger.debug("%s stays as it is: %s", name, reason)
        return False
    if error < TOLERANCE:
        return True
    logger.debug("%s stays as it is: off by %.3g", name, error)
    return False
