"""MatryoshkaLoRA, Algorithm 1 of arXiv 2605.07850."""

from dataclasses import dataclass

from matryoshka_lora.core.diagonals import matryoshka_diagonal
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.methods.base import (
    AdapterShape,
    Method,
    nothing_to_draw,
    register,
    setting,
    single,
)


@dataclass(frozen=True)
class Settings:
    normalise: str = setting(
        "sum", "P is the sum or the mean of the prefix diagonals", idle=nothing_to_draw
    )


@register(label="MatryoshkaLoRA", colour="#CC3311", marker="D", order=3, settings=Settings)
def matryoshka(shape: AdapterShape, settings: Settings) -> Method:
    """p = P, the sum (or mean) of the prefix diagonals of S, in every step."""
    if settings.normalise not in ("sum", "mean"):
        raise UserError(f"method.normalise={settings.normalise} is unknown; allowed: sum, mean")
    p = matryoshka_diagonal(shape.train_ranks, shape.rank, shape.scaling)
    return single(p / len(shape.train_ranks) if settings.normalise == "mean" else p)
