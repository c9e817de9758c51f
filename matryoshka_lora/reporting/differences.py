"""How far each curve is above or below the SVD of a plain LoRA, problem by problem."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matryoshka_lora.metrics import AXES, Axis, bootstrap_intervals, trapezoid_weights
from matryoshka_lora.records import Row, decode_scores
from matryoshka_lora.reporting.curves import Curve, Metric, RankTable

Scores = npt.NDArray[np.float64]
Column = int | Axis

REFERENCE = ("lora", "svd")
"""Method and rule: it needs no method of its own, so it is what a method has to beat."""


@dataclass(frozen=True)
class Difference:
    """Mean over documents, and its 95 % bootstrap interval, in the unit of the table."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def reference(table: RankTable) -> Curve | None:
    """The curve that the others are compared with; None if there is none, or more than one."""
    found = [
        row
        for row in table.rows
        if row.kind == "curve" and (row.method_name, row.rule) == REFERENCE
    ]
    return found[0] if len(found) == 1 else None


def differences(table: RankTable) -> list[tuple[Curve, dict[Column, Difference]]]:
    """Curves and dedicated LoRAs, each minus the reference at the ranks and axes that both have.

    Seeds are averaged document by document before; an interval says nothing about other seeds.
    Rules that are the same function as another one are left out, and so are values that are not the
    mean of documents' scores in the records.
    """
    base = reference(table)
    if base is None:
        return []
    theirs = _documents(base, table.metric)
    compared: list[tuple[Curve, dict[Column, Scores]]] = []
    for row in table.rows:
        if row is base or row.kind == "base" or row.same_as is not None:
            continue
        gaps: dict[Column, Scores] = {
            rank: ours - theirs[rank]
            for rank, ours in _documents(row, table.metric).items()
            if rank in theirs and len(ours) == len(theirs[rank])
        }
        if row.kind == "curve" and tuple(gaps) == table.curve_ranks:
            of_ranks = np.stack(list(gaps.values()))
            for axis in AXES:
                gaps[axis] = trapezoid_weights(table.curve_ranks, axis) @ of_ranks
        if gaps:
            compared.append((row, gaps))
    values = [gap for _, gaps in compared for gap in gaps.values()]
    if len({len(gap) for gap in values}) != 1:
        return []
    intervals = iter(bootstrap_intervals(values).tolist())
    return [
        (row, {x: Difference(float(gap.mean()), *next(intervals)) for x, gap in gaps.items()})
        for row, gaps in compared
    ]


def _documents(curve: Curve, metric: Metric) -> dict[int, Scores]:
    """By rank, the shown score of each document, mean over the seeds, where all seeds have it."""
    found = {}
    for rank, rows in curve.scored.items():
        scores = [scores for row in rows if (scores := _scores(row)) is not None]
        if len(scores) == curve.seeds > 0 and len({len(x) for x in scores}) == 1:
            found[rank] = np.array([metric.shown(x) for x in np.mean(scores, axis=0).tolist()])
    return found


def _scores(row: Row) -> Scores | None:
    """The documents' scores if the value is their mean; a perplexity, say, is not."""
    if row.scores is None or row.value is None:
        return None
    scores = np.array(decode_scores(row.scores), dtype=np.float64)
    is_mean = math.isclose(scores.mean(), row.value, rel_tol=1e-4, abs_tol=1e-6)
    return scores if is_mean else None
