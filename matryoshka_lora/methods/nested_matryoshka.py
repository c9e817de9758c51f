"""Nested MatryoshkaLoRA: the P of Algorithm 1 cut to a rank drawn for every sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka_lora.core.diagonals import (
    matryoshka_diagonal,
    power_diagonal,
    prefix_diagonal,
)
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.methods.base import AdapterShape, Method, nothing_to_draw, register, setting


@dataclass(frozen=True)
class Settings:
    decay: float | None = setting(None, "P is s_R (R/i)^decay; null: the sum over S of Algorithm 1")
    weights: list[float] | None = setting(
        None, "odds of each trained sub-rank; null: the method's own", idle=nothing_to_draw
    )


@register(label="nested MatryoshkaLoRA", colour="#AA4499", marker="P", order=4, settings=Settings)
def nested_matryoshka(shape: AdapterShape, settings: Settings) -> Method:
    """p = P * 1[i<=r], r drawn from S for each sample.

    P gives low rows, which every sample trains, the larger step that low ranks want; a rank for
    every sample trains just the function that is read. Nested dropout is the case P = 1.
    """
    p_full = _p_full(shape, settings.decay)
    cut = [p_full * prefix_diagonal(r, shape.rank, "none") for r in shape.train_ranks]
    weights = settings.weights
    return Method(
        diagonals=torch.stack(cut),
        ranks=shape.train_ranks,
        p_full=p_full,
        weights=default_odds(shape.train_ranks) if weights is None else tuple(weights),
        draw="sample",
    )


def _p_full(shape: AdapterShape, decay: float | None) -> Tensor:
    if decay is None:
        return matryoshka_diagonal(shape.train_ranks, shape.rank, shape.scaling)
    if not 0 <= decay < float("inf"):
        raise UserError(f"method.decay={decay} must be 0 or a positive number, or null")
    p_full = power_diagonal(decay, shape.rank, shape.scaling)
    if not p_full.isfinite().all():
        raise UserError(
            f"method.decay={decay} is too large: (R/i)^decay leaves float32 at "
            f"adapter.rank={shape.rank}; choose a smaller one, such as 0.5"
        )
    return p_full


def default_odds(ranks: Sequence[int]) -> tuple[float, ...]:
    """2, 1, ..., 1, 4: the lowest rank lacks updates, the highest must learn what is left."""
    if len(ranks) == 1:
        return (1.0,)
    return (2.0, *[1.0] * (len(ranks) - 2), 4.0)
