"""Evaluation tasks: the harness's definitions on hub or local data, as requests and scores.

The harness draws the few-shot examples, writes the prompts, filters, scores and aggregates. Its
pieces are called here one document at a time, so that answers may arrive in any order. The results
are those that `lm_eval.evaluate()` gives for the same answers (tested).
"""

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, stderr_for_metric
from lm_eval.config.group import GroupConfig
from lm_eval.models.huggingface import HFLM

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.definitions import Definition, definition
from matryoshka_lora.evaluation.engines.protocol import Output, Request
from matryoshka_lora.evaluation.harness_task import (
    HarnessTask,
    make_task,
    reason,
    without_progress_bars,
)
from matryoshka_lora.evaluation.requests import DocumentRequests, document_requests
from matryoshka_lora.evaluation.rows import Aggregate, Key, Score

logger = logging.getLogger(__name__)

FEWSHOT_SEED = 1234
"""What the harness's command line uses unless told otherwise."""
BOOTSTRAP_DRAWS = 100_000
"""The harness's default, for the few metrics without a closed-form standard error."""
SLOW_METRICS = ("bleu", "chrf", "chrf++", "ter")
"""For these the harness draws at most 100 times."""


@dataclass(frozen=True, eq=False)
class TaskGroup:
    """A group of tasks that the harness reports as one, for example mmlu."""

    name: str
    shots: int
    limit: int | None
    """Of each member, as in `EvalTask`."""
    harness: Group
    members: list["EvalTask"] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """As of an `EvalTask`."""
        weights = [vars(metric) for metric in self.harness.aggregate_metric_list or []]
        return _digest([self.name, weights, [member.fingerprint for member in self.members]])

    def aggregate(self, members: Mapping[str, Mapping[Key, Aggregate]]) -> dict[Key, Aggregate]:
        """The group's own metrics from those of its members, weighted as the group's YAML says."""
        metrics: dict[str, Any] = {}
        for name, of_member in members.items():
            metrics[name] = {"sample_len": max(a.n for a in of_member.values())}
            for (filter_name, metric), aggregate in of_member.items():
                suffix = filter_name or "none"
                metrics[name][f"{metric},{suffix}"] = aggregate.value
                metrics[name][f"{metric}_stderr,{suffix}"] = (
                    "N/A" if aggregate.stderr is None else aggregate.stderr
                )
        result: dict[str, Any] = dict(self.harness.aggregate(metrics))
        own = {}
        for name, value in result.items():
            metric, comma, suffix = name.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = result[f"{metric}_stderr,{suffix}"]
                own[(None if suffix == "none" else suffix, metric)] = Aggregate(
                    float(value),
                    None if stderr == "N/A" else float(stderr),
                    result["sample_count"][name],
                )
        return own

    def weights_documents(self, metric: str) -> bool:
        """Whether the group's value is the mean over all documents of all members."""
        configs = self.harness.aggregate_metric_list or []
        return any(c.metric == metric and c.weight_by_size for c in configs)


class EvalTask:
    """One task at one number of shots: its requests, and the scores of their answers."""

    def __init__(
        self,
        task: HarnessTask,
        shots: int,
        limit: int | None,
        seed: int,
        groups: tuple[TaskGroup, ...],
        generation: str = "",
    ) -> None:
        self.name: str = task.task_name
        self.shots = shots
        self.limit = limit
        self.version = task.VERSION
        self.groups = groups
        """Groups that this task was asked for as a part of, outermost first."""
        self.truncated: int | None = None
        """Documents of which a prompt lost its beginning; None until there are requests."""
        self._task = task
        self._seed = seed
        self._generation = generation
        self._instances: list[list[Instance]] = []
        self._documents: list[DocumentRequests] = []
        self._lm: HFLM | None = None

    @property
    def documents(self) -> int:
        """How many documents are evaluated."""
        total = len(self._task.task_docs)
        return total if self.limit is None else min(self.limit, total)

    @functools.cached_property
    def definition(self) -> str:
        """Changes with the prompt, the shots, the filters, the metrics, how the base generates."""
        return _digest([self._task.dump_config(), self.shots, self._seed, self._generation])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with anything that the rows depend on, adapter and base model aside.

        That is the definition, the documents and those that the shots are drawn from. It needs no
        prompts and no tokenizer.
        """
        documents = islice(self._task.task_docs, self.documents)
        shown = self._task.sampler.df if self.shots else ()
        return _digest([self.name, self.definition, [*documents], [*shown]])

    def requests(self, lm: HFLM) -> list[Request]:
        """All requests, document after document, tokenised and truncated as `lm` itself does it.

        A generated answer is followed by a request for the loss on the gold target. The prompts are
        drawn once; the tokens are made once a harness model. Raises UserError for a document
        that cannot be made into a prompt or does not fit the model's window.
        """
        if lm is not self._lm:
            if not self._instances:
                self._build()
            self._documents = [
                document_requests(self._task, doc_id, instances, lm)
                for doc_id, instances in enumerate(self._instances)
            ]
            self._lm = lm
            self.truncated = sum(document.truncated for document in self._documents)
            if self.truncated:
                logger.warning(
                    "%s, %d shots: %d of %d prompts are longer than the model's window and lose "
                    "their beginning, as in the harness",
                    *(self.name, self.shots, self.truncated, self.documents),
                )
        return [request for document in self._documents for request in document.requests]

    def document_requests(self, doc_id: int) -> Sequence[Request]:
        """The requests of one document, in the order in which `score` wants their outputs."""
        return self._documents[doc_id].requests

    def document_fingerprint(self, doc_id: int) -> str:
        """Changes with anything that the scores of this document depend on, the model aside."""
        document, doc = self._documents[doc_id], self._instances[doc_id][0].doc
        asked = [
            [r.kind, r.context, r.target, r.until, r.max_new_tokens] for r in document.requests
        ]
        target = self._task.doc_to_target(doc)
        return _digest([self.name, self.definition, asked, target, document.gold])

    def score(self, doc_id: int, outputs: Sequence[Output]) -> Score:
        """Run one document's outputs through the task's filters and `process_results`."""
        requests, gold = self._documents[doc_id].requests, self._documents[doc_id].gold
        assert len(outputs) == len(requests)
        # The harness's own requests stand first; behind them there may be one for the loss.
        answered = [
            replace(
                instance,
                resps=[o.text if r.kind == "generate" else (o.logprob, o.is_greedy)],
                filtered_resps={},
            )
            for instance, r, o in zip(self._instances[doc_id], requests, outputs, strict=False)
        ]
        task, doc = self._task, answered[0].doc
        values: dict[Key, Any] = {}
        answers: dict[str | None, Any] = {}
        for pipeline in task._filters:
            pipeline.apply(answered)
            name = None if pipeline.name == "none" else pipeline.name
            filtered = [instance.filtered_resps[pipeline.name] for instance in answered]
            for metric, value in task.process_results(doc, filtered).items():
                values[(name, metric)] = _as_json(value)
            if task.OUTPUT_TYPE == "generate_until":
                answers[name] = _as_json(filtered[0])
        loss = None if gold is None else (-outputs[gold].logprob, len(requests[gold].target))
        return Score(values, answers, loss)

    def aggregate(self, key: Key, values: Sequence[Any]) -> Aggregate:
        """The task's own aggregation of per-document values, as in `lm_eval.evaluate()`."""
        metric = key[1]
        function = self._task.aggregation().get(metric, mean)
        draws = 100 if metric in SLOW_METRICS else BOOTSTRAP_DRAWS
        stderr_of = stderr_for_metric(metric=function, bootstrap_iters=draws)
        stderr = float(stderr_of(values)) if stderr_of and len(values) > 1 else None
        return Aggregate(float(function(values)), stderr, len(values))

    def _build(self) -> None:
        """Draw the few-shot examples and let the harness write the prompts."""
        task = self._task
        # The sampler's state goes on from document to document, so it is set right before.
        task.set_fewshot_seed(self._seed)
        try:
            with without_progress_bars():
                task.build_all_requests(limit=self.limit, rank=0, world_size=1)
        except Exception as error:  # a template or function of the task met a document it cannot do
            raise UserError(
                f"task {self.name}: a document cannot be made into a prompt: {reason(error)}"
            ) from error
        by_document: dict[int, list[Instance]] = {}
        for instance in task.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        assert list(by_document) == list(range(len(by_document)))
        self._instances = [sorted(i, key=lambda x: x.idx) for i in by_document.values()]


def load_tasks(
    specs: Sequence[tuple[str, int]],
    *,
    data_path: Path | None = None,
    limit: int | None = None,
    seed: int = FEWSHOT_SEED,
    generation: str = "",
) -> list[EvalTask]:
    """The tasks named in `specs`, each as (name, shots); a group stands for its members.

    data_path: a folder that holds the split files (train, test, validation or dev, as .jsonl, .json
    or .parquet) or a subfolder of them per task (`gsm8k/`, `mmlu/<subject>/`), read in place of the
    hub; documents have the schema of the hub's data set. limit: only the first documents of each
    task. generation: a digest of how the base model generates, part of every fingerprint. Raises
    UserError for anything that is wrong with names, shots, limit, folder or files.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"limit {limit!r} is not a positive number of documents; null means all")
    if data_path is not None and not data_path.is_dir():
        what = "is a file, not a folder" if data_path.exists() else "does not exist"
        raise UserError(f"evaluation data folder {data_path} {what}")
    loaded: list[EvalTask] = []
    for name, shots in specs:
        if type(shots) is not int or shots < 0:
            raise UserError(f"task {name}: shots must be 0 or more, got {shots!r}")
        loaded += _load(definition(name), shots, data_path, limit, seed, (), generation)
    if not loaded:
        raise UserError("no evaluation task is given; name at least one, for example gsm8k")
    names = [(task.name, task.shots) for task in loaded]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"evaluation tasks are given more than once (name, shots): {repeated}")
    _check_folders([task._task for task in loaded])
    return loaded


def _load(
    defined: Definition,
    shots: int,
    data_path: Path | None,
    limit: int | None,
    seed: int,
    groups: tuple[TaskGroup, ...],
    generation: str,
) -> list[EvalTask]:
    """The tasks of a definition, with the groups among and around them."""
    if defined.members is None:
        task = make_task(dict(defined.config), shots, data_path)
        return [EvalTask(task, shots, limit, seed, groups, generation)]
    group = None
    if defined.config.get("aggregate_metric_list"):
        harness = Group.from_config(GroupConfig(**defined.config))
        group = TaskGroup(defined.config["group"], shots, limit, harness)
        groups = (*groups, group)
    loaded = []
    for member in defined.members:
        loaded += _load(member, shots, data_path, limit, seed, groups, generation)
    if group is not None:
        for member_task in loaded:
            group.harness.add(member_task._task)
        group.members.extend(loaded)
    return loaded


def _check_folders(tasks: Sequence[HarnessTask]) -> None:
    """Raises UserError where several data sets would be read from the same files."""
    seen: dict[Path, tuple[str, Any]] = {}
    for task in tasks:
        if task.folder is None:
            continue
        identity = (task.config.dataset_path, task.config.dataset_name)
        first, known = seen.setdefault(task.folder, (task.task_name, identity))
        if known != identity:
            raise UserError(
                f"{task.folder} would be read for {first} and for {task.task_name}, which are "
                f"different data sets; make a subfolder per task, for example "
                f"{task.folder / task.task_name}"
            )


def _digest(content: Any) -> str:
    """16 hex digits over what JSON makes of `content`, and over the source of functions in it."""
    text = json.dumps(content, sort_keys=True, default=_source)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(value: Any) -> str:
    """A text that is the same in every process, which the address in a `repr` is not."""
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # built in, or an instance
        return getattr(value, "__qualname__", type(value).__qualname__)


def _as_json(value: Any) -> Any:
    """`value` as JSON gives it back: no tuples, no numpy; what JSON does not have as a string."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else json.dumps(key): _as_json(item)
            for key, item in value.items()
        }
    return value if isinstance(value, str | int | float | None) else str(value)
