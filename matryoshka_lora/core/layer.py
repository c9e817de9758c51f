"""The adapter layer. All methods use this one layer and this one forward; they only set `p`."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka_lora.core.errors import UserError

RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_gate": 0}
"""Parameters of a layer by their role, the last segment of their name -> the axis of the rank."""

T = TypeVar("T")


def by_layer(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """`<layer>.<role>` -> x as layer -> role -> x, in the same order."""
    found: dict[str, dict[str, T]] = {}
    for name, value in named.items():
        layer, _, role = name.rpartition(".")
        found.setdefault(layer, {})[role] = value
    return found


class AdapterLinear(nn.Linear):
    """`y = base(x) + ((x A^T) * g p) B^T` around a frozen linear map.

    x: (..., in), y: (..., out), lora_A: (R, in), lora_B: (out, R). p is the diagonal; g is
    `lora_gate` (R,), a learned factor of it, where a method has one, and 1 elsewhere.

    p broadcasts against (batch, tokens, R): (R,) for all, (batch, 1, R) a rank for each sequence,
    (1, tokens, R) a rank for each token of a packed row. A layer that sees the tokens flattened,
    (batch * tokens, in), takes these, too. The factors may be held in a higher precision than the
    activations; they are cast explicitly, so no autocast is needed, and under autocast they follow
    it. The diagonal is rounded to the activations' dtype; with `float32_diagonal` the product
    with it is rounded instead.

    A plain `nn.Linear` is taken over: `weight` (out, in) and `bias` are this layer's own, so the
    names in the base model's state dict stay as they were. Any other module, such as a quantised
    layer, sits in `base` and is called.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_gate: nn.Parameter | None
    base: nn.Module | None
    p: Tensor

    def __init__(
        self,
        base: nn.Module,
        p: Tensor,
        dtype: torch.dtype,
        *,
        gated: bool = False,
        float32_diagonal: bool = False,
    ) -> None:
        """p: (R,), float32. dtype: of the factors. Raises UserError for a base without sizes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = sizes_of(base)
        if type(base) is nn.Linear:
            self.base = None
            self.weight = base.weight
            self.register_parameter("bias", base.bias)
        else:
            self.base = base
        self.requires_grad_(False)
        device, rank = next(base.parameters()).device, p.numel()
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        gate = nn.Parameter(torch.ones(rank, dtype=torch.float32, device=device)) if gated else None
        self.register_parameter("lora_gate", gate)
        # Not in the state dict: it belongs to the method, not to what was learnt. And no buffer at
        # all, because compiled layers take a buffer's shape, here the number of tokens, for fixed.
        self.p = p
        self.float32_diagonal = float32_diagonal

    def forward(self, x: Tensor) -> Tensor:
        if self.base is not None or torch.is_autocast_enabled(x.device.type) or x.dim() == 1:
            y = F.linear(x, self.weight, self.bias) if self.base is None else self.base(x)
            return y + F.linear(self.scaled(x), self._cast(self.lora_B, x)).to(y.dtype)
        h = self.scaled(x)
        # The large product is added to the small one, in place: it is bound by arithmetic, so that
        # reading y costs nothing there. The other way round, y is read and written once more.
        y = F.linear(h.flatten(0, -2), self.lora_B.to(x.dtype), self.bias)
        y.addmm_(x.flatten(0, -2), self.weight.t())
        return y.unflatten(0, x.shape[:-1])

    def scaled(self, x: Tensor) -> Tensor:
        """`(x A^T) * g p`, (..., R)."""
        p = self.p if self.lora_gate is None else self.p * self.lora_gate
        h = F.linear(x, self._cast(self.lora_A, x))
        if p.dim() == 3 and x.dim() == 2 and len(p) > 1:
            # Sequences that the model has flattened: each diagonal is that of its tokens.
            p = p.expand(-1, len(x) // len(p), -1).flatten(0, 1)
        if p.dim() == 3 and x.dim() < 3:
            p = p.flatten(0, 1)
        return (h * p).to(h.dtype) if self.float32_diagonal else h * p.to(h)

    def _cast(self, factor: Tensor, x: Tensor) -> Tensor:
        # Quantised bases take activations of any dtype, and autocast casts for itself.
        return factor if torch.is_autocast_enabled(x.device.type) else factor.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[RANK_AXIS["lora_A"]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterLinear":
        """Everything that moves the layer moves its diagonal, which stays float32."""
        super()._apply(fn, recurse)
        self.p = self.p.to(self.lora_A.device)
        return self


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a module that maps (..., in) to (..., out). Raises UserError if it has none."""
    sizes = tuple(getattr(module, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(f"a {type(module).__name__} has no in_features and out_features")
    return sizes  # type: ignore[return-value]
