"""The rank sweep: every point of an adapter on every document of every task.

Answers go to append-only files, a line a (rank, rule, document), and rows are computed from them:
what stands in a file is never asked again.
"""

import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Full, Queue
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.core.adapter import use_factors
from matryoshka_lora.core.rules import FACTOR_SETS, read, same_as
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.evaluation.engines.hf import evaluation_mode, harness_lm
from matryoshka_lora.evaluation.engines.protocol import Engine, Output, Outputs, Point, Request
from matryoshka_lora.evaluation.tasks import (
    Aggregate,
    EvalTask,
    Key,
    Score,
    TaskGroup,
    loss_aggregate,
)
from matryoshka_lora.runs.record import Row, encode_scores

logger = logging.getLogger(__name__)

BASE = (0, "base")
LOSS: Key = (None, "loss")
PROGRESS_EVERY = 10.0
"""Seconds between two progress lines."""
GATHER_EVERY = 512
"""Outputs of each process between two exchanges with the one that writes."""

AHEAD = 4096
"""Answers of an engine that may wait to be scored."""

T = TypeVar("T")
Reading = tuple[int, str]
"""(rank, rule) as asked for; several may be the same function and then share a point."""
OnPoint = Callable[[EvalTask, Point, list[Row]], None]


class _End:
    """Stands behind the last item."""


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and which point answers for each reading that was asked for."""

    points: tuple[Point, ...]
    """Base model first, then as asked for; each function once."""
    readings: Mapping[Reading, Point]
    train_ranks: tuple[int, ...]
    """S, the sub-ranks that training visited."""

    def trained_rank(self, reading: Reading) -> bool | None:
        """Whether the rank is in S; None where S has no meaning (base model, svd)."""
        rank, rule = reading
        return None if rule in ("base", "svd") else rank in self.train_ranks

    def same_as(self, reading: Reading) -> str | None:
        """ "rule@rank" of the point that is evaluated in place of `reading`, if another one is."""
        point = self.readings[reading]
        return None if (point.rank, point.rule) == reading else f"{point.rule}@{point.rank}"


def plan_points(
    spec: AdapterSpec, ranks: Sequence[int], rules: Sequence[str], train_ranks: Sequence[int]
) -> Plan:
    """The base model and every rank under every rule; equal functions share a point.

    train_ranks: S, which only decides what `Row.trained_rank` says. Raises ValueError for ranks or
    rules that the adapter does not have or that are repeated.
    """
    if not ranks or not rules:
        raise ValueError(f"a sweep needs ranks and rules; got ranks {ranks!r}, rules {rules!r}")
    for what, given in (("ranks", ranks), ("rules", rules)):
        if len(set(given)) < len(given):
            raise ValueError(f"the {what} of the sweep are repeated: {list(given)}")
    points: dict[Reading, Point] = {BASE: _point(spec, *BASE)}
    readings = {BASE: points[BASE]}
    for rank in ranks:
        if rank == 0:
            raise ValueError("rank 0 is the base model, which every sweep evaluates; leave it out")
        for rule in rules:
            key = (rank, same_as(spec, rank, rule) or rule)  # checks both
            readings[(rank, rule)] = points.setdefault(key, _point(spec, *key))
    return Plan(tuple(points.values()), readings, tuple(train_ranks))


def _point(spec: AdapterSpec, rank: int, rule: str) -> Point:
    read_as = read(spec, rank, rule)
    return Point(rank, rule, read_as.factors, read_as.p)


def run_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EvalTask],
    plan: Plan,
    engine: Engine,
    folder: Path,
    *,
    identity: str = "",
    processes: Accelerator | None = None,
    lockstep: bool = False,
    on_point: OnPoint | None = None,
) -> list[Row]:
    """Evaluate what `folder` does not hold yet, and return all rows (on the main process).

    folder: holds one samples file a task and number of shots.
    identity: goes into every sample; samples of another one (another adapter) are not read.
    processes: where there are several, each answers for its share of the documents and the main
    one scores and writes; all must call this with the same arguments. lockstep: all of them answer
    everything, as a sharded model needs. The rows do not depend on either.
    on_point: called on the main process when a point of a task is complete, with its rows.

    Python's, numpy's and torch's random states and the mode of the model are left as they were.
    Raises ValueError for a samples file that is damaged before its last line.
    """
    main = processes is None or processes.is_main_process
    with evaluation_mode(model), _unchanged_random_state():
        lm = harness_lm(model, tokenizer)
        for task in tasks:
            task.requests(lm)
        stores = [_Samples(folder, task, identity) for task in tasks] if main else []
        missing = [store.missing(plan.points) for store in stores]
        missing = _from_main(missing, processes)
        rows: dict[tuple[str, int, Point], list[Row]] = {}

        def finish(store: _Samples, point: Point) -> None:
            made = rows[(store.task.name, store.task.shots, point)] = _point_rows(
                store, point, plan
            )
            if on_point is not None:
                on_point(store.task, point, made)

        for store, lacking in zip(stores, missing if main else [], strict=True):
            for point in plan.points:
                if not lacking[point]:
                    finish(store, point)
        for factors in FACTOR_SETS:
            wanted = [
                {p: docs for p, docs in lacking.items() if docs and p.factors == factors}
                for lacking in missing
            ]
            if not any(wanted):
                continue
            with use_factors(model, factors):
                for index, (task, lacking) in enumerate(zip(tasks, wanted, strict=True)):
                    if not lacking:
                        continue
                    # Closed before the factors go back: an engine may hold parts of the model.
                    with closing(_answer(task, lacking, engine, processes, lockstep)) as complete:
                        if not main:
                            extra = next(complete, None)  # works through all of it
                            assert extra is None
                            continue
                        with stores[index].appending() as append:
                            for point, doc_id, outputs in complete:
                                append(point, doc_id, outputs)
                                lacking[point].discard(doc_id)
                                if not lacking[point]:
                                    finish(stores[index], point)
    return _all_rows(tasks, plan, rows, stores) if main else []


def ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, made in another thread, at most AHEAD of them before they are taken.

    Scoring an answer takes the harness half a millisecond, in which the device would wait; and it
    may need the main thread, where graders set their alarms. Closing this closes `items`, and
    waits until that is done.
    """
    made: Queue[T | _End] = Queue(AHEAD)
    left = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def hand_over(item: T | _End) -> bool:
        while not left.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own
        try:
            with closing(items):
                for item in items:
                    if not hand_over(item):
                        return
        finally:
            hand_over(_End())

    with ThreadPoolExecutor(max_workers=1) as thread:
        working = thread.submit(work)
        try:
            while not isinstance(item := made.get(), _End):
                yield item
        finally:
            left.set()
        working.result()  # raises what `items` raised


def answers_of(engine: Engine, jobs: Sequence[tuple[Point, Request]]) -> Outputs:
    """`engine.run(jobs)`, ahead of the caller where a device works in the meantime.

    On a CPU both would want the same cores, and each would wait for the other's.
    """
    return ahead(engine.run(jobs)) if torch.cuda.is_initialized() else engine.run(jobs)


def samples_path(folder: Path, task: EvalTask) -> Path:
    """Where the samples of a task are; a harness name may hold characters that a file's cannot."""
    return folder / f"{task.name.replace('/', '_').replace(':', '_')}-{task.shots}.jsonl"


class _Samples:
    """The scores of one task, in memory and as lines of its file."""

    def __init__(self, folder: Path, task: EvalTask, identity: str) -> None:
        self.task = task
        self.path = samples_path(folder, task)
        self._hashes = [f"{task.fingerprint(doc)}{identity}" for doc in range(task.documents)]
        self._found: dict[Reading, dict[int, Score]] = {}
        self._read()

    def missing(self, points: Sequence[Point]) -> dict[Point, set[int]]:
        """Documents that each point has no sample of."""
        every = range(self.task.documents)
        return {p: set(every).difference(self._found.get((p.rank, p.rule), {})) for p in points}

    def scores(self, point: Point) -> list[Score]:
        """All documents' scores at a complete point, in the order of the documents."""
        found = self._found[(point.rank, point.rule)]
        return [found[doc_id] for doc_id in range(self.task.documents)]

    @contextmanager
    def appending(self) -> Iterator[Callable[[Point, int, Sequence[Output]], None]]:
        """A function that scores a document's outputs and appends them to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            yield lambda point, doc_id, outputs: self._append(file, point, doc_id, outputs)

    def _append(self, file: TextIO, point: Point, doc_id: int, outputs: Sequence[Output]) -> None:
        score = self.task.score(doc_id, outputs)
        requests = self.task.document_requests(doc_id)
        by_filter: dict[str, dict[str, Any]] = {}
        for (filter_name, metric), value in score.values.items():
            by_filter.setdefault(filter_name or "none", {})[metric] = value
        line = {
            "rank": point.rank,
            "rule": point.rule,
            "doc_id": doc_id,
            "hash": self._hashes[doc_id],
            "outputs": [
                o.text if r.kind == "generate" else [o.logprob, o.is_greedy]
                for r, o in zip(requests, outputs, strict=True)
            ],
            "answers": {name or "none": answer for name, answer in score.answers.items()},
            "scores": by_filter,
            "loss_sum": score.loss and score.loss[0],
            "target_tokens": score.loss and score.loss[1],
        }
        text = json.dumps(line, ensure_ascii=False, default=str)
        file.write(text + "\n")
        # A killed process loses what it holds itself, not what the system has.
        file.flush()
        self._take(json.loads(text))

    def _read(self) -> None:
        """Read the file, if there is one, and cut off a last line that was not written whole."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        lines = data.split(b"\n")
        whole, stale = len(data) - len(lines.pop()), 0
        for number, line in enumerate(lines, 1):
            try:
                stale += not self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if number < len(lines):
                    raise ValueError(
                        f"{self.path} is damaged at line {number} ({error}); it is left alone. "
                        "Restore it, or move it away to evaluate anew"
                    ) from error
                whole -= len(line) + 1
        if whole < len(data):
            logger.warning("%s: its last line was not written whole and is dropped", self.path)
            with self.path.open("r+b") as file:
                file.truncate(whole)
        if stale:
            logger.info(
                "%s: %d samples are of other documents, prompts or adapters and are not used",
                *(self.path, stale),
            )

    def _take(self, line: dict[str, Any]) -> bool:
        """Keep what a line says, unless it is about something else than is evaluated now."""
        doc_id, reading = line["doc_id"], (line["rank"], line["rule"])
        values = {
            (None if name == "none" else name, metric): value
            for name, metrics in line["scores"].items()
            for metric, value in metrics.items()
        }
        has_loss = line["loss_sum"] is not None
        loss = (line["loss_sum"], line["target_tokens"]) if has_loss else None
        if doc_id >= len(self._hashes):  # beyond the limit, and of use again without it
            return True
        if line["hash"] != self._hashes[doc_id]:
            return False
        self._found.setdefault(reading, {})[doc_id] = Score(values, {}, loss)
        return True


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
    began = shown = time.monotonic()
    for count, (index, output) in enumerate(_outputs(jobs, engine, processes, lockstep), 1):
        if time.monotonic() - shown > PROGRESS_EVERY:
            shown = time.monotonic()
            left = (shown - began) / count * (len(jobs) - count)
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


def _point_rows(store: _Samples, point: Point, plan: Plan) -> list[Row]:
    """The rows of a task at one point, the harness's first metric first."""
    return [
        row
        for key, (aggregate, kept) in _aggregates(store.task, store.scores(point)).items()
        for row in _rows(store.task, key, aggregate, kept, point, plan)
    ]


def _group_rows(
    group: TaskGroup, members: Sequence[_Samples], point: Point, plan: Plan
) -> list[Row]:
    """The group's metrics as the harness weights them, and its loss over all target tokens."""
    scores = [store.scores(point) for store in members]
    made = {
        store.task.name: _aggregates(store.task, of_task)
        for store, of_task in zip(members, scores, strict=True)
    }
    alone = {name: {k: a for k, (a, _) in of.items() if k != LOSS} for name, of in made.items()}
    rows: list[Row] = []
    for key, aggregate in group.aggregate(alone).items():
        kept = [value for of_task in made.values() for value in of_task.get(key, (0, []))[1]]
        kept = kept if group.weights_documents(key[1]) else []
        rows += _rows(group, key, aggregate, kept, point, plan)
    losses = [score.loss for of_task in scores for score in of_task if score.loss is not None]
    if losses:
        rows += _rows(group, LOSS, *loss_aggregate(losses), point, plan)
    return rows


def _aggregates(task: EvalTask, scores: Sequence[Score]) -> dict[Key, tuple[Aggregate, list[Any]]]:
    """Each metric over the documents, with the documents' own values."""
    result: dict[Key, tuple[Aggregate, list[Any]]] = {}
    for key in dict.fromkeys(key for score in scores for key in score.values):
        values = [score.values[key] for score in scores if key in score.values]
        result[key] = (task.aggregate(key, values), values)
    if losses := [score.loss for score in scores if score.loss is not None]:
        result[LOSS] = loss_aggregate(losses)
    return result


def _rows(
    source: EvalTask | TaskGroup,
    key: Key,
    aggregate: Aggregate,
    scores: list[Any],
    point: Point,
    plan: Plan,
) -> list[Row]:
    """One number as a row for each reading that `point` answers for."""
    value, stderr = aggregate.value, aggregate.stderr
    finite = math.isfinite(value)
    if not finite:
        logger.warning(
            "%s is %s for task %s at rank %d (%s)",
            *(key[1], value, source.name, point.rank, point.rule),
        )
    # Some metrics are no means of numbers (F1 counts pairs), others weight tasks, not documents.
    numbers = len(scores) == aggregate.n and all(
        isinstance(score, int | float) and math.isfinite(score) for score in scores
    )
    return [
        Row(
            task=source.name,
            shots=source.shots,
            limit=source.limit,
            filter=key[0],
            rank=rank,
            rule=rule,
            metric=key[1],
            value=value if finite else None,
            stderr=stderr if stderr is not None and math.isfinite(stderr) else None,
            n=aggregate.n,
            same_as=plan.same_as((rank, rule)),
            trained_rank=plan.trained_rank((rank, rule)),
            scores=encode_scores(scores) if numbers else None,
        )
        for (rank, rule), stands_in in plan.readings.items()
        if stands_in is point
    ]


def _all_rows(
    tasks: Sequence[EvalTask],
    plan: Plan,
    rows: Mapping[tuple[str, int, Point], list[Row]],
    stores: Sequence[_Samples],
) -> list[Row]:
    """Every task's rows in the order of the plan, and those of a group before its members'."""
    result: list[Row] = []
    groups: list[TaskGroup] = []
    for task in tasks:
        for group in task.groups:
            if not any(group is other for other in groups):
                groups.append(group)
                members = [s for s in stores if any(group is g for g in s.task.groups)]
                for point in plan.points:
                    result += _group_rows(group, members, point, plan)
        for point in plan.points:
            result += rows[(task.name, task.shots, point)]
    return result


@contextmanager
def _unchanged_random_state() -> Iterator[None]:
    """Whatever a task, a metric or an engine draws, the caller's random states stay as they are."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
