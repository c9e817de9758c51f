"""Linear layers whose frozen weights are kept in 4 or 8 bits, through bitsandbytes.

bitsandbytes quantises and dequantises; the product is torch's own, with the dequantised weight in
the dtype of the activations. So a quantised model computes what its dequantised weights compute,
whatever else is in the batch, in training as in evaluation, and merging into them is exact.

Its own layers are not used, because they promise less. Linear8bitLt rounds activations, too (on a
CPU in evaluation only), and treats the columns of a batch apart in which one token is large, so
that an answer depends on what is packed beside it. Linear4bit repacks its weights when it first
evaluates on a CPU with AVX512-BF16, after which its input gets no gradient.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one themselves: QLoRA's double quantisation."""

# On some CPUs it warns, when it is imported, that a package is missing which would speed up its own
# layers. PEFT imports it wherever it is installed, so that exports would show the warning, too.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with a frozen W, kept as nf4 (a scale for 64 weights) or int8 (one a row).

    x: (..., in), y: (..., out). W is dequantised in each forward and again in each backward pass,
    never kept. nf4 is that of QLoRA (https://arxiv.org/abs/2305.14314), scales quantised to 8 bits.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, kind: str, device: torch.device) -> None:
        """kind: nf4 or int8. Raises ImportError without bitsandbytes."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.kind = kind
        weight, functional = base.weight.data.to(device), library()
        # Beside the weight, and no buffer: a change of the model's dtype is not for scales.
        self.scales: Any
        if kind == "nf4":
            packed, self.scales = functional.quantize_4bit(
                weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
            )
        else:
            packed, self.scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", base.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W, (out, in)."""
        functional = library()
        if self.kind == "nf4":
            return functional.dequantize_4bit(self.weight.data, self.scales).to(dtype)
        return functional.int8_vectorwise_dequant(self.weight.data, self.scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self)

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Everything that moves the layer moves its scales, whose dtype stays."""
        super()._apply(fn, recurse)
        moved = self.scales.to(self.weight.device)
        self.scales = self.scales if moved is None else moved  # a QuantState moves in place
        return self


class _FrozenProduct(torch.autograd.Function):
    """`F.linear` with a weight that has no gradient and is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


def quantize(root: nn.Module, kind: str, device: torch.device) -> int:
    """Replace every plain linear layer below `root` by a quantised one on `device`; how many.

    One after the other, so that the device needs room for the quantised weights and one whole one.
    Raises ImportError without bitsandbytes.
    """
    names = [name for name, module in root.named_modules() if type(module) is nn.Linear]
    for name in names:
        base = root.get_submodule(name)
        assert isinstance(base, nn.Linear)
        root.set_submodule(name, QuantizedLinear(base, kind, device))
    return len(names)


def dequantize(root: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantised layer below `root` by a plain one with its weights in `dtype`."""
    for name, module in list(root.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(module.dequantized(dtype), requires_grad=False)
            plain.register_parameter("bias", module.bias)
            root.set_submodule(name, plain)


def quantized_bytes(kind: str, weights: int, rows: int) -> float:
    """Of a layer of so many weights in so many rows, with its scales."""
    if kind == "int8":
        return weights + 4 * rows
    return weights * (1 / 2 + (1 + 4 / NF4_NESTED_BLOCK) / NF4_BLOCK)


def library() -> Any:
    """What quantises: `bitsandbytes.functional`. Raises ImportError where it is not installed."""
    from bitsandbytes import functional

    return functional
