"""Bootstrap intervals over documents, and over seeds and documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

_COUNTS = 2**20
"""Counts held at a time: 8 MiB, whatever the numbers of samples and documents."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval; None where documents' scores are not at hand."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, value: Callable[[float], str], end: Callable[[float], str]) -> str:
        """`value [low, high]` as the functions write them; the value alone without an interval."""
        if self.low is None or self.high is None:
            return value(self.value)
        return f"{value(self.value)} [{end(self.low)}, {end(self.high)}]"


def bootstrap_intervals(
    values: npt.ArrayLike, *, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Percentile bootstrap intervals (low, high) over documents: (cells, documents) -> (cells, 2).

    Each interval is that of the mean of a line of `values`. A resample draws the same documents for
    all lines, so a line may be differences of paired scores, or, as AURAC is linear,
    `trapezoid_weights(ranks) @ scores` for scores (ranks, documents).
    Raises ValueError for another shape, values that are not finite, and impossible options.
    """
    cells = np.asarray(values, dtype=np.float64)
    if cells.ndim != 2 or cells.shape[1] == 0:
        raise ValueError(f"a bootstrap needs values of shape (cells, documents), got {cells.shape}")
    if not np.all(np.isfinite(cells)):
        raise ValueError("a bootstrap needs finite values: leave out what has none")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    if samples < 1:
        raise ValueError(f"a bootstrap needs at least one sample, got {samples!r}")
    rng = np.random.default_rng(seed)
    chunk = max(1, _COUNTS // cells.shape[1])
    # A product for each resample, (cells, documents) @ (chunk, documents, 1), and not one matrix
    # product of all: that would round differently for another chunk.
    means = [
        (cells @ _counts(rng, min(chunk, samples - start), cells.shape[1])[:, :, None])[:, :, 0]
        for start in range(0, samples, chunk)
    ]
    tail = (1 - confidence) / 2
    return np.quantile(np.concatenate(means) / cells.shape[1], [tail, 1 - tail], axis=0).T


def interval(drawn: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values, (samples,); they may be infinite.

    Its ends are values that were drawn: between infinities there is nothing to interpolate.
    """
    low = np.quantile(drawn, 0.025, method="inverted_cdf")
    return float(low), float(np.quantile(drawn, 0.975, method="inverted_cdf"))


def resampled_means(
    lines: Sequence[npt.NDArray[np.float64]],
    *,
    positive: bool = False,
    samples: int = 2000,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Means of each line, (seeds, documents), resampled over seeds and documents: (lines, samples).

    A resample draws the same documents for all lines, and seeds for each line of its own. A few
    seeds spread less in resamples than the seeds of all trainings do: what a resample deviates from
    their mean is widened, see `_widening`. For `positive` means, losses that are divided by each
    other, its logarithm is, so that they stay positive. A line with one seed is resampled over
    documents alone. Lines that are equal are one measurement, a function that has two names, and
    drawn once.
    """
    keys = [(line.shape, line.tobytes()) for line in lines]
    unique = dict(zip(keys, lines, strict=True))
    drawn = _resampled(list(unique.values()), positive, samples, seed)
    means = dict(zip(unique, drawn, strict=True))
    return np.stack([means[key] for key in keys])


def _resampled(
    lines: Sequence[npt.NDArray[np.float64]], positive: bool, samples: int, seed: int
) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    documents = lines[0].shape[1]
    stacked = np.concatenate(lines)
    chunk = max(1, _COUNTS // documents)
    of_seeds = np.concatenate(
        [
            stacked @ _counts(rng, min(chunk, samples - start), documents).T / documents
            for start in range(0, samples, chunk)
        ],
        axis=1,
    )
    means, first = [], 0
    for line in lines:
        own = of_seeds[first : first + len(line)]
        drawn = rng.integers(0, len(line), (len(line), samples))
        center, mean = own.mean(axis=0), np.take_along_axis(own, drawn, axis=0).mean(axis=0)
        if positive:
            means.append(center * (mean / center) ** _widening(len(line)))
        else:
            means.append(center + _widening(len(line)) * (mean - center))
        first += len(line)
    return np.stack(means)


def _widening(seeds: int) -> float:
    """What makes a 95 % percentile interval over so few seeds as wide as Student's t interval.

    The bootstrap's variance of a mean lacks the factor n / (n - 1), and its tails are a normal
    distribution's instead of Student's (Hesterberg 2015, https://arxiv.org/abs/1411.5279, 3.2). A
    difference of two rows gets more than it needs, as their seeds together are more than each's.
    """
    if seeds == 1:
        return 1.0  # which deviates by nothing
    return float(np.sqrt(seeds / (seeds - 1)) * stdtrit(seeds - 1, 0.975) / ndtri(0.975))


def _counts(rng: np.random.Generator, samples: int, documents: int) -> npt.NDArray[np.float64]:
    """How often each resample draws each document, (samples, documents).

    The draws do not depend on how many samples are asked for at a time.
    """
    drawn = rng.integers(0, documents, (samples, documents))
    drawn += documents * np.arange(samples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=samples * documents)
    return counts.reshape(samples, documents).astype(np.float64)
