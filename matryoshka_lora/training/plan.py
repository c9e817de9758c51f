"""The plan of a training: which samples a step takes, and how they are split into forwards.

Pure functions of seed and step, so that resuming needs only the number of the step.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from matryoshka_lora.config import TrainerConfig
from matryoshka_lora.core.errors import UserError

# Keeps the random numbers of the batch order apart from those of the drawn ranks.
ORDER_STREAM = 0
# Held-out records that are read while a training runs. On GSM8K twice an epoch that is 1.2 % of its
# arithmetic, where all records of its 5 % would be 3.5 %; six ranks, six times as much.
VALIDATION_RECORDS = 128

T = TypeVar("T")


def steps_per_epoch(samples: int, effective_batch: int) -> int:
    """Optimizer steps of an epoch. Its last batch may be smaller; it is used."""
    return -(-samples // effective_batch)


def total_steps(samples: int, settings: TrainerConfig) -> int:
    """Optimizer steps of a training, at least one."""
    steps = settings.epochs * steps_per_epoch(samples, settings.effective_batch)
    whole = math.ceil(steps) if settings.round_steps == "up" else max(1, round(steps))
    return whole if settings.max_steps is None else min(whole, settings.max_steps)


def is_validated(done: int, samples: int, settings: TrainerConfig) -> bool:
    """Whether held-out records are read once `done` steps are done."""
    if settings.validate_every is None:
        return False
    interval = settings.validate_every * steps_per_epoch(samples, settings.effective_batch)
    # In floating point 0.07 of 100 steps is a little more than 7.
    times, before = (math.floor(steps / interval + 1e-9) for steps in (done, done - 1))
    return times > before


def validation_sample(held_out: Sequence[T]) -> list[T]:
    """Those that are read: the same each time, at equal distances."""
    count = min(len(held_out), VALIDATION_RECORDS)
    return [held_out[i * len(held_out) // count] for i in range(count)]


def batch_ids(seed: int, step: int, samples: int, effective_batch: int) -> np.ndarray:
    """The samples of a step's effective batch; step and samples are counted from 0."""
    epoch, index = divmod(step, steps_per_epoch(samples, effective_batch))
    order = np.random.default_rng([seed, epoch, ORDER_STREAM]).permutation(samples)
    return order[index * effective_batch : (index + 1) * effective_batch]


def split_into_forwards(
    lengths: Sequence[int],
    process: int,
    processes: int,
    micro_batch: int | None,
    max_tokens: int,
    padded: bool = False,
) -> list[list[int]]:
    """The forwards of one process: for each, its samples' positions in the effective batch.

    lengths: tokens of each sample of the effective batch. With `micro_batch`, a forward takes that
    many samples. Without it, a forward takes samples in order while they fit into `max_tokens`
    tokens, at least one; padded: each counts as many tokens as the longest of them.
    """
    if micro_batch is None and not padded:
        mine = share_of_tokens(lengths, process, processes)
    else:  # consecutive samples, because each micro-batch may draw a rank of its own
        mine = np.array_split(np.arange(len(lengths)), processes)[process].tolist()
    forwards: list[list[int]] = []
    for position in mine:
        if micro_batch is None:
            taken = [lengths[i] for i in (*(forwards[-1] if forwards else ()), position)]
            full = (len(taken) * max(taken) if padded else sum(taken)) > max_tokens
        else:
            full = bool(forwards) and len(forwards[-1]) == micro_batch
        if full or not forwards:
            forwards.append([])
        forwards[-1].append(position)
    return forwards


def share_of_tokens(lengths: Sequence[int], process: int, processes: int) -> list[int]:
    """The positions of a process's samples, in order, so that all have about as many tokens.

    The longest first, each to the process that has the fewest tokens: a step takes as long as its
    slowest process.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fewest = tokens.index(min(tokens))
        shares[fewest].append(position)
        tokens[fewest] += lengths[position]
    return sorted(shares[process])


def check_effective_batch(effective_batch: int, processes: int, micro_batch: int | None) -> None:
    """Raises UserError unless the effective batch splits evenly into processes and micro-batches.

    The message lists the numbers that would fit.
    """
    unit = processes * (micro_batch or 1)
    if effective_batch % unit == 0:
        return
    given = f"trainer.effective_batch={effective_batch} cannot be made of {processes} process(es)"
    if effective_batch % processes:
        fits = [n for n in range(1, effective_batch + 1) if effective_batch % n == 0]
        raise UserError(f"{given}; process counts that fit: {fits}")
    share = effective_batch // processes
    fits = [n for n in range(1, share + 1) if share % n == 0]
    raise UserError(f"{given} x trainer.micro_batch={micro_batch}; micro-batches that fit: {fits}")
