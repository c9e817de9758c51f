"""The diagonals of a run's points, and how the adapter layers get theirs in each forward."""

from collections.abc import Mapping, Sequence

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

    Chosen diagonals are tensors (1, n, R) that all layers share, or, where a point has a diagonal
    for each layer, (layers, n, R).
    """

    def __init__(
        self,
        layers: Mapping[str, AdapterLinear],
        points: Sequence[Point],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """layers: by name. dtype: of the chosen diagonals."""
        diagonals = [point.p for point in points]
        shared = [isinstance(p, Tensor) for p in diagonals]
        tables = [
            torch.stack([p if isinstance(p, Tensor) else p[name] for p in diagonals])
            for name in ([""] if all(shared) else layers)
        ]
        table = torch.stack(tables)
        self.device = device
        self._layers = list(layers.values())
        self._shared = np.array(shared)
        self._table = table.to(device, dtype)
        self._ranks = live_ranks(table)

    def rank(self, points: Sequence[int] | np.ndarray) -> int:
        """How many ranks to compute with, so that none is left out that one of `points` reads."""
        return int(self._ranks[points].max())

    def choose(self, points: Tensor, among: Sequence[int] | None = None) -> Tensor:
        """(n,), indices of points -> (1 or layers, n, R): their diagonals.

        among: the points that occur. If all layers share the diagonals of these, they are not
        repeated for each layer.
        """
        together = among is not None and bool(self._shared[among].all())
        return (self._table[:1] if together else self._table)[:, points]

    def zeros(self, n: int) -> Tensor:
        """(1 or layers, n, R): room for chosen diagonals."""
        return self._table.new_zeros(len(self._table), n, self._table.shape[2])

    def apply(self, chosen: Tensor, rank: int | None = None) -> None:
        """Give the layers the first `rank` entries of a diagonal for each token of the next
        forward; None: all entries. chosen: (1 or layers, tokens, R)."""
        p = chosen[:, :, :rank]
        # Views of each layer's part by one call, as the host's time counts in decoding.
        own = [p] * len(self._layers) if len(p) == 1 else p.split(1)
        for layer, diagonal in zip(self._layers, own, strict=True):
            layer.p = diagonal


def live_ranks(table: Tensor) -> np.ndarray:
    """(layers, points, R) -> (points,): how many entries to compute with; others are 0.

    Powers of two from MIN_RANK on, but R at most: few numbers, as each has graphs of its own.
    """
    largest = table.shape[2]
    places = torch.arange(1, largest + 1)
    last = (places * (table != 0).to(places)).amax((0, 2))
    allowed = np.array([r for r in powers_of_two(largest) if r >= min(MIN_RANK, largest)])
    return allowed[np.searchsorted(allowed, last.numpy())]
