"""The rank sweep: every point of an adapter on every document of every task.

Walks the factor sets, the tasks and their points; asks an engine for what the samples files lack;
and makes the rows of each point once all its documents are there. Documents are shared out over the
processes, and the main one scores and writes.
"""

import logging
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.core.adapter import use_factors
from matryoshka_lora.core.rules import FACTOR_SETS
from matryoshka_lora.evaluation.engines.hf import evaluation_mode, harness_lm
from matryoshka_lora.evaluation.engines.protocol import Engine, Output, Point, Request
from matryoshka_lora.evaluation.prefetch import answers_of
from matryoshka_lora.evaluation.readings import Plan
from matryoshka_lora.evaluation.rows import Row, group_rows, task_rows
from matryoshka_lora.evaluation.samples import Samples
from matryoshka_lora.evaluation.tasks import EvalTask, TaskGroup

logger = logging.getLogger(__name__)

PROGRESS_EVERY = 10.0
"""Seconds between two progress lines."""
GATHER_EVERY = 512
"""Outputs of each process between two exchanges with the one that writes."""

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
    lockstep: bool = False,
    on_point: OnPoint | None = None,
) -> list[Row]:
    """Evaluate what `folder` does not hold yet, and return all rows (on the main process).

    folder: holds one samples file a task and number of shots.
    identity: goes into every sample; samples of another one (another adapter) are not read.
    lm: the `harness_lm` for which the tasks' requests were made, so that they are not made again.
    processes: where there are several, each answers for its share of the documents and the main
    one scores and writes; all must call this with the same arguments. lockstep: all of them answer
    everything, as a sharded model needs. The rows do not depend on either.
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
        missing: list[dict[Point, set[int]]] = _from_main(
            [{point: store.missing(point) for point in plan.points} for store in stores], processes
        )
        for store in stores:
            for point in plan.points:
                if not store.missing(point):
                    complete.add(store, point, answered=False)
        for factors in FACTOR_SETS:
            wanted = [
                {p: docs for p, docs in of_task.items() if docs and p.factors == factors}
                for of_task in missing
            ]
            if not any(wanted):
                continue
            with use_factors(model, factors):
                for index, (task, of_task) in enumerate(zip(tasks, wanted, strict=True)):
                    if not of_task:
                        continue
                    # Closed before the factors go back: an engine may hold parts of the model.
                    with closing(_answer(task, of_task, engine, processes, lockstep)) as answered:
                        if main:
                            _keep(answered, stores[index], of_task, complete)
                        else:
                            extra = next(answered, None)  # works through all of it
                            assert extra is None
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
    answered: Iterator[tuple[Point, int, list[Output]]],
    store: Samples,
    missing: Mapping[Point, set[int]],
    complete: _CompletePoints,
) -> None:
    """Score and write documents as they are answered; a point is complete with its last one."""
    left = {point: len(docs) for point, docs in missing.items()}
    with store.appending() as append:
        for point, doc_id, outputs in answered:
            append(point, doc_id, outputs)
            left[point] -= 1
            if not left[point]:
                complete.add(store, point, answered=True)


def _answer(
    task: EvalTask,
    missing: Mapping[Point, set[int]],
    engine: Engine,
    processes: Accelerator | None,
    lockstep: bool,
) -> Generator[tuple[Point, int, list[Output]], None, None]:
    """(point, document, all its outputs) as they become complete; nothing but on the main process.

    Takes all jobs of the task under one factor set, so that an engine can mix points.
    """
    jobs: list[tuple[Point, Request]] = []
    places: list[tuple[Point, int, int]] = []
    for point, docs in missing.items():
        for doc_id in sorted(docs):
            for place, request in enumerate(task.document_requests(doc_id)):
                jobs.append((point, request))
                places.append((point, doc_id, place))
    waiting: dict[tuple[Point, int], dict[int, Output]] = {}
    began = logged = time.monotonic()
    for count, (index, output) in enumerate(_outputs(jobs, engine, processes, lockstep), 1):
        if time.monotonic() - logged > PROGRESS_EVERY:
            logged = time.monotonic()
            left = (logged - began) / count * (len(jobs) - count)
            logger.info(
                "%s %d-shot: %d of %d answers, about %d s left",
                *(task.name, task.shots, count, len(jobs), left),
            )
        point, doc_id, place = places[index]
        arrived = waiting.setdefault((point, doc_id), {})
        assert place not in arrived, "an engine answers each job once"
        arrived[place] = output
        if len(arrived) == len(task.document_requests(doc_id)):
            del waiting[(point, doc_id)]
            yield point, doc_id, [arrived[place] for place in range(len(arrived))]
    assert not waiting, "an engine answers every job"


def _outputs(
    jobs: list[tuple[Point, Request]],
    engine: Engine,
    processes: Accelerator | None,
    lockstep: bool,
) -> Iterator[tuple[int, Output]]:
    """The engine's answers to all jobs, on the main process."""
    if processes is None or processes.num_processes == 1:
        yield from answers_of(engine, jobs)
    elif lockstep:
        for answer in engine.run(jobs):
            if processes.is_main_process:
                yield answer
    else:
        # By document, so that all that shares a context is answered by one process.
        mine = [
            index
            for index, (_, request) in enumerate(jobs)
            if request.doc_id % processes.num_processes == processes.process_index
        ]
        with closing(answers_of(engine, [jobs[index] for index in mine])) as found:
            while True:
                part = [(mine[index], output) for index, output in islice(found, GATHER_EVERY)]
                parts = gather_object([part])
                if not any(parts):
                    return
                if processes.is_main_process:
                    for part in parts:
                        yield from part


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
