"""Choosing the learning rate: every candidate on one seed, compared by its held-out loss.

Where a grid has several learning rates, each (method, R, scaling) first trains with each of them on
the first seed, with HELD_OUT of the training records held out. The lowest held-out loss wins: the
mean over the ranks that the method trains for (a baseline: its own R alone) under the rule
`trained`, or under `prefix` where the table reads that and not `trained`. A training that diverges
has lost.
"""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matryoshka_lora import methods
from matryoshka_lora.config import Config, adapter_spec_of
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.runs.record import Record

HELD_OUT = 0.05


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


def held_out_loss(record: Record, config: Config, path: Path) -> float:
    """The mean held-out loss, in nats a token, of a finished candidate over the ranks it reads.

    Raises UserError naming `path`, the record's file, where one of them is missing.
    """
    assert config.eval.rules is not None, "`search_settings` names it"
    (rule,), ranks = config.eval.rules, config.eval_ranks
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


def best(losses: Mapping[float, float | None]) -> float | None:
    """The learning rate of the lowest loss, the first of equal ones.

    losses: by learning rate; inf for one that diverged, None for one that has not ended. None while
    one has not ended, and where all diverged.
    """
    ended = {lr: loss for lr, loss in losses.items() if loss is not None}
    if len(ended) < len(losses):
        return None
    lr = min(ended, key=lambda lr: ended[lr])
    return lr if math.isfinite(ended[lr]) else None
