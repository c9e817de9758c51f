"""Adapters against LoRAs trained for each rank alone: equivalent rank, ratio of losses, cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from matryoshka_lora.reporting.bootstrap import resampled_means
from matryoshka_lora.reporting.curves import Curve, RankTable, rank_tables
from matryoshka_lora.reporting.differences import REFERENCE_RULE, Scores, columns_of
from matryoshka_lora.reporting.names import is_baseline
from matryoshka_lora.runs.record import Record

FEWEST = 3
"""Dedicated LoRAs that make a curve."""


@dataclass(frozen=True)
class EquivalentRank:
    """The rank of a dedicated LoRA with an adapter's loss, and its 95 % bootstrap interval.

    0 is a loss above that of the smallest dedicated LoRA, infinity one below that of the largest.
    first, last: their ranks.
    """

    value: float
    low: float
    high: float
    first: int
    last: int

    def text(self) -> str:
        return f"{self._one(self.value)} [{self._one(self.low)}, {self._one(self.high)}]"

    def _one(self, rank: float) -> str:
        if rank == 0:
            return f"<{self.first}"
        return f">{self.last}" if math.isinf(rank) else f"{rank:.1f}"


@dataclass(frozen=True)
class Comparison:
    """A curve against the dedicated LoRAs, by rank.

    excess: 100 (loss / dedicated loss - 1), percent. cost: training tokens relative to one LoRA
    run, None where a record does not say.
    """

    curve: Curve
    excess: Mapping[int, float]
    equivalent: Mapping[int, EquivalentRank]
    cost: float | None


def comparisons(table: RankTable, records: Sequence[Record]) -> list[Comparison]:
    """Every curve of a table of losses; none where there are fewer than FEWEST dedicated LoRAs.

    records: those behind the table, for the cost.
    """
    dedicated = dedicated_scores(table)
    if len(dedicated) < FEWEST or len(table.documents) != 1 or not table.metric.lower_is_better:
        return []
    tokens = {record.name: (record.training or {}).get("tokens") for record in records}
    one = next((cost for row in _whole(table) if (cost := _tokens(row, tokens))), None)
    found = []
    for row in table.rows:
        if row.kind != "curve" or row.rule is None or row.same_as is not None:
            continue
        scores = {rank: s for rank, s in columns_of(row, table).items() if isinstance(rank, int)}
        if is_baseline(row.method_name) and row.rule != REFERENCE_RULE:
            continue  # is one of the dedicated LoRAs
        cost = _tokens(row, tokens)
        found.append(
            Comparison(
                row,
                {
                    rank: 100 * (s.mean() / dedicated[rank].mean() - 1)
                    for rank, s in scores.items()
                    if rank in dedicated
                },
                {rank: equivalent_rank(dedicated, s) for rank, s in scores.items()},
                cost / one if cost and one else None,
            )
        )
    return found


def dedicated_scores(table: RankTable) -> dict[int, Scores]:
    """By rank, the shown scores (seeds, documents) of the LoRA that was trained for it alone.

    A LoRA of the table's R counts, too: at R its rules are all the function that was trained.
    """
    found: dict[int, Scores] = {}
    for row in (*(row for row in table.rows if row.kind == "dedicated"), *_whole(table)):
        scores = columns_of(row, table).get(row.rank)
        if scores is not None and row.rank not in found:
            found[row.rank] = scores
    return dict(sorted(found.items()))


def equivalent_rank(
    dedicated: Mapping[int, Scores], ours: Scores, *, samples: int = 2000, seed: int = 0
) -> EquivalentRank:
    """The equivalent rank of `ours`, (seeds, documents), of one rank and rule.

    The interval is over documents, the same for all, and over the seeds of each.
    """
    ranks = [*dedicated]
    lines = [*dedicated.values(), ours]
    value = rank_at_loss(ranks, [line.mean() for line in lines[:-1]], float(ours.mean()))
    means = resampled_means(lines, samples=samples, seed=seed)
    drawn = [rank_at_loss(ranks, m[:-1].tolist(), float(m[-1])) for m in means.T]
    drawn.sort()  # not interpolated: there may be infinities
    low, high = drawn[int(0.025 * samples)], drawn[math.ceil(0.975 * samples) - 1]
    return EquivalentRank(value, low, high, ranks[0], ranks[-1])


def rank_at_loss(ranks: Sequence[int], losses: Sequence[float], loss: float) -> float:
    """Where the curve of losses over ranks, made monotone, has `loss`: interpolated over log2 rank.

    Ranks ascend; each loss counts as the lowest of it and those of smaller ranks. The smallest such
    rank; 0 where `loss` is above the curve, infinity where it is below.
    """
    envelope = np.minimum.accumulate(losses)
    if loss > envelope[0]:
        return 0.0
    if loss < envelope[-1]:
        return math.inf
    after = int(np.argmax(envelope <= loss))
    if after == 0:
        return float(ranks[0])
    above, below = envelope[after - 1], envelope[after]
    share = (above - loss) / (above - below)
    return float(ranks[after - 1] * (ranks[after] / ranks[after - 1]) ** share)


def format_comparisons(records: Sequence[Record], title: str) -> str:
    """Markdown: for each table of losses the excess over dedicated LoRAs and equivalent ranks.

    Empty where no table has curves to compare.
    """
    parts = [f"# {title}\n"]
    for table in rank_tables(records):
        found = comparisons(table, records)
        if not found:
            continue
        ranks = [*dedicated_scores(table)]
        total = _all_dedicated(table, records)
        parts.append(f"## {table.metric.label}\n")
        parts.append(
            "Loss above that of the LoRA trained for the rank alone, %; below it the rank of a "
            "dedicated LoRA with the adapter's loss, with its 95 % interval over seeds and "
            "documents. Cost: training tokens, one LoRA run being 1"
            + ("" if total is None else f"; the {len(ranks)} dedicated LoRAs take {total:.3g}")
            + ".\n"
        )
        header = ["method", "R", "scaling", "rule", "lr", "seeds", "cost", *map(str, ranks)]
        lines = [header, ["---"] * 4 + ["---:"] * (len(header) - 4)]
        for one in found:
            row = one.curve
            cost = "" if one.cost is None else f"{one.cost:.3g}"
            names = [row.method, str(row.rank), row.scaling, str(row.rule), f"{row.lr:g}"]
            excess = [f"{one.excess[rank]:+.1f}" if rank in one.excess else "–" for rank in ranks]
            equal = [
                one.equivalent[rank].text() if rank in one.equivalent else "–" for rank in ranks
            ]
            cells = ["<br>".join(pair) for pair in zip(excess, equal, strict=True)]
            lines.append([*names, str(row.seeds), cost, *cells])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts) if len(parts) > 1 else ""


def _whole(table: RankTable) -> list[Curve]:
    """Curves that read a LoRA of the table's R, those of another rule than its SVD first."""
    found = [row for row in table.rows if row.kind == "curve" and is_baseline(row.method_name)]
    return sorted(found, key=lambda row: row.rule == REFERENCE_RULE)


def _tokens(row: Curve, tokens: Mapping[str, float | None]) -> float | None:
    counts = [tokens.get(run) for run in dict.fromkeys(row.points["run"])] if row.seeds else []
    known = [count for count in counts if count]
    return sum(known) / len(known) if known and len(known) == len(counts) else None


def _all_dedicated(table: RankTable, records: Sequence[Record]) -> float | None:
    tokens = {record.name: (record.training or {}).get("tokens") for record in records}
    costs: dict[int, float] = {}
    for row in (*(row for row in table.rows if row.kind == "dedicated"), *_whole(table)):
        if (cost := _tokens(row, tokens)) is not None:
            costs.setdefault(row.rank, cost)
    return sum(costs.values()) / costs[max(costs)] if costs else None
