"""How far each curve is above or below the SVD of a plain LoRA, problem by problem."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matryoshka_lora.evaluation.rows import decode_scores
from matryoshka_lora.reporting.aurac import AXES, Axis, trapezoid_weights
from matryoshka_lora.reporting.bootstrap import bootstrap_intervals
from matryoshka_lora.reporting.curves import Curve, RankTable
from matryoshka_lora.reporting.frame import grouped
from matryoshka_lora.reporting.names import is_baseline

Scores = npt.NDArray[np.float64]
Column = int | Axis

REFERENCE_RULE = "svd"
"""Read from a plain LoRA it needs no method of its own, so it is what a method has to beat."""


@dataclass(frozen=True)
class Difference:
    """Mean over documents and its 95 % bootstrap interval, in the unit of the table.

    apart: the seeds of the two do not overlap. The interval knows nothing of seeds.
    """

    mean: float
    low: float
    high: float
    apart: bool


def references(table: RankTable) -> list[Curve]:
    """The curves that others may be compared with; with several there is nothing to choose by."""
    return [
        row
        for row in table.rows
        if row.kind == "curve" and is_baseline(row.method_name) and row.rule == REFERENCE_RULE
    ]


def differences(table: RankTable) -> list[tuple[Curve, dict[Column, Difference]]]:
    """Curves and dedicated LoRAs, each minus the one reference at the ranks and axes of both.

    Intervals are over documents, seeds averaged before. Rules that are the same function as another
    one are left out, and so are values that are not the mean of documents' scores in the records,
    and all of a table whose values are over different documents.
    """
    bases = references(table)
    if len(bases) != 1 or len(table.documents) != 1:
        return []
    (base,) = bases
    theirs = columns_of(base, table)
    compared: list[tuple[Curve, list[Column]]] = []
    means: list[Scores] = []
    apart: list[bool] = []
    for row in table.rows:
        same = (row.model, row.dataset) == (base.model, base.dataset)
        if not same or row is base or row.kind == "base" or row.same_as is not None:
            continue
        ours = {x: scores for x, scores in columns_of(row, table).items() if x in theirs}
        if ours:
            compared.append((row, list(ours)))
        for column, scores in ours.items():
            means.append(scores.mean(axis=0) - theirs[column].mean(axis=0))
            mine, other = scores.mean(axis=1), theirs[column].mean(axis=1)
            apart.append(bool(mine.min() > other.max() or mine.max() < other.min()))
    intervals = bootstrap_intervals(means).tolist() if means else []
    found = (
        Difference(float(mean.mean()), low, high, seeds)
        for mean, (low, high), seeds in zip(means, intervals, apart, strict=True)
    )
    return [(row, {column: next(found) for column in columns}) for row, columns in compared]


def columns_of(curve: Curve, table: RankTable) -> dict[Column, Scores]:
    """By rank and axis, the shown scores (seeds, documents), where all seeds have them."""
    found: dict[Column, Scores] = {}
    for rank, points in grouped(curve.points, "rank") if curve.seeds else ():
        scores = [_scores(*pair) for pair in zip(points["scores"], points["value"], strict=True)]
        kept = [seed for seed in scores if seed is not None]
        if len(kept) == curve.seeds:
            found[rank] = np.array(kept) * table.metric.scale
    if curve.kind == "curve" and tuple(found) == table.curve_ranks:
        of_ranks = np.stack(list(found.values()))
        for axis in AXES:
            found[axis] = np.tensordot(trapezoid_weights(table.curve_ranks, axis), of_ranks, 1)
    return found


def _scores(encoded: str | list[float] | None, value: float) -> list[float] | None:
    """The documents' scores if the value is their mean; a perplexity, say, is not."""
    if encoded is None:
        return None
    scores = decode_scores(encoded)
    mean = sum(scores) / len(scores)
    return scores if math.isclose(mean, value, rel_tol=1e-4, abs_tol=1e-6) else None
