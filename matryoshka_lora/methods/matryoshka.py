"""MatryoshkaLoRA, Algorithm 1 of arXiv 2605.07850."""

from dataclasses import dataclass

from torch import Tensor

from matryoshka_lora.core.diagonals import matryoshka_diagonal, power_diagonal
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.methods.base import (
    AdapterShape,
    Method,
    nothing_to_draw,
    register,
    setting,
    single,
)

DECAY = "P is s_R (R/i)^decay; null: the sum over S of Algorithm 1"


@dataclass(frozen=True)
class Settings:
    normalise: str = setting(
        "sum", "P is the sum or the mean of the prefix diagonals", idle=nothing_to_draw
    )
    decay: float | None = setting(None, DECAY, later=True)
    reverse: bool = setting(
        False, "P from its last entry to its first, to see what its order does", later=True
    )


@register(label="MatryoshkaLoRA", colour="#CC3311", marker="D", order=3, settings=Settings)
def matryoshka(shape: AdapterShape, settings: Settings) -> Method:
    """p = P, the sum (or mean) of the prefix diagonals of S, in every step."""
    if settings.normalise not in ("sum", "mean"):
        raise UserError(f"method.normalise={settings.normalise} is unknown; allowed: sum, mean")
    if settings.normalise == "mean" and settings.decay is not None:
        raise UserError(
            f"method.normalise=mean divides the sum over S, and with method.decay={settings.decay} "
            "P is none; leave one of the two out"
        )
    p = decreasing_diagonal(shape, settings.decay)
    if settings.normalise == "mean":
        p = p / len(shape.train_ranks)
    return single(p.flip(0) if settings.reverse else p)


def decreasing_diagonal(shape: AdapterShape, decay: float | None) -> Tensor:
    """P, shape (R,). Raises UserError for a decay below 0 or so large that P is not finite."""
    if decay is None:
        return matryoshka_diagonal(shape.train_ranks, shape.rank, shape.scaling)
    if not 0 <= decay < float("inf"):
        raise UserError(f"method.decay={decay} must be 0 or a positive number, or null")
    p = power_diagonal(decay, shape.rank, shape.scaling)
    if not p.isfinite().all():
        raise UserError(
            f"method.decay={decay} is too large: (R/i)^decay leaves float32 at "
            f"adapter.rank={shape.rank}; choose a smaller one, such as 0.5"
        )
    return p
