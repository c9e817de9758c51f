"""How a trained adapter is read at a sub-rank: one function a rule.

A rule says which factors are read and with which diagonal. To add one, write a function here and
mark it `@rule`; the sweep, export, tables, plots and `--help` then have it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from matryoshka_lora.core.diagonals import check_rank, prefix_diagonal
from matryoshka_lora.core.errors import UserError, nearest
from matryoshka_lora.core.spec import AdapterSpec

FactorSet = Literal["trained", "svd"]
FACTOR_SETS: tuple[FactorSet, ...] = ("trained", "svd")
"""trained: the factors as training left them. svd: those of the full update's SVD, p = 1."""

BASE = "base"
"""The rule of rank 0, the base model without the adapter."""


Diagonal = Tensor | Mapping[str, Tensor]
"""p (R,), one for all layers, or layer -> its own (R,); float32, on the CPU."""
RankRule = tuple[int, str]
"""(rank, rule)."""


@dataclass(frozen=True, eq=False)
class Components:
    """The R components of a layer: row i of A, column i of B and the number between them."""

    size: int
    """Parameters that one of them takes, in + out."""
    importance: Tensor
    """(R,) float64, on the CPU: how much each matters."""
    live: Tensor
    """(R,) bool, on the CPU: whether it adds anything."""


@dataclass(frozen=True, eq=False)
class AdapterView:
    """What rules see of an adapter: its spec and, only where a rule asks for it, its components."""

    spec: AdapterSpec
    look: Callable[[FactorSet], Mapping[str, Components]] | None = None
    """Layer -> its components in a factor set; None where there is only a spec."""
    ranked: FactorSet = "svd"
    """The factor set whose components have an importance: singular values, or saved ones."""

    @cached_property
    def components(self) -> Mapping[str, Components]:
        """Layer -> its components in the factor set `ranked`, whose importance is known."""
        assert self.look is not None, "of a spec alone there are no components"
        return self.look(self.ranked)

    @cached_property
    def survived(self) -> int:
        """The most components that a layer has left: all of them, unless a gate turned some off."""
        if not self.spec.gated or self.look is None:
            return self.spec.rank
        layers = self.components if self.ranked == "trained" else self.look("trained")
        return max((int(layer.live.sum()) for layer in layers.values()), default=0)


@dataclass(frozen=True, eq=False)
class Reading:
    """Which factors are read, and with which diagonal."""

    factors: FactorSet
    p: Diagonal
    full: bool = False
    """Whether it leaves nothing out, so that it is the function of rank R."""


@dataclass(frozen=True)
class Rule:
    """A registered rule."""

    read: Callable[[AdapterView, int], Reading]
    cuts: bool
    """Whether it reads the first r components as training left them. Then it depends on S whether
    a rank was trained; other rules are valid at every rank."""
    drops_p: bool
    """Whether it puts another diagonal in the place of the trained one."""

    def refusal(self, spec: AdapterSpec, rank: int) -> str | None:
        """Why an adapter of this spec cannot be read so at this rank; None if it can."""
        if spec.ordered or not self.cuts or (rank == spec.rank and not self.drops_p):
            return None
        what = "drops the diagonal that was learned, and " if self.drops_p else ""
        return (
            f"it {what}reads the first {rank} of {spec.rank} components, but those of "
            f"{spec.method or 'this adapter'} stand in no order of rank"
        )


RULES: dict[str, Rule] = {}
"""By name, in the order of tables. Of several that are the same function the first is evaluated."""


def rule(
    *, cuts: bool = False, drops_p: bool = False
) -> Callable[[Callable[[AdapterView, int], Reading]], Callable[[AdapterView, int], Reading]]:
    """Make a function of the adapter and a rank 1..R selectable by its name."""

    def add(
        function: Callable[[AdapterView, int], Reading],
    ) -> Callable[[AdapterView, int], Reading]:
        # `global` is a word of the language, so its function is `global_`.
        RULES[function.__name__.rstrip("_")] = Rule(function, cuts, drops_p)
        return function

    return add


@rule(cuts=True, drops_p=True)
def prefix(adapter: AdapterView, rank: int) -> Reading:
    """s_r on the first r entries: the paper's inference, which drops the P of training."""
    spec = adapter.spec
    return Reading("trained", prefix_diagonal(rank, spec.rank, spec.scaling))


@rule(cuts=True)
def trained(adapter: AdapterView, rank: int) -> Reading:
    """The function that training used: p_full cut to r entries, or prefix(r)."""
    spec = adapter.spec
    if spec.trains_prefixes:
        return prefix(adapter, rank)
    return Reading("trained", _p_full(spec) * prefix_diagonal(rank, spec.rank, "none"))


@rule()
def svd(adapter: AdapterView, rank: int) -> Reading:
    """The r largest singular directions of the full update, p = 1."""
    p = prefix_diagonal(rank, adapter.spec.rank, "none")
    return Reading("svd", p, full=rank >= adapter.survived)


@rule()
def global_(adapter: AdapterView, rank: int) -> Reading:
    """The most important components of all layers, as many as r everywhere would have parameters.

    One threshold for all layers (PARA, arXiv 2604.27796, by singular values): components by falling
    importance, equal ones by the name of the layer and their index, up to the first that would
    make the sum of (in + out) larger than r times that of all layers.
    """
    layers = {name: adapter.components[name] for name in sorted(adapter.components)}
    importance = torch.stack([layer.importance for layer in layers.values()])
    live = torch.stack([layer.live for layer in layers.values()]).flatten()
    sizes = torch.tensor([layer.size for layer in layers.values()])
    order = importance.flatten().sort(descending=True, stable=True).indices
    order = order[live[order]]
    cost = sizes.repeat_interleave(adapter.spec.rank)[order].cumsum(0)
    chosen = order[cost <= rank * sizes.sum()]
    kept = torch.zeros(importance.numel(), dtype=torch.float32)
    kept[chosen] = 1
    p = torch.ones(adapter.spec.rank) if adapter.ranked == "svd" else _p_full(adapter.spec)
    rows = kept.view_as(importance) * p
    full = len(chosen) == len(order)
    return Reading(adapter.ranked, dict(zip(layers, rows, strict=True)), full)


def _p_full(spec: AdapterSpec) -> Tensor:
    return torch.tensor(spec.p_full, dtype=torch.float32)


def read(adapter: AdapterView, rank: int, rule: str) -> Reading:
    """What `rule` reads at `rank`; rank 0 is the base model under any rule.

    Raises UserError for an unknown rule, a rank outside 0..R, and a rule that this adapter cannot
    be read by at this rank.
    """
    check_rule(rule, rank)
    if rank == 0:
        return Reading("trained", torch.zeros(adapter.spec.rank, dtype=torch.float32))
    rules_at(adapter.spec, rank, [rule])
    return RULES[rule].read(adapter, rank)


def check_rule(rule: str, rank: int = 1) -> None:
    """Raises UserError unless there is such a rule; `base` is one at rank 0."""
    if rule not in RULES and not (rank == 0 and rule == BASE):
        raise UserError(
            f"inference rule {rule!r} is unknown; allowed: {', '.join(RULES)}{nearest(rule, RULES)}"
        )


def rules_at(spec: AdapterSpec, rank: int, asked: Sequence[str] | None = None) -> list[str]:
    """The rules that are asked for at a rank; None: all that an adapter of this spec allows there.

    Raises UserError for a rank outside 1..R, and a rule that is unknown or refused.
    """
    try:
        check_rank(rank, spec.rank)
    except UserError as error:
        raise UserError(f"{error}; allowed: 1 to {spec.rank}") from None
    refusals = {name: rule.refusal(spec, rank) for name, rule in RULES.items()}
    allowed = [name for name, reason in refusals.items() if reason is None]
    for name in asked or ():
        check_rule(name)
        if (reason := refusals[name]) is not None:
            raise UserError(
                f"rule {name} is refused at rank {rank}: {reason}; allowed there: "
                f"{', '.join(allowed)}"
            )
    return allowed if asked is None else list(asked)


def default_rule(spec: AdapterSpec, rank: int) -> str:
    """`trained` where this adapter can be read so at this rank, else `svd`, which is never refused.

    Raises UserError for a rank outside 1..R.
    """
    return "trained" if "trained" in rules_at(spec, rank) else "svd"


def depends_on_trained_ranks(rank: int, rule: str) -> bool:
    """Whether it matters to this reading which sub-ranks training visited."""
    return rank > 0 and RULES[rule].cuts


def evaluated_as(adapter: AdapterView, rank: int, rule: str) -> RankRule:
    """The reading that is evaluated in place of this one, since it is the same function.

    The first rule at the rank that is, or, where nothing is left out below rank R, the first at R.
    """
    function = _function(adapter, read(adapter, rank, rule))
    if function.full and rank < adapter.spec.rank:
        return evaluated_as(adapter, adapter.spec.rank, rule)
    for name in rules_at(adapter.spec, rank):
        if name == rule or _equal(_function(adapter, read(adapter, rank, name)), function):
            return rank, name
    raise AssertionError("a rule is itself")


def _function(adapter: AdapterView, reading: Reading) -> Reading:
    """The reading, in the trained factors where both sets give the same function."""
    if reading.full:
        return Reading("trained", _p_full(adapter.spec), full=True)
    if not isinstance(reading.p, Tensor):
        first, *others = reading.p.values()
        if all(torch.equal(first, other) for other in others):
            return Reading(reading.factors, first)
    return reading


def _equal(one: Reading, other: Reading) -> bool:
    return one.factors == other.factors and torch.equal(_rows(one.p), _rows(other.p))


def _rows(p: Diagonal) -> Tensor:
    """(1, R), or (layers, R) where each has its own."""
    return torch.stack([p] if isinstance(p, Tensor) else list(p.values()))
