"""Area under the rank-accuracy curve (AURAC)."""

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
