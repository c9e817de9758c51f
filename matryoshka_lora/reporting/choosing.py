"""Which rank and rule of a run to use, by what its record holds of them."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matryoshka_lora.config import parse_task
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import RankRule, default_rule, rules_at
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.reporting.bootstrap import Estimate, bootstrap_intervals
from matryoshka_lora.reporting.curves import RankTable, run_tables
from matryoshka_lora.reporting.differences import columns_of
from matryoshka_lora.reporting.frame import Metric
from matryoshka_lora.reporting.names import rule_place
from matryoshka_lora.runs.record import Record

logger = logging.getLogger(__name__)

FEWEST = 20
"""Documents that an interval needs to mean anything."""
BYTES = 4
"""Of a parameter as export writes it, in float32."""
TOLERANCE = 1.0
"""How far a score may be behind the best: points, or percent of a loss."""


@dataclass(frozen=True)
class Point:
    """One reading and its score, in the unit of tables.

    scores: of the documents, (n,); None where the record holds none. same_as: the reading that is
    the same function, "rule@rank".
    """

    rank: int
    rule: str
    score: float
    scores: npt.NDArray[np.float64] | None
    same_as: str | None = None


@dataclass(frozen=True)
class Measured:
    """All readings of a run by one metric, by rank and then in the order of rules.

    base: the score of the model without the adapter; None where it was not measured.
    """

    metric: Metric
    base: float | None
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The one with the best score; of equal ones the first."""
        sign = 1 if self.metric.lower_is_better else -1
        return min(self.points, key=lambda point: sign * point.score)

    def minus(self, base: Point) -> list[Estimate]:
        """Each score minus that of `base`, paired by document, with its 95 % interval.

        The interval is None for readings that were not scored on the same documents.
        """
        paired = {
            place: point.scores - base.scores
            for place, point in enumerate(self.points)
            if point.scores is not None
            and base.scores is not None
            and point.scores.shape == base.scores.shape
        }
        ends = bootstrap_intervals(list(paired.values())).tolist() if paired else []
        intervals = dict(zip(paired, ends, strict=True))
        return [
            Estimate(point.score - base.score, *intervals.get(place, ()))
            for place, point in enumerate(self.points)
        ]


@dataclass(frozen=True)
class Candidate:
    """A reading that may be chosen.

    behind: its score minus that of the best. enough: whether, at the worse end of the interval, it
    is within the tolerance.
    """

    point: Point
    parameters: int
    behind: Estimate
    enough: bool

    @property
    def megabytes(self) -> float:
        """Of the exported file, 10^6 bytes."""
        return self.parameters * BYTES / 1e6


@dataclass(frozen=True)
class Choice:
    """All distinct readings that fit the budget, the best of them and the one to take."""

    metric: Metric
    documents: int
    base: float | None
    candidates: tuple[Candidate, ...]
    best: Candidate
    chosen: Candidate

    @property
    def table(self) -> str:
        """Plain text, a line a candidate: `*` those within the tolerance, `>` the chosen one."""
        head = ["", "rank", "rule", "parameters", "MB", "score", "minus the best [95 %]"]
        lines = [head]
        for each in self.candidates:
            lines.append(
                [
                    (">" if each is self.chosen else " ") + ("*" if each.enough else " "),
                    str(each.point.rank),
                    each.point.rule,
                    f"{each.parameters:,}",
                    f"{each.megabytes:.3g}",
                    self.metric.text(each.point.score),
                    "the best" if each is self.best else difference_text(self.metric, each.behind),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        title = f"{self.metric.label} [{self.metric.unit}], {self.documents} documents"
        if self.base is not None:
            title += f", base model {self.metric.text(self.base)}"
        text = [title]
        for line in lines:
            cells = zip(line, widths, strict=True)
            padded = [
                cell.ljust(width) if place in (0, 2, 6) else cell.rjust(width)
                for place, (cell, width) in enumerate(cells)
            ]
            text.append("  ".join(padded).rstrip())
        return "\n".join(text)


def difference_text(metric: Metric, difference: Estimate) -> str:
    """`-1.2 [-2.0, -0.4]` with the digits of the metric."""
    digits = metric.digits
    # + 0.0 turns -0.0 into 0.0.
    return difference.text(
        lambda x: f"{round(x, digits) + 0.0:+.{digits}f}",
        lambda x: f"{round(x, digits) + 0.0:.{digits}f}",
    )


def measured(record: Record, metric: str | None = None) -> Measured | None:
    """The readings by the first metric of the run's tables whose label contains `metric`.

    One that has scores of documents goes before one that has none, and the run's own tasks before
    those that scripts/evaluate.py has added. None: its main metric, or nothing where the record
    holds no scores at all. Raises UserError where no label contains it.
    """
    own = {parse_task(text) for text in record.config["eval"]["tasks"]}
    tables = sorted(
        run_tables(record), key=lambda table: (table.metric.task, table.metric.shots) not in own
    )
    found = [_measured(table) for table in tables if (metric or "") in table.metric.label]
    if not found and metric is not None:
        labels = "; ".join(table.metric.label for table in tables) or "nothing"
        raise UserError(f"metric={metric} is in no label of {record.name}; there is: {labels}")
    found = [one for one in found if one.points]
    scored = [one for one in found if all(point.scores is not None for point in one.points)]
    return next(iter([*scored, *found]), None)


def _measured(table: RankTable) -> Measured:
    points = []
    for curve in table.rows:
        if curve.kind != "curve" or curve.rule is None:
            continue
        columns = columns_of(curve, table)
        same_as = dict(zip(curve.points["rank"], curve.points["same_as"], strict=True))
        for rank, cell in curve.cells.items():
            scores = columns[rank][0] if rank in columns else None
            points.append(Point(rank, curve.rule, cell.mean, scores, same_as[rank]))
    points.sort(key=lambda point: (point.rank, rule_place(point.rule)))
    return Measured(table.metric, _base(table), tuple(points))


def _base(table: RankTable) -> float | None:
    return next((row.cells[0].mean for row in table.rows if row.kind == "base"), None)


def scores_at(
    record: Record, rank: int, rule: str
) -> list[tuple[Metric, int, float | None, float]]:
    """By each metric: documents, the base model's score (None: not measured), and the reading's."""
    found = []
    for table in run_tables(record):
        for row in table.rows:
            if row.rule == rule and rank in row.cells:
                documents = dict(zip(row.points["rank"], row.points["n"], strict=True))[rank]
                found.append((table.metric, documents, _base(table), row.cells[rank].mean))
    return found


def choose(
    record: Record,
    sizes: Mapping[RankRule, int],
    *,
    budget: float | None = None,
    tolerance: float | None = None,
    metric: str | None = None,
) -> Choice:
    """The smallest reading that is, by the record, as good as the best but for `tolerance`.

    Of all readings that have at most `budget` parameters: the best, or, with a tolerance (without a
    budget: TOLERANCE), the smallest rank, and of its rules the best, whose score is within it at
    the worse end of the 95 % interval of its paired difference from the best. The best is chosen on
    the same documents, so it looks a little better than it is. sizes: the parameters of each
    reading; those without are left out. metric: as for `measured`.
    Raises UserError for a run that is not finished, one whose record does not hold the scores of
    FEWEST documents, the same for all readings, a tolerance below 0, and where nothing fits.
    """
    if record.status != "finished":
        raise UserError(
            f"{record.name} has not finished (status {record.status}); run its command again first"
        )
    if tolerance is not None and not tolerance >= 0:
        raise UserError(f"tolerance={tolerance:g} must be 0 or more")
    found = measured(record, metric)
    if found is None:
        raise UserError(
            f"the record of {record.name} holds no scores at any rank; "
            "scripts/evaluate.py run=FOLDER eval=... adds them"
        )
    _check_scored(record, found)
    distinct = [point for point in _distinct(found.points) if (point.rank, point.rule) in sizes]
    fitting = [
        point for point in distinct if budget is None or sizes[point.rank, point.rule] <= budget
    ]
    if not fitting:
        least = min(distinct, key=lambda point: sizes[point.rank, point.rule])
        need = sizes[least.rank, least.rule]
        raise UserError(
            f"nothing fits {budget:,.0f} parameters ({(budget or 0) * BYTES / 1e6:.3g} MB): the "
            f"smallest reading in the record, rank {least.rank} by {least.rule}, has {need:,} "
            f"({need * BYTES / 1e6:.3g} MB)"
        )
    found = dataclasses.replace(found, points=tuple(fitting))
    best = found.best
    allowed = TOLERANCE if tolerance is None else tolerance
    if found.metric.lower_is_better:
        allowed *= best.score / 100
    candidates = []
    for point, behind in zip(found.points, found.minus(best), strict=True):
        assert behind.low is not None and behind.high is not None
        worst = behind.high if found.metric.lower_is_better else -behind.low
        enough = point is best or worst <= allowed + 1e-9
        candidates.append(Candidate(point, sizes[point.rank, point.rule], behind, enough))
    (winner,) = (each for each in candidates if each.point is best)
    assert best.scores is not None
    documents, sign = len(best.scores), 1 if found.metric.lower_is_better else -1
    chosen = winner
    if budget is None or tolerance is not None:
        chosen = min(
            (each for each in candidates if each.enough),
            key=lambda each: (each.point.rank, sign * each.point.score),
        )
        _warn_of_few(documents, found.metric, allowed)
    if found.base is not None and sign * (best.score - found.base) >= 0:
        logger.warning(
            "no reading is better than the model without the adapter: %s against %s by %s",
            *(found.metric.text(best.score), found.metric.text(found.base), found.metric.label),
        )
    return Choice(found.metric, documents, found.base, tuple(candidates), winner, chosen)


def _warn_of_few(documents: int, metric: Metric, allowed: float) -> None:
    """Say where equal scores on all documents, whose interval is [0, 0], do not show enough.

    Of answers that are right or wrong: that none of n differs has a probability of 2.5 % still
    where 1 - 0.025^(1/n) of all answers do.
    """
    unseen = 100 * (1 - 0.025 ** (1 / documents))
    if not metric.lower_is_better and unseen > allowed:
        logger.warning(
            "with %d documents, scores that are equal on all of them may still be %.1f points "
            "apart, more than the tolerance of %g; a larger eval.limit tells more",
            *(documents, unseen, allowed),
        )


def _distinct(points: Sequence[Point]) -> list[Point]:
    """Without those that are another reading of the same rank by another name."""
    names = {f"{point.rule}@{point.rank}" for point in points}
    return [
        point
        for point in points
        if point.same_as not in names or point.same_as.rpartition("@")[2] != str(point.rank)
    ]


def _check_scored(record: Record, found: Measured) -> None:
    """Raise UserError unless all readings were scored on the same FEWEST documents or more."""
    without = [point for point in found.points if point.scores is None]
    if without:
        raise UserError(
            f"the record of {record.name} holds no scores of single documents by "
            f"{found.metric.label} (rank {without[0].rank}, {without[0].rule}), which an interval "
            "needs; give another metric=, or scripts/evaluate.py adds a task"
        )
    counts = sorted({len(point.scores) for point in found.points if point.scores is not None})
    if len(counts) > 1:
        raise UserError(
            f"the readings of {record.name} are over different numbers of documents by "
            f"{found.metric.label} ({', '.join(map(str, counts))}), so they cannot be paired; "
            "give another metric="
        )
    if counts[0] < FEWEST:
        raise UserError(
            f"the record of {record.name} holds {counts[0]} documents of {found.metric.label}; an "
            f"interval needs {FEWEST} or more: evaluate it with a larger eval.limit"
        )


def rule_for(record: Record, spec: AdapterSpec, rank: int, asked: str | None = None) -> str:
    """The rule to read a run's adapter by at a rank: `asked`, or the one its record shows best.

    Best by the main metric. Where the record has no scores at the rank it is `default_rule`, which
    also goes before its equals: a weak adapter may have accuracy 0 by every rule. A log line says
    which and why; a warning says where the asked rule is significantly worse (the 95 % interval of
    the paired difference is without 0).
    Raises UserError for a rank outside 1..R and a rule that is unknown or refused.
    """
    rules = rules_at(spec, rank)
    if asked is not None:
        rules_at(spec, rank, [asked])
    everything = measured(record)
    here = [
        point
        for point in ([] if everything is None else everything.points)
        if point.rank == rank and point.rule in rules
    ]
    if everything is None or not here:
        rule = default_rule(spec, rank) if asked is None else asked
        if asked is None:
            logger.info("rule=%s: the record holds no scores at rank %d", rule, rank)
        return rule
    here.sort(key=lambda point: point.rule != default_rule(spec, rank))
    metric, found = everything.metric, dataclasses.replace(everything, points=tuple(here))
    best = found.best
    if asked is None:
        scores = ", ".join(f"{point.rule} {metric.text(point.score)}" for point in found.points)
        logger.info(
            "rule=%s is the best at rank %d by %s in the record (%s; unit %s)",
            *(best.rule, rank, metric.label, scores, metric.unit),
        )
        return best.rule
    for point, gap in zip(found.points, found.minus(best), strict=True):
        if point.rule != asked or gap.low is None or gap.high is None:
            continue
        if gap.low > 0 or gap.high < 0:
            logger.warning(
                "rule=%s is significantly worse than rule=%s at rank %d by %s: %s against %s, "
                "difference %s (95 %% interval; unit %s)",
                *(asked, best.rule, rank, metric.label, metric.text(point.score)),
                *(metric.text(best.score), difference_text(metric, gap), metric.unit),
            )
    return asked
