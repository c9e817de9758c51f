"""The plan of a sweep: which ranks are read under which rules, and which readings are one function.

A reading is a (rank, rule) that was asked for. A point is a function of the model that an engine
evaluates. Readings that are the same function share a point, which is evaluated once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import (
    BASE,
    AdapterView,
    RankRule,
    depends_on_trained_ranks,
    evaluated_as,
    read,
    rules_at,
)
from matryoshka_lora.evaluation.engines.protocol import Point
from matryoshka_lora.evaluation.rows import ReadingFields


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and which point answers for each reading that was asked for."""

    points: tuple[Point, ...]
    """Base model first, then as asked for; each function once."""
    readings: Mapping[RankRule, Point]
    """As asked for -> the point that answers."""
    train_ranks: tuple[int, ...]
    """S, the sub-ranks that training visited."""

    def trained_rank(self, reading: RankRule) -> bool | None:
        """Whether the rank is in S; None where S has no meaning (base model, svd)."""
        rank, rule = reading
        return rank in self.train_ranks if depends_on_trained_ranks(rank, rule) else None

    def same_as(self, reading: RankRule) -> str | None:
        """ "rule@rank" of the point that is evaluated in place of `reading`, if another one is."""
        point = self.readings[reading]
        return None if (point.rank, point.rule) == reading else f"{point.rule}@{point.rank}"

    def readings_of(self, point: Point) -> list[ReadingFields]:
        """Every reading that `point` answers for, as the fields of a row."""
        return [
            ReadingFields(
                rank=rank,
                rule=rule,
                same_as=self.same_as((rank, rule)),
                trained_rank=self.trained_rank((rank, rule)),
            )
            for (rank, rule), evaluated in self.readings.items()
            if evaluated is point
        ]


def plan_points(
    adapter: AdapterView,
    ranks: Sequence[int],
    rules: Sequence[str] | None,
    train_ranks: Sequence[int],
) -> Plan:
    """The base model and every rank under every rule; equal functions share a point.

    rules: None: all that the adapter allows at a rank. train_ranks: S, which only decides what
    `Row.trained_rank` says. Raises UserError for ranks or rules that the adapter does not have or
    that are repeated.
    """
    if not ranks or (rules is not None and not rules):
        raise UserError(f"a sweep needs ranks and rules; got ranks {ranks!r}, rules {rules!r}")
    for what, given in (("ranks", ranks), ("rules", rules or ())):
        if len(set(given)) < len(given):
            raise UserError(f"the {what} of the sweep are repeated: {list(given)}")
    base = _point(adapter, 0, BASE)
    points: dict[RankRule, Point] = {(0, BASE): base}
    readings = {(0, BASE): base}
    for rank in ranks:
        if rank == 0:
            raise UserError("rank 0 is the base model, which every sweep evaluates; leave it out")
        for rule in rules_at(adapter.spec, rank, rules):
            key = evaluated_as(adapter, rank, rule)
            readings[(rank, rule)] = points.setdefault(key, _point(adapter, *key))
    return Plan(tuple(points.values()), readings, tuple(train_ranks))


def _point(adapter: AdapterView, rank: int, rule: str) -> Point:
    reading = read(adapter, rank, rule)
    return Point(rank, rule, reading.factors, reading.p)
