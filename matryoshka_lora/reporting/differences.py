"""How far each curve is above or below what it has to beat, problem by problem."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from matryoshka_lora.evaluation.rows import decode_scores
from matryoshka_lora.reporting.aurac import AXES, Axis, trapezoid_weights
from matryoshka_lora.reporting.bootstrap import bootstrap_intervals, interval, resampled_means
from matryoshka_lora.reporting.curves import Curve, RankTable
from matryoshka_lora.reporting.frame import grouped
from matryoshka_lora.reporting.names import is_baseline

Scores = npt.NDArray[np.float64]
Column = int | Axis

REFERENCE_RULE = "svd"
"""Read from a plain LoRA it needs no method of its own, so it is what a method has to beat."""


@dataclass(frozen=True)
class Reference:
    """What others are compared with, and the mark of a difference from it that holds.

    rows: by column the row that stands there.
    """

    name: str
    mark: str
    rows: Mapping[Column, Curve]


@dataclass(frozen=True)
class Difference:
    """Mean over documents and its 95 % bootstrap interval over them, in the unit of the table.

    holds: 0 lies outside of it, as printed, and of the interval over seeds and documents.
    """

    mean: float
    low: float
    high: float
    holds: bool


def references(table: RankTable) -> list[Reference]:
    """The SVD of a plain LoRA, unless there are several, and the LoRAs that were trained for a rank
    alone."""
    found = []
    if len(bases := svd_of_lora(table)) == 1:
        (base,) = bases
        name = f"{base.method} {base.rule} (seeds: {base.seeds})"
        found.append(Reference(name, "★", dict.fromkeys(columns_of(base, table), base)))
    if rows := dedicated_rows(table):
        name = "the LoRA trained for the rank alone"
        found.append(Reference(name, "☆", dict[Column, Curve](rows.items())))
    return found


def svd_of_lora(table: RankTable) -> list[Curve]:
    """The curves of plain LoRAs by their SVD; with several there is nothing to choose by."""
    return [
        row
        for row in table.rows
        if row.kind == "curve" and is_baseline(row.method_name) and row.rule == REFERENCE_RULE
    ]


def dedicated_rows(table: RankTable, content: frozenset[Any] | None = None) -> dict[int, Curve]:
    """By rank, the LoRA that was trained for it alone: of several rates the best.

    content: of those that were made from this; None: of all.

    Where one was, a LoRA of the table's R that was read at all ranks stands for R, if no other
    does: there its rules are all the function that was trained.
    """
    made = [row for row in table.rows if content is None or row.content == content]
    alone = [row for row in made if row.kind == "dedicated"]
    whole = [row for row in made if row.kind == "curve" and is_baseline(row.method_name)]
    sign = 1 if table.metric.lower_is_better else -1
    found: dict[int, Curve] = {}
    for rows in (alone, whole if alone else []):
        known = [row for row in rows if row.rank in row.cells and row.rank not in found]
        for row in sorted(known, key=lambda row: sign * row.cells[row.rank].mean):
            found.setdefault(row.rank, row)
    return dict(sorted(found.items()))


def differences(
    table: RankTable, reference: Reference
) -> list[tuple[Curve, dict[Column, Difference]]]:
    """Curves and dedicated LoRAs, each minus the reference at the ranks and axes of both.

    Left out are values that are not the mean of documents' scores in the records, pairs that were
    not trained on the same records or read on the same documents, and all of a table whose values
    are over different documents.
    """
    if len(table.documents) != 1:
        return []
    scores = {id(row): columns_of(row, table) for row in table.rows}
    pairs: list[tuple[Curve, Column, Scores, Scores]] = []
    for row in table.rows:
        for column, base in reference.rows.items():
            if base is row or base.content != row.content:
                continue
            ours, theirs = scores[id(row)].get(column), scores[id(base)].get(column)
            if ours is not None and theirs is not None:
                pairs.append((row, column, ours, theirs))
    if not pairs:
        return []
    gaps = [ours.mean(axis=0) - theirs.mean(axis=0) for *_, ours, theirs in pairs]
    over_documents = bootstrap_intervals(gaps).tolist()
    drawn = resampled_means([line for *_, ours, theirs in pairs for line in (ours, theirs)])
    over_seeds = map(interval, drawn[::2] - drawn[1::2])
    found: dict[int, tuple[Curve, dict[Column, Difference]]] = {}
    for (row, column, *_), gap, (low, high), seeds in zip(
        pairs, gaps, over_documents, over_seeds, strict=True
    ):
        holds = all(_excludes_zero(table, ends) for ends in ((low, high), seeds))
        _, cells = found.setdefault(id(row), (row, {}))
        cells[column] = Difference(float(gap.mean()), low, high, holds)
    return list(found.values())


def _excludes_zero(table: RankTable, ends: tuple[float, float]) -> bool:
    low, high = (round(end, table.metric.digits) for end in ends)
    return low > 0 or high < 0


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
