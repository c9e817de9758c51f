"""Area under the rank-accuracy curve (AURAC) and its bootstrap intervals."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Axis = Literal["log2", "linear"]
AXES: tuple[Axis, ...] = ("log2", "linear")


def trapezoid_weights(ranks: Sequence[int], axis: Axis = "log2") -> npt.NDArray[np.float64]:
    """Weights w, shape (len(ranks),), with AURAC = w . scores; they sum to 1.

    AURAC is linear in the scores, so the weight of a rank is the area under the curve that is 1
    at this rank and 0 at the others, divided by the width of the axis. One rank has weight 1.
    Raises ValueError for ranks that are empty, not positive, or not strictly ascending, and for an
    unknown axis.
    """
    x = np.asarray(ranks, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"AURAC needs a non-empty list of ranks, got {ranks!r}")
    if not np.all(np.isfinite(x)) or np.any(x <= 0):
        raise ValueError(f"AURAC needs positive ranks (rank 0 is the base model), got {ranks!r}")
    if np.any(np.diff(x) <= 0):
        raise ValueError(f"AURAC needs ascending ranks without repeats, got {ranks!r}")
    if axis not in AXES:
        raise ValueError(f"unknown AURAC axis {axis!r}: use one of {', '.join(AXES)}")
    if x.size == 1:
        return np.ones(1)
    if axis == "log2":
        x = np.log2(x)
    return np.trapezoid(np.eye(x.size), x) / (x[-1] - x[0])


def aurac(ranks: Sequence[int], scores: Sequence[float], axis: Axis = "log2") -> float:
    """Trapezoid area under scores over the axis divided by its width, in the unit of the scores.

    Ranks 1 2 4 8 with scores 10 20 40 40 give 28.3333 (log2) and 33.5714 (linear); one rank gives
    its own score. Raises ValueError as `trapezoid_weights` does, for unequal lengths, and for a
    score that is not a finite number.
    """
    weights = trapezoid_weights(ranks, axis)
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != weights.shape:
        raise ValueError(
            f"AURAC needs one score a rank, got {len(ranks)} ranks {ranks!r} and "
            f"scores of shape {values.shape}"
        )
    if not np.all(np.isfinite(values)):
        raise ValueError(f"AURAC needs finite scores, got {scores!r}")
    return float(weights @ values)


def bootstrap_interval(
    scores: npt.ArrayLike,
    ranks: Sequence[int],
    axis: Axis = "log2",
    *,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of AURAC over documents.

    scores: (ranks, documents), the score of every document at every rank. Each resample draws
    documents with replacement once for all ranks, so the correlation between ranks is kept. As
    AURAC is linear, this is the bootstrap of the mean of the documents' own AURACs.
    Raises ValueError for wrong shapes, scores that are not finite, and impossible options.
    """
    contributions = _document_auracs(scores, ranks, axis)
    return _percentile_interval(contributions, confidence, samples, seed)


def paired_bootstrap_interval(
    scores: npt.ArrayLike,
    other: npt.ArrayLike,
    ranks: Sequence[int],
    axis: Axis = "log2",
    *,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval (low, high) of AURAC(scores) - AURAC(other), both (ranks, documents).

    The two must hold the same documents in the same order: a resample takes the same documents
    for both. Otherwise as `bootstrap_interval`.
    """
    first, second = (_document_auracs(s, ranks, axis) for s in (scores, other))
    if first.shape != second.shape:
        raise ValueError(
            "a paired interval needs the same documents on both sides, got "
            f"{first.size} and {second.size}"
        )
    return _percentile_interval(first - second, confidence, samples, seed)


def _document_auracs(
    scores: npt.ArrayLike, ranks: Sequence[int], axis: Axis
) -> npt.NDArray[np.float64]:
    """AURAC of each document alone, shape (documents,); their mean is the AURAC of the means."""
    weights = trapezoid_weights(ranks, axis)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != weights.size or values.shape[1] == 0:
        raise ValueError(
            f"a bootstrap needs scores of shape ({weights.size} ranks, documents), "
            f"got {values.shape}"
        )
    if not np.all(np.isfinite(values)):
        raise ValueError(
            "a bootstrap needs finite scores: a document without a score has to be "
            "left out at every rank"
        )
    return weights @ values


def _percentile_interval(
    values: npt.NDArray[np.float64], confidence: float, samples: int, seed: int
) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    if samples < 1:
        raise ValueError(f"a bootstrap needs at least one sample, got {samples!r}")
    rng = np.random.default_rng(seed)
    # One resample at a time: (samples, documents) indices of HellaSwag would take 80 MB.
    means = [values[rng.integers(0, values.size, values.size)].mean() for _ in range(samples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
