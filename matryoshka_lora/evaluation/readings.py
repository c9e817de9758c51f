"""The plan of a sweep: which ranks are read under which rules, and which readings are one function.

A reading is a (rank, rule) that was asked for. A point is a function of the model that an engine
evaluates. Readings that are the same function share a point, which is evaluated once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import BASE, read, same_as
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.evaluation.engines.protocol import Point
from matryoshka_lora.evaluation.rows import ReadingFields

RankRule = tuple[int, str]
"""(rank, rule) as asked for."""


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and which point answers for each reading that was asked for."""

    points: tuple[Point, ...]
    """Base model first, then as asked for; each function once."""
    readings: Mapping[RankRule, Point]
    train_ranks: tuple[int, ...]
    """S, the sub-ranks that training visited."""
    spec: AdapterSpec

    def trained_rank(self, reading: RankRule) -> bool | None:
        """Whether the rank is in S; None where S has no meaning (base model, svd)."""
        rank, rule = reading
        if rank == 0 or read(self.spec, rank, rule).factors != "trained":
            return None
        return rank in self.train_ranks

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
    spec: AdapterSpec, ranks: Sequence[int], rules: Sequence[str], train_ranks: Sequence[int]
) -> Plan:
    """The base model and every rank under every rule; equal functions share a point.

    train_ranks: S, which only decides what `Row.trained_rank` says. Raises UserError for ranks or
    rules that the adapter does not have or that are repeated.
    """
    if not ranks or not rules:
        raise UserError(f"a sweep needs ranks and rules; got ranks {ranks!r}, rules {rules!r}")
    for what, given in (("ranks", ranks), ("rules", rules)):
        if len(set(given)) < len(given):
            raise UserError(f"the {what} of the sweep are repeated: {list(given)}")
    base = _point(spec, 0, BASE)
    points: dict[RankRule, Point] = {(0, BASE): base}
    readings = {(0, BASE): base}
    for rank in ranks:
        if rank == 0:
            raise UserError("rank 0 is the base model, which every sweep evaluates; leave it out")
        for rule in rules:
            key = (rank, same_as(spec, rank, rule) or rule)  # checks both
            readings[(rank, rule)] = points.setdefault(key, _point(spec, *key))
    return Plan(tuple(points.values()), readings, tuple(train_ranks), spec)


def _point(spec: AdapterSpec, rank: int, rule: str) -> Point:
    reading = read(spec, rank, rule)
    return Point(rank, rule, reading.factors, reading.p)
