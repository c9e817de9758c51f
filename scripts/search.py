"""Choosing the learning rate: every candidate on one seed, compared by its held-out loss.

Where a grid has several learning rates, each (method, R, scaling) first trains with each of them on
the first seed, with HELD_OUT of the training records held out. The lowest held-out loss wins: the
mean over the ranks that the method trains for (a baseline: its own R alone) under the rule
`trained`, or under `prefix` where the table reads that and not `trained`. A training that diverges
has lost.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matryoshka_lora import methods
from matryoshka_lora.config import Config, adapter_spec_of
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.runs.record import Record

HELD_OUT = 0.05
MOST_RATES = 10
"""Of one training: a search that goes on beyond them has gone astray."""

Candidate = TypeVar("Candidate")


def search_settings(config: Config) -> dict[str, Any]:
    """What a candidate's settings, by key, have in place of those of `config`, a final run."""
    reads = config.eval.rules or ()
    ordered = adapter_spec_of(config).ordered
    alone = methods.get(config.method.name).baseline or not ordered
    return {
        "dataset.validation": HELD_OUT,
        "eval.tasks": [],
        "eval.rules": ["prefix" if "trained" not in reads and "prefix" in reads else "trained"],
        "eval.ranks": [config.adapter.rank] if alone else config.train_ranks,
    }


def held_out_loss(record: Record, rule: str, ranks: Sequence[int], path: Path | str) -> float:
    """The mean held-out loss, in nats a token, of a finished candidate under `rule` over `ranks`.

    Raises UserError naming `path`, the record's file, where one of them is missing.
    """
    found = {
        row.rank: row.value
        for row in record.rows
        if (row.task, row.metric, row.rule) == ("validation", "loss", rule)
    }
    losses = [loss for rank in ranks if (loss := found.get(rank)) is not None]
    if len(losses) < len(ranks):
        raise UserError(
            f"{path} is finished, but lacks the held-out loss under rule {rule} at ranks {ranks}; "
            "move the folder away to run it again"
        )
    return statistics.fmean(losses)


def best(losses: Mapping[Candidate, float | None]) -> Candidate | None:
    """The candidate of the lowest loss, the first of equal ones.

    losses: inf for one that diverged, None for one that has not ended. None while one has not
    ended, and where all diverged.
    """
    ended = {candidate: loss for candidate, loss in losses.items() if loss is not None}
    if len(ended) < len(losses) or not ended:
        return None
    found = min(ended, key=lambda candidate: ended[candidate])
    return found if math.isfinite(ended[found]) else None


def beyond(rates: Sequence[float], rate: float) -> float | None:
    """The rate to try next where `rate`, the best, is at an end of `rates`.

    As far from it, as a factor, as its neighbour on the other side, with two digits.
    """
    ordered = sorted(rates)
    if len(ordered) < 2 or rate not in (ordered[0], ordered[-1]) or len(ordered) >= MOST_RATES:
        return None
    neighbour = ordered[1] if rate == ordered[0] else ordered[-2]
    return float(f"{rate * rate / neighbour:.2g}")
