"""Nested MatryoshkaLoRA: the P of Algorithm 1 cut to a rank drawn for every sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from matryoshka_lora.core.diagonals import prefix_diagonal
from matryoshka_lora.methods.base import AdapterShape, Method, register, setting
from matryoshka_lora.methods.matryoshka import DECAY, decreasing_diagonal


@dataclass(frozen=True)
class Settings:
    decay: float | None = setting(None, DECAY)
    weights: list[float] | None = setting(
        None, "odds of each trained sub-rank; null: the method's own"
    )


@register(label="nested MatryoshkaLoRA", colour="#AA4499", marker="P", order=4, settings=Settings)
def nested_matryoshka(shape: AdapterShape, settings: Settings) -> Method:
    """p = P * 1[i<=r], r drawn from S for each sample.

    P gives low rows, which every sample trains, the larger step that low ranks want; a rank for
    every sample trains just the function that is read. Nested dropout is the case P = 1.
    """
    p_full = decreasing_diagonal(shape, settings.decay)
    cut = [p_full * prefix_diagonal(r, shape.rank, "none") for r in shape.train_ranks]
    weights = settings.weights
    return Method(
        diagonals=torch.stack(cut),
        ranks=shape.train_ranks,
        p_full=p_full,
        weights=default_odds(shape.train_ranks) if weights is None else tuple(weights),
        draw="sample",
    )


def default_odds(ranks: Sequence[int]) -> tuple[float, ...]:
    """2, 1, ..., 1, 4: the lowest rank lacks updates, the highest must learn what is left."""
    if len(ranks) == 1:
        return (1.0,)
    return (2.0, *[1.0] * (len(ranks) - 2), 4.0)
