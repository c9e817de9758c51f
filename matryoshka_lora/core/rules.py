"""How a trained adapter is read at a sub-rank: one function a rule.

A rule says which factors are read and with which diagonal. To add one, write a function here and
mark it `@rule`; the sweep, export, tables, plots and `--help` then have it.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Reading:
    """Which factors are read, and with which diagonal p (R,), float32, on the CPU."""

    factors: FactorSet
    p: Tensor


Rule = Callable[[AdapterSpec, int], Reading]
RULES: dict[str, Rule] = {}
"""By name, in the order of tables. Of rules that are one function the first stands for all."""


def rule(function: Rule) -> Rule:
    """Make a function of the spec and a rank 1..R selectable by its name."""
    RULES[function.__name__] = function
    return function


@rule
def prefix(spec: AdapterSpec, rank: int) -> Reading:
    """s_r on the first r entries: the paper's inference, which drops the P of training."""
    return Reading("trained", prefix_diagonal(rank, spec.rank, spec.scaling))


@rule
def trained(spec: AdapterSpec, rank: int) -> Reading:
    """The function that training used: p_full cut to r entries, or prefix(r)."""
    if spec.trains_prefixes:
        return prefix(spec, rank)
    return Reading(
        "trained",
        torch.tensor(spec.p_full, dtype=torch.float32) * prefix_diagonal(rank, spec.rank, "none"),
    )


@rule
def svd(spec: AdapterSpec, rank: int) -> Reading:
    """The r largest singular directions of the full update, p = 1."""
    return Reading("svd", prefix_diagonal(rank, spec.rank, "none"))


def read(spec: AdapterSpec, rank: int, rule: str) -> Reading:
    """What `rule` reads at `rank`; rank 0 is the base model under any rule.

    Raises UserError for an unknown rule or a rank outside 0..R.
    """
    check_rule(rule, rank)
    if rank == 0:
        return Reading("trained", torch.zeros(spec.rank, dtype=torch.float32))
    check_rank(rank, spec.rank)
    return RULES[rule](spec, rank)


def check_rule(rule: str, rank: int = 1) -> None:
    """Raises UserError unless there is such a rule; `base` is one at rank 0."""
    if rule not in RULES and not (rank == 0 and rule == BASE):
        raise UserError(
            f"inference rule {rule!r} is unknown; allowed: {', '.join(RULES)}{nearest(rule, RULES)}"
        )


def same_as(spec: AdapterSpec, rank: int, rule: str) -> str | None:
    """The first rule that is the same function at `rank`, and is evaluated in place of `rule`.

    None where that is `rule` itself.
    """
    function = _function(spec, read(spec, rank, rule))
    for name in RULES:
        if name == rule:
            return None
        other = _function(spec, read(spec, rank, name))
        if other.factors == function.factors and torch.equal(other.p, function.p):
            return name
    return None


def _function(spec: AdapterSpec, reading: Reading) -> Reading:
    """The reading, in the trained factors where both sets give the same function."""
    if reading.factors == "svd" and bool((reading.p == 1).all()):
        return Reading("trained", torch.tensor(spec.p_full, dtype=torch.float32))
    return reading
