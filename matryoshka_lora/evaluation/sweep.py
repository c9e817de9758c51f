"""The rank sweep: every point of an adapter on every document of every task.

Walks the factor sets, the tasks and their points; asks an engine for what the samples files lack;
and makes the rows of each point once all its documents are there. Documents are shared out over the
processes, each of which scores what it answers, and the main one writes.
"""

import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.core.adapter import use_factors
from matryoshka_lora.core.rules import FACTOR_SETS
from matryoshka_lora.evaluation.engines.hf import evaluation_mode, harness_lm
from matryoshka_lora.evaluation.engines.protocol import Engine, Output, Point, Request
from matryoshka_lora.evaluation.readings import Plan
from matryoshka_lora.evaluation.rows import Row, Score, group_rows, task_rows
from matryoshka_lora.evaluation.samples import Samples
from matryoshka_lora.evaluation.sharing import Exchange
from matryoshka_lora.evaluation.tasks import EvalTask, TaskGroup

logger = logging.getLogger(__name__)

PROGRESS_EVERY = 10.0
"""Seconds between two progress lines."""

Unit = tuple[Point, int]
"""A document, by its id, at a point."""
Answered = tuple[int, list[Output], Score]
"""The number of a unit, all its outputs, and what they are worth."""
Source = EvalTask | TaskGroup
"""What rows are of."""
OnPoint = Callable[[Source, Point, list[Row], bool], None]
"""The last: whether any of its documents was answered just now."""


def run_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EvalTask],
    plan: Plan,
    engine: Engine,
    folder: Path,
    *,
    identity: str = "",
    lm: HFLM | None = None,
    processes: Accelerator | None = None,
    on_point: OnPoint | None = None,
) -> list[Row]:
    """Evaluate what `folder` does not hold yet, and return all rows (on the main process).

    folder: holds one samples file a task and number of shots.
    identity: goes into every sample; samples of another one (another adapter) are not read.
    lm: the `harness_lm` for which the tasks' requests were made, so that they are not made again.
    processes: where there are several, each takes documents as it gets free and scores them, and
    the main one writes; all must call this with the same arguments, and the others may be done
    before it. An engine in lockstep answers everything on all of them. The rows are the same.
    on_point: called on the main process with the rows of a task at a point when all its documents
    are there, and with those of a group when all its tasks are complete at that point. Each row
    that is returned goes through it once. Its last argument says whether anything was asked for it.

    Python's, numpy's and torch's random states and the mode of the model are left as they were.
    Raises UserError for a samples file that is damaged.
    """
    main = processes is None or processes.is_main_process
    with evaluation_mode(model), unchanged_random_state():
        lm = lm or harness_lm(model, tokenizer)
        for task in tasks:
            task.requests(lm)
        stores = [Samples(folder, task, identity) for task in tasks] if main else []
        complete = _CompletePoints(stores, plan, on_point)
        missing: list[dict[Point, set[int]]]
        missing, name = _from_main(
            (
                [{point: store.missing(point) for point in plan.points} for store in stores],
                uuid.uuid4().hex,
            ),
            processes,
        )
        for store in stores:
            for point in plan.points:
                if not store.missing(point):
                    complete.add(store, point, answered=False)
        for factors in FACTOR_SETS:
            wanted = [
                [
                    (point, doc_id)
                    for point, docs in of_task.items()
                    if point.factors == factors
                    for doc_id in sorted(docs)
                ]
                for of_task in missing
            ]
            if not any(wanted):
                continue
            with use_factors(model, factors):
                for index, (task, units) in enumerate(zip(tasks, wanted, strict=True)):
                    if not units:
                        continue
                    exchange: Exchange[Answered] | None = None
                    if (
                        processes is not None
                        and processes.num_processes > 1
                        and not engine.lockstep
                    ):
                        units = _in_order(units, task)
                        exchange = Exchange(processes, f"{name}/{factors}/{index}")
                    parts = None if exchange is None else exchange.parts(len(units))
                    # Closed before the factors go back: an engine may hold parts of the model.
                    with closing(_answer(task, units, engine, parts)) as answered:
                        if main:
                            every = answered if exchange is None else exchange.gather(answered)
                            _keep(every, stores[index], units, complete)
                        elif exchange is not None:
                            exchange.send(answered)
                        else:
                            for _ in answered:  # in lockstep with the main process
                                pass
    return complete.rows()


class _CompletePoints:
    """The rows of tasks and groups at the points whose documents are all there."""

    def __init__(self, stores: Sequence[Samples], plan: Plan, on_point: OnPoint | None) -> None:
        self._plan = plan
        self._on_point = on_point
        self._sources: list[Source] = []
        """Every task, and every group before its first member."""
        self._members: dict[TaskGroup, list[Samples]] = {}
        self._rows: dict[tuple[Source, Point], list[Row]] = {}
        for store in stores:
            for group in store.task.groups:
                if group not in self._members:
                    self._sources.append(group)
                self._members.setdefault(group, []).append(store)
            self._sources.append(store.task)

    def add(self, store: Samples, point: Point, *, answered: bool) -> None:
        """Make the rows of a task at a point, and those of the groups that this completes."""
        readings = self._plan.readings_of(point)
        self._tell(
            store.task, point, task_rows(store.task, store.scores(point), readings), answered
        )
        for group in store.task.groups:
            members = self._members[group]
            if all((member.task, point) in self._rows for member in members):
                scores = [(member.task, member.scores(point)) for member in members]
                self._tell(group, point, group_rows(group, scores, readings), answered)

    def rows(self) -> list[Row]:
        """All rows: each group before its tasks, and each source's in the order of the plan."""
        return [
            row
            for source in self._sources
            for point in self._plan.points
            for row in self._rows[(source, point)]
        ]

    def _tell(self, source: Source, point: Point, rows: list[Row], answered: bool) -> None:
        self._rows[(source, point)] = rows
        if self._on_point is not None:
            self._on_point(source, point, rows, answered)


def _keep(
    answered: Iterable[Answered],
    store: Samples,
    units: Sequence[Unit],
    complete: _CompletePoints,
) -> None:
    """Write documents as they are answered; a point is complete with its last one."""
    left = Counter(point for point, _ in units)
    began = logged = time.monotonic()
    with store.appending() as append:
        for count, (number, outputs, score) in enumerate(answered, 1):
            if time.monotonic() - logged > PROGRESS_EVERY:
                logged = time.monotonic()
                seconds = (logged - began) / count * (len(units) - count)
                logger.info(
                    "%s %d-shot: %d of %d answers, about %d s left",
                    *(store.task.name, store.task.shots, count, len(units), seconds),
                )
            point, doc_id = units[number]
            append(point, doc_id, outputs, score)
            left[point] -= 1
            if not left[point]:
                complete.add(store, point, answered=True)


def _answer(
    task: EvalTask,
    units: Sequence[Unit],
    engine: Engine,
    parts: Iterator[range] | None,
) -> Generator[Answered, None, None]:
    """Units as they become complete.

    parts: of the units, those that this process takes; None: all. An engine gets all units of a
    task under one factor set, so that it can mix points.
    """
    jobs: list[tuple[Point, Request]] = []
    unit_of: list[int] = []
    first = [0]
    for number, (point, doc_id) in enumerate(units):
        requests = task.document_requests(doc_id)
        jobs += [(point, request) for request in requests]
        unit_of += [number] * len(requests)
        first.append(len(jobs))
    # Whole units, so that requests that share a context stay together.
    shares = None if parts is None else (range(first[p.start], first[p.stop]) for p in parts)
    waiting: dict[int, dict[int, Output]] = {}
    with closing(engine.run(jobs, shares)) as answers:
        for index, output in answers:
            number = unit_of[index]
            arrived = waiting.setdefault(number, {})
            assert index not in arrived, "an engine answers each job once"
            arrived[index] = output
            if len(arrived) == first[number + 1] - first[number]:
                outputs = [output for _, output in sorted(waiting.pop(number).items())]
                yield number, outputs, task.score(units[number][1], outputs)
    assert not waiting, "an engine answers every job"


def _in_order(units: Sequence[Unit], task: EvalTask) -> list[Unit]:
    """Point by point, and the longest documents first, as an engine orders what it gets at once."""
    length = {doc: max(len(r.context) for r in task.document_requests(doc)) for _, doc in units}
    points = {point: number for number, point in enumerate(dict.fromkeys(p for p, _ in units))}
    return sorted(units, key=lambda unit: (points[unit[0]], -length[unit[1]]))


def _from_main(value: Any, processes: Accelerator | None) -> Any:
    """The main process's value on every process."""
    if processes is None or processes.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Whatever a task, a metric or an engine draws, the caller's random states stay as they are."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
