"""The diagonals of a run's points, and how the adapter layers get theirs in each forward."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from matryoshka_lora.core.diagonals import powers_of_two
from matryoshka_lora.core.layer import AdapterLinear
from matryoshka_lora.evaluation.engines.protocol import Point

MIN_RANK = 8
"""Ranks that are computed with at least; tensor cores want multiples of it."""


class DiagonalTable:
    """The diagonals of all points, of which tokens and rows of the KV cache choose one each.

    Chosen diagonals are tensors (1, n, R). All layers share them: to give each layer its own, the
    first axis becomes that of the layers, and nothing outside this class needs to know.
    """

    def __init__(
        self,
        layers: Sequence[AdapterLinear],
        points: Sequence[Point],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the chosen diagonals."""
        table = torch.stack([point.p for point in points])
        self.device = device
        self._layers = layers
        self._table = table.to(device, dtype)
        self._ranks = live_ranks(table)

    def rank(self, points: Sequence[int] | np.ndarray) -> int:
        """How many ranks to compute with, so that none is left out that one of `points` reads."""
        return int(self._ranks[points].max())

    def choose(self, points: Tensor) -> Tensor:
        """(n,), indices of points -> (1, n, R): their diagonals."""
        return self._table[points][None]

    def zeros(self, n: int) -> Tensor:
        """(1, n, R): room for chosen diagonals."""
        return self._table.new_zeros(1, n, self._table.shape[1])

    def apply(self, chosen: Tensor, rank: int | None = None) -> None:
        """Give the layers the first `rank` entries of a diagonal for each token of the next
        forward; None: all entries. chosen: (1, tokens, R)."""
        p = chosen[:, :, :rank]
        for layer in self._layers:
            layer.p = p


def live_ranks(table: Tensor) -> np.ndarray:
    """(points, R) -> (points,): how many entries of each diagonal to compute with; others are 0.

    Powers of two from MIN_RANK on, but R at most: few numbers, as each has graphs of its own.
    """
    places = torch.arange(1, table.shape[1] + 1)
    last = (places * (table != 0).to(places)).amax(1)
    largest = table.shape[1]
    allowed = np.array([r for r in powers_of_two(largest) if r >= min(MIN_RANK, largest)])
    return allowed[np.searchsorted(allowed, last.numpy())]
