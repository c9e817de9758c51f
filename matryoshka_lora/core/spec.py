"""What a trained adapter is, as far as reading it at a sub-rank needs to know."""

import math
from dataclasses import dataclass

from matryoshka_lora.core.diagonals import check_rank, sub_rank_scale
from matryoshka_lora.core.errors import UserError


@dataclass(frozen=True)
class AdapterSpec:
    """The facts that an adapter's file carries, beside its factors."""

    rank: int
    """R, the rank of the factors."""
    scaling: str
    """Which `s_r` the prefix diagonals carry."""
    p_full: tuple[float, ...]
    """The method's full diagonal, length R."""
    trains_prefixes: bool
    """Whether training itself used `prefix(r)` (DyLoRA, nested dropout): `trained` is `prefix`."""
    method: str | None = None
    """The method's name; None for an adapter made without one."""
    train_ranks: tuple[int, ...] = ()
    """S, the sub-ranks that training visited; empty where S has no meaning."""
    gated: bool = False
    """Whether each layer has a learned factor `lora_gate` (R,) of the diagonal."""
    ordered: bool = True
    """Whether components stand in the order of rank, so that the first r of them mean something."""
    float32_diagonal: bool = False
    """Whether the diagonal is multiplied in float32; else it is rounded to the dtype of the
    activations before."""

    def __post_init__(self) -> None:
        """Raises UserError for a diagonal that is not R finite numbers, and an unknown scaling."""
        check_rank(self.rank, self.rank)
        sub_rank_scale(self.rank, self.scaling)
        if len(self.p_full) != self.rank:
            raise UserError(f"a diagonal of {len(self.p_full)} entries for rank {self.rank}")
        if not all(isinstance(p, int | float) and math.isfinite(p) for p in self.p_full):
            raise UserError(f"a diagonal of {self.p_full[:4]}..., which are not all numbers")
