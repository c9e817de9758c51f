"""Parts of a transformers model as one kernel each, for half precision on CUDA.

transformers computes norms, rotary embeddings and gated activations one operation at a time, each a
pass over memory: a quarter of a prefill's time. Here they are replaced by kernels that make one
pass and round where transformers rounds. Parts of the same name differ between models, so each
replacement is first compared with the part on random data.
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

from matryoshka_lora.core.adapter import adapter_layers, diagonal
from matryoshka_lora.ops.attention import FLASH_DTYPES
from matryoshka_lora.ops.kernels import AVAILABLE, gated_silu, rms_norm, rotate

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

TOLERANCE = 1 / 8
"""Relative difference allowed between a part and its replacement, in epsilons of the dtype: one or
two numbers in a hundred may be rounded to the neighbour. Rounding once more or less makes 1/3."""
TRIAL_TOKENS = 64
"""Tokens that a part is compared on."""
ROTARY = "apply_rotary_pos_emb"
"""The name of the function in transformers' modules."""


def on_device(x: Tensor) -> bool:
    """Whether the kernels work on `x`: half precision on CUDA."""
    return x.is_cuda and x.dtype in FLASH_DTYPES


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[None]:
    """RMS norms, SwiGLU activations and rotary embeddings as one kernel each, for a block.

    The kernels have no gradients. The rotary embedding is a function in transformers' module, so
    other models of the same kind use the kernel, too, except where gradients are enabled.
    """
    with ExitStack() as stack:
        for owner, name, new in replacements(model):
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:  # a method of the class
                stack.callback(delattr, owner, name)
            setattr(owner, name, new)
        yield


def replacements(model: PreTrainedModel) -> list[tuple[Any, str, Function]]:
    """What `fused` sets: (owner, attribute, new function)."""
    like = next(model.parameters())
    if not AVAILABLE or not on_device(like):
        return []
    found: list[tuple[Any, str, Function]] = []
    layers = list(adapter_layers(model).values())
    try:
        # The trials run the adapter layers, whose diagonals may be for other numbers of tokens.
        with diagonal(model, torch.ones(len(layers[0].lora_A) if layers else 1)):
            for module in model.modules():
                if "forward" not in vars(module):  # otherwise something else has replaced it
                    forward = fused_norm(module) or fused_mlp(module)
                    found += [(module, "forward", forward)] if forward else []
        for file in sorted({type(module).__module__ for module in model.modules()}):
            original = vars(sys.modules[file]).get(ROTARY)
            # Another engine of this process may be running and have replaced it already.
            if original is not None and original.__module__ != __name__:
                function = fused_rotary(original, model.config.get_text_config(), like)
                found += [(sys.modules[file], ROTARY, function)] if function else []
    except Exception as reason:  # a compiler has errors of its own
        logger.warning("fused kernels do not run here, using slower functions: %s", reason)
        return []
    return found


def fused_norm(module: nn.Module) -> Function | None:
    """`rms_norm` to replace the module's forward; None if the results differ."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not on_device(weight):
        return None
    norm = partial(rms_norm, weight=weight, eps=eps)
    return norm if agree(module, norm, *drawn(weight, (1, TRIAL_TOKENS, len(weight)))) else None


def fused_mlp(module: nn.Module) -> Function | None:
    """`down(silu(gate(x)) * up(x))` to replace the module's forward; None if the results differ."""
    parts: list[Any] = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if not all(plain_linear(part) for part in parts):
        return None
    gate, up, down = parts
    if gate.weight.shape != up.weight.shape or gate.out_features != down.in_features:
        return None

    def forward(x: Tensor) -> Any:
        return down(gated_silu(gate(x), up(x)))

    (x,) = drawn(gate.weight, (1, TRIAL_TOKENS, gate.in_features))
    # Small and large numbers, as some models clamp large ones.
    sizes = torch.logspace(-1, 1, TRIAL_TOKENS, device=x.device, dtype=x.dtype)[:, None]
    return forward if agree(module, forward, x * sizes) else None


def plain_linear(part: Any) -> bool:
    """Whether it is a linear layer, adapted or not, with a weight in half precision on CUDA.

    An adapter around another module, such as a quantised layer, has no weight of its own.
    """
    weight = getattr(part, "weight", None)
    return isinstance(part, nn.Linear) and isinstance(weight, Tensor) and on_device(weight)


def fused_rotary(original: Function, config: Any, like: Tensor) -> Function | None:
    """`rotate` to replace transformers' `original`; None if the results differ."""

    def function(*args: Any, **options: Any) -> Any:
        if len(args) != 4 or options or torch.is_grad_enabled() or not fits(*args):
            return original(*args, **options)
        q, k, cos, sin = args
        return rotate(q, cos, sin), rotate(k, cos, sin)

    heads = getattr(config, "num_attention_heads", None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    table = (1, TRIAL_TOKENS, width)
    tried = drawn(like, (1, heads, *table[1:]), (1, key_heads, *table[1:]), table, table)
    return function if agree(original, function, *tried) else None


def fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these: all of d is rotated, a batch of one, one dtype."""
    return cos.shape == sin.shape and all(
        on_device(x)
        and x.dim() == 4
        and cos.shape == (1, *x.shape[2:])
        and x.shape[0] == 1
        and x.dtype == cos.dtype == sin.dtype
        and x.stride(3) == cos.stride(2) == sin.stride(2) == 1
        for x in (q, k)
    )


def drawn(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random numbers of these shapes, of both signs, whose mean is not 0."""
    generator = torch.Generator(like.device).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=like.device).add(0.5).to(like.dtype)
        for shape in shapes
    ]


@torch.no_grad()
def agree(original: Function, new: Function, *tried: Tensor) -> bool:
    """Whether both give the same, but for a few roundings; raises the errors of `new`.

    Errors are relative to each token, or head of a token, so that large do not hide small ones.
    """
    name = getattr(original, "__name__", type(original).__name__)
    found = new(*tried)
    try:
        expected = original(*tried)
        results = [
            [result] if isinstance(result, Tensor) else result for result in (found, expected)
        ]
        x, y = (torch.cat([part.float().flatten(0, -2) for part in result]) for result in results)
        errors = (x - y).norm(dim=1) / y.norm(dim=1) / torch.finfo(tried[0].dtype).eps
        error = float(errors.square().mean().sqrt())
    except Exception as reason:  # it takes or returns something else
        logger.debug("%s stays as it is: %s", name, reason)
        return False
    if error < TOLERANCE:
        return True
    logger.debug("%s stays as it is: off by %.3g epsilons", name, error)
    return False
