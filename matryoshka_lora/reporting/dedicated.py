"""Adapters against LoRAs trained for each rank alone: equivalent rank, ratio of losses, cost."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from matryoshka_lora.reporting.bootstrap import Estimate, interval, resampled_means
from matryoshka_lora.reporting.curves import Curve, RankTable
from matryoshka_lora.reporting.differences import Scores, columns_of, dedicated_rows, svd_of_lora
from matryoshka_lora.reporting.grids import (
    HOLE,
    Grid,
    row_header,
    row_names,
    row_settings,
    write_csv,
    write_grids,
)
from matryoshka_lora.reporting.names import is_baseline
from matryoshka_lora.runs.record import Record

FEWEST = 3
"""Dedicated LoRAs that make a curve."""


@dataclass(frozen=True)
class Comparison:
    """A curve against the dedicated LoRAs, by rank.

    excess: 100 (loss / dedicated loss - 1), percent. equivalent: the rank of a dedicated LoRA with
    the same loss, see `rank_at_loss`. cost: training tokens relative to one LoRA run, None where a
    record does not say.
    """

    curve: Curve
    excess: Mapping[int, Estimate]
    equivalent: Mapping[int, Estimate]
    cost: float | None


@dataclass(frozen=True)
class Comparisons:
    """The curves of a table of losses against its dedicated LoRAs.

    dedicated: by rank. cost: of all of them together. unit: the epochs of the LoRA run whose tokens
    are 1, the longest of the table's R. scored: whether there are documents' scores, and intervals.
    """

    table: RankTable
    dedicated: Mapping[int, Curve]
    cost: float | None
    unit: float | None
    scored: bool
    curves: Sequence[Comparison]

    @property
    def legend(self) -> str:
        """What intervals and cost are, for a caption."""
        known = (
            "In brackets 95 % intervals over problems and seeds; with one seed, a row's spread "
            "between seeds is not in them"
        )
        unknown = "Without intervals, as the records hold no scores of single problems"
        return (
            f"{known if self.scored else unknown}. Cost: training tokens, one LoRA run of "
            f"{self.unit:g} epochs being 1"
        )

    def rank_text(self, equivalent: Estimate) -> str:
        """An equivalent rank and its interval as tables print them."""
        ends = (equivalent.value, equivalent.low, equivalent.high)
        if ends in ((0, 0, 0), (math.inf,) * 3):
            return self._rank(equivalent.value)  # no resample comes to the curve
        return equivalent.text(self._rank, self._rank)

    def _rank(self, rank: float) -> str:
        if rank == 0:
            return f"<{min(self.dedicated)}"
        return f">{max(self.dedicated)}" if math.isinf(rank) else f"{rank:.1f}"


def compare(table: RankTable, records: Sequence[Record]) -> list[Comparisons]:
    """One for each set of training records, whose rows are compared with each other alone.

    None of a set that has fewer than FEWEST dedicated LoRAs with losses, or no curve beside them.
    The intervals are over problems, the same for all rows, and over the seeds of each row. records:
    those behind the table, for the cost.
    """
    if table.metric.metric != "loss" or len(table.documents) != 1:
        return []
    contents = dict.fromkeys(row.content for row in table.rows if row.kind == "dedicated")
    made = (_compare(table, records, content) for content in contents)
    return [one for one in made if one is not None]


def _compare(
    table: RankTable, records: Sequence[Record], content: frozenset[Any]
) -> Comparisons | None:
    dedicated = dedicated_rows(table, content)
    if len(dedicated) < FEWEST:
        return None
    curves = [
        row
        for row in table.rows
        if row.kind == "curve"
        and row.seeds
        and row.same_as is None
        and row.content == content
        and not (is_baseline(row.method_name) and row.cells.keys() == {row.rank})
    ]
    if not curves:
        return None
    ranks = [*dedicated]
    places = [*((row, rank) for rank, row in dedicated.items())]
    places += [(row, rank) for row in curves for rank in row.cells]
    means = np.array([[row.cells[rank].mean] for row, rank in places])
    drawn = _resampled(places, table)
    scored = drawn.keys() >= set(range(len(ranks)))
    of_ranks = np.stack([drawn[number] for number in range(len(ranks))]) if scored else None

    def estimate(number: int, quantity: Callable[[Scores, Scores], Scores]) -> Estimate:
        """Of a quantity of the dedicated losses, (ranks, n), and the losses of a place, (n,)."""
        (value,) = quantity(means[: len(ranks)], means[number]).tolist()
        if of_ranks is None or number not in drawn:
            return Estimate(value)
        return Estimate(value, *interval(quantity(of_ranks, drawn[number])))

    tokens = {record.name: (record.training or {}).get("tokens") for record in records}
    loras = [row for row in svd_of_lora(table) if row.content == content]
    unit = max((*loras, dedicated[ranks[-1]]), key=lambda row: row.epochs or 0)
    one = _tokens(unit, tokens)

    def cost(*rows: Curve) -> float | None:
        spent = [each for row in rows if (each := _tokens(row, tokens)) is not None]
        return sum(spent) / one if one and len(spent) == len(rows) else None

    numbers = itertools.count(len(ranks))
    compared = []
    for row in curves:
        at = dict(zip(row.cells, numbers, strict=False))
        excess = {r: estimate(at[r], partial(_excess, ranks.index(r))) for r in ranks if r in at}
        equivalent = {r: estimate(n, partial(rank_at_loss, ranks)) for r, n in at.items()}
        compared.append(Comparison(row, excess, equivalent, cost(row)))
    total = cost(*dedicated.values())
    return Comparisons(table, dedicated, total, unit.epochs, scored, compared)


def _resampled(places: Sequence[tuple[Curve, int]], table: RankTable) -> dict[int, Scores]:
    """By number, the resampled mean losses of each row at a rank; not where scores are missing."""
    rows = {id(row): row for row, _ in places}
    scores = {key: columns_of(row, table) for key, row in rows.items()}
    lines = {n: scores[id(row)].get(rank) for n, (row, rank) in enumerate(places)}
    known = {number: line for number, line in lines.items() if line is not None}
    if not known:
        return {}
    return dict(zip(known, resampled_means([*known.values()], positive=True), strict=True))


def _excess(place: int, losses: Scores, loss: Scores) -> Scores:
    return 100 * (loss / losses[place] - 1)


def _tokens(row: Curve, tokens: Mapping[str, float | None]) -> float | None:
    """Mean over seeds; None where a record does not say."""
    counts = [tokens.get(run) for run in dict.fromkeys(row.points["run"])]
    known = [count for count in counts if count]
    return sum(known) / len(known) if known and len(known) == len(counts) else None


def rank_at_loss(
    ranks: Sequence[int], losses: npt.ArrayLike, loss: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Where the curve of losses over ranks, made monotone, has `loss`: interpolated over log2 rank.

    losses: (ranks, ...), loss (...) and the result (...). Ranks ascend; each loss counts as the
    lowest of it and those of smaller ranks. The smallest such rank; 0 where `loss` is above the
    curve, infinity where it is below.
    """
    envelope = np.minimum.accumulate(np.asarray(losses, dtype=np.float64), axis=0)
    first, last, given = envelope[0], envelope[-1], np.asarray(loss, dtype=np.float64)
    inside = np.clip(given, last, first)
    after = np.argmax(envelope <= inside, axis=0)
    before = np.maximum(after - 1, 0)
    above, below = (np.take_along_axis(envelope, at[None], 0)[0] for at in (before, after))
    gap = np.where(above > below, above - below, 1.0)
    steps = np.log2(np.asarray(ranks, dtype=np.float64))
    place = steps[before] + (steps[after] - steps[before]) * (above - inside) / gap
    slack = 1e-9 * np.abs(given)  # a dedicated LoRA is on the curve, however its mean was rounded
    return np.where(given > first + slack, 0.0, np.where(given < last - slack, np.inf, 2.0**place))


def write_comparisons(found: Sequence[Comparisons], stem: Path, title: str) -> list[Path]:
    """Write `<stem>.csv`, `.md` and `.tex`: excess over dedicated LoRAs and equivalent ranks."""
    if not found:
        return []
    csv = write_csv(pd.DataFrame([line for one in found for line in _csv_lines(one)]), stem)
    grids = []
    for metric, group in itertools.groupby(found, key=lambda one: one.table.metric):
        sets = [*group]
        for number, one in enumerate(sets, 1):
            of = f", training set {number} of {len(sets)}" if len(sets) > 1 else ""
            grids.append(_grid(one, f"{metric.label}{of}"))
    return [csv, *write_grids(grids, stem, title)]


def percent_text(excess: Estimate) -> str:
    """An excess, in percent, and its interval as tables print them."""
    # + 0.0 turns -0.0 into 0.0.
    return excess.text(lambda x: f"{round(x, 1) + 0.0:+.1f}", lambda x: f"{round(x, 1) + 0.0:.1f}")


def cost_text(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.2g}"


def _csv_lines(one: Comparisons) -> Iterator[dict[str, Any]]:
    metric = one.table.metric
    for compared in one.curves:
        row = compared.curve
        for rank, cell in row.cells.items():
            line = {
                "task": metric.task,
                "shots": metric.shots,
                "limit": metric.limit,
                "metric": metric.metric,
                **row_settings(row),
                "cost": compared.cost,
                "rank": rank,
                "mean": cell.mean,
            }
            for name, found in (("excess", compared.excess), ("equivalent", compared.equivalent)):
                estimate = found.get(rank, Estimate(math.nan))
                line |= {f"{name} {key}": value for key, value in vars(estimate).items()}
            yield line


def _grid(one: Comparisons, title: str) -> Grid:
    """A line a curve, at each rank the excess above the equivalent rank."""
    table = one.table
    ranks = [*one.dedicated]
    lines = []
    for compared in one.curves:
        cells = []
        for rank in ranks:
            parts = []
            if rank in compared.excess:
                parts.append(percent_text(compared.excess[rank]))
            if rank in compared.equivalent:
                parts.append(one.rank_text(compared.equivalent[rank]))
            cells.append("\n".join(parts) or HOLE)
        lines.append([*row_names(table, compared.curve), cost_text(compared.cost), *cells])
    total = "" if one.cost is None else f"; the {len(ranks)} dedicated LoRAs take {one.cost:.2g}"
    return Grid(
        title,
        "First line: loss above that of the LoRA trained for the rank alone, %. Second: the rank "
        "of a dedicated LoRA with the adapter's loss, read off their monotone curve over log2 "
        f"rank. {one.legend}{total}",
        [*row_header(table), "cost", *map(str, ranks)],
        lines,
    )
