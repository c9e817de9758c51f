"""Evaluation tasks: the harness's definitions on hub or local data, as requests and scores.

The harness draws the few-shot examples, writes the prompts, filters, scores and aggregates; here
its pieces are called one document at a time, so that answers may arrive in any order. What
`lm_eval.evaluate()` would say of the same answers is what comes out (tested).
"""

import contextlib
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, stderr_for_metric
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.utils import maybe_delimit
from lm_eval.config.group import GroupConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from matryoshka_lora.evaluation.definitions import Definition, definition, is_own
from matryoshka_lora.evaluation.engines.protocol import Output, Request
from matryoshka_lora.evaluation.local_data import read_splits

logger = logging.getLogger(__name__)

FEWSHOT_SEED = 1234
"""What the harness's command line uses unless told otherwise."""
BOOTSTRAP_DRAWS = 100_000
"""The harness's default, for the few metrics without a closed-form standard error."""

Key = tuple[str | None, str]
"""(answer filter, metric); the harness's filter "none" is None here."""


@dataclass(frozen=True)
class Aggregate:
    """One number over documents; stderr is None where the harness gives none."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Score:
    """What one document is worth at one point."""

    values: dict[Key, Any]
    """Per-document metrics of the harness; numbers, or pairs for metrics like F1."""
    answers: dict[str | None, Any]
    """generate: filter -> filtered answer."""
    loss: tuple[float, int] | None
    """(negative log-likelihood of the gold target in nats, its tokens); None without a gold."""


@dataclass(frozen=True)
class TaskGroup:
    """A group of tasks that the harness reports as one, for example mmlu."""

    name: str
    shots: int
    limit: int | None
    """Of each member, as in `EvalTask`."""
    harness: Group

    def aggregate(self, members: Mapping[str, Mapping[Key, Aggregate]]) -> dict[Key, Aggregate]:
        """The group's own rows from those of its members, weighted as the group's YAML says."""
        metrics: dict[str, Any] = {}
        for name, rows in members.items():
            metrics[name] = {"sample_len": max(row.n for row in rows.values())}
            for (filter_name, metric), row in rows.items():
                suffix = filter_name or "none"
                metrics[name][f"{metric},{suffix}"] = row.value
                metrics[name][f"{metric}_stderr,{suffix}"] = (
                    "N/A" if row.stderr is None else row.stderr
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
        self, task: "_Task", shots: int, limit: int | None, seed: int, groups: tuple[TaskGroup, ...]
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
        self._instances: list[list[Instance]] = []
        self._requests: list[Request] = []
        self._of_document: list[list[Request]] = []
        self._gold: list[int | None] = []
        self._lm: HFLM | None = None

    @property
    def documents(self) -> int:
        """How many documents are evaluated."""
        total = len(self._task.task_docs)
        return total if self.limit is None else min(self.limit, total)

    def requests(self, lm: HFLM) -> list[Request]:
        """All requests, document after document, tokenised and cut as `lm` itself does it.

        A generated answer is followed by a request for the loss on the gold target. The prompts are
        drawn once; the tokens are made once a harness model. Raises ValueError for a document
        that cannot be made into a prompt or does not fit the model's window.
        """
        if lm is not self._lm:
            if not self._instances:
                self._build()
            self._of_document, self._gold = [], []
            self.truncated = sum(
                self._tokenise(doc_id, instances, lm)
                for doc_id, instances in enumerate(self._instances)
            )
            self._requests = [r for requests in self._of_document for r in requests]
            self._lm = lm
            if self.truncated:
                logger.warning(
                    "%s, %d shots: %d of %d prompts are longer than the model's window and lose "
                    "their beginning, as in the harness",
                    *(self.name, self.shots, self.truncated, self.documents),
                )
        return self._requests

    def document_requests(self, doc_id: int) -> list[Request]:
        """The requests of one document, in the order in which `score` wants their outputs."""
        return self._of_document[doc_id]

    def fingerprint(self, doc_id: int) -> str:
        """Changes with anything that the scores of this document depend on, the model aside."""
        asked = [
            [r.kind, r.context, r.target, r.until, r.max_new_tokens]
            for r in self._of_document[doc_id]
        ]
        task, doc = self._task, self._instances[doc_id][0].doc
        content = [self.name, str(self.version), asked, task.doc_to_target(doc), self._gold[doc_id]]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]

    def score(self, doc_id: int, outputs: Sequence[Output]) -> Score:
        """Run one document's outputs through the task's filters and `process_results`."""
        requests = self._of_document[doc_id]
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
                values[(name, metric)] = _plain(value)
            if task.OUTPUT_TYPE == "generate_until":
                answers[name] = filtered[0]
        gold = self._gold[doc_id]
        loss = None
        if gold is not None:
            loss = (-outputs[gold].logprob, len(requests[gold].target))
        return Score(values, answers, loss)

    def aggregate(self, key: Key, values: Sequence[Any]) -> Aggregate:
        """The task's own aggregation of per-document values, as in `lm_eval.evaluate()`."""
        metric = key[1]
        function = self._task.aggregation().get(metric, mean)
        draws = 100 if metric in ("bleu", "chrf", "chrf++", "ter") else BOOTSTRAP_DRAWS
        stderr_of = stderr_for_metric(metric=function, bootstrap_iters=draws)
        stderr = float(stderr_of(values)) if stderr_of and len(values) > 1 else None
        return Aggregate(float(function(values)), stderr, len(values))

    def _build(self) -> None:
        """Draw the few-shot examples and let the harness write the prompts."""
        task = self._task
        # The sampler's state goes on from document to document, so it is set right before.
        task.set_fewshot_seed(self._seed)
        try:
            with _without_progress_bars():
                task.build_all_requests(limit=self.limit, rank=0, world_size=1)
        except Exception as error:  # a template or function of the task met a document it cannot do
            raise ValueError(
                f"task {self.name}: a document cannot be made into a prompt: {_reason(error)}"
            ) from error
        by_document: dict[int, list[Instance]] = {}
        for instance in task.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        assert list(by_document) == list(range(len(by_document)))
        self._instances = [sorted(i, key=lambda x: x.idx) for i in by_document.values()]

    def _tokenise(self, doc_id: int, instances: list[Instance], lm: HFLM) -> bool:
        """Make the requests of a document; whether one of its prompts was cut."""
        document = _Document(self.name, doc_id, lm)
        requests = [document.request(instance) for instance in instances]
        if any(r.kind == "loglikelihood" and not r.target for r in requests):
            raise ValueError(f"task {self.name}, document {doc_id}: an answer has no tokens")
        if instances[0].request_type != "generate_until":
            gold = self._gold_choice(instances[0].doc, len(instances))
        elif (instance := self._loss_instance(instances[0])) is not None:
            gold = len(requests)
            requests.append(document.request(instance))
        else:
            gold = None
        self._of_document.append(requests)
        self._gold.append(gold)
        return document.truncated

    def _loss_instance(self, instance: Instance) -> Instance | None:
        """The gold target after the same context, joined as in the few-shot examples."""
        task, doc, context = self._task, instance.doc, instance.args[0]
        target = task.doc_to_target(doc)
        if isinstance(target, list):  # several are right: the first one stands in the examples
            target = target[0] if target else ""
        if isinstance(target, int) and task.config.doc_to_choice is not None:
            target = task.doc_to_choice(doc)[target]
        if str(target) == "":
            return None
        if prefix := task.doc_to_prefix(doc):
            target = maybe_delimit(prefix, str(target))[len(prefix) :]
        else:
            target = f"{task.config.target_delimiter}{target}"
        return Instance(
            request_type="loglikelihood",
            doc=doc,
            arguments=(context, target),
            idx=1,
            metadata=(self.name, instance.doc_id, 1),
        )

    def _gold_choice(self, doc: Any, choices: int) -> int | None:
        """Which request holds the right answer, found as `process_results` does; None if none."""
        task = self._task
        if task.OUTPUT_TYPE == "loglikelihood":
            return 0
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if isinstance(gold, list):
            gold = gold[0] if gold else None
        if isinstance(gold, str):
            options = task.doc_to_choice(doc)
            gold = options.index(gold) if gold in options else None
        return gold if isinstance(gold, int) and 0 <= gold < choices else None


def load_tasks(
    specs: Sequence[tuple[str, int]],
    *,
    data_path: Path | None = None,
    limit: int | None = None,
    seed: int = FEWSHOT_SEED,
) -> list[EvalTask]:
    """The tasks named in `specs`, each as (name, shots); a group stands for its members.

    data_path: a folder that holds the split files (train, test, validation or dev, as .jsonl, .json
    or .parquet) or a subfolder of them per task (`gsm8k/`, `mmlu/<subject>/`), read in place of the
    hub; rows have the schema of the hub's data set. limit: only the first documents of each task.
    Raises ValueError for anything that is wrong with names, shots, limit, folder or files.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit {limit!r} is not a positive number of documents; null means all")
    if data_path is not None and not data_path.is_dir():
        what = "is a file, not a folder" if data_path.exists() else "does not exist"
        raise ValueError(f"evaluation data folder {data_path} {what}")
    loaded: list[EvalTask] = []
    for name, shots in specs:
        if type(shots) is not int or shots < 0:
            raise ValueError(f"task {name}: shots must be 0 or more, got {shots!r}")
        loaded += _load(definition(name), shots, data_path, limit, seed, ())
    if not loaded:
        raise ValueError("no evaluation task is given; name at least one, for example gsm8k")
    names = [(task.name, task.shots) for task in loaded]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"evaluation tasks are given more than once (name, shots): {repeated}")
    _check_folders(loaded)
    return loaded


class _Task(ConfigurableTask):
    """A task of the harness whose documents may come from files and are rendered once."""

    def __init__(
        self,
        config: dict[str, Any],
        splits: dict[str, datasets.Dataset] | None,
        folder: Path | None,
    ) -> None:
        self.folder = folder
        self._splits = splits
        self._rendered: dict[tuple[str, int, int], tuple[Any, Any]] = {}
        super().__init__(config=config)

    @property
    def task_name(self) -> str:
        # The harness's own makes up a name each time it is read, from the global random state.
        return self.config.task

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._splits is None:
            super().download(dataset_kwargs, **kwargs)
        else:
            self.dataset = self._splits

    def fewshot_docs(self) -> Any:
        """Without shots no examples are drawn, so their split need not be there."""
        return super().fewshot_docs() if self.config.num_fewshot else None

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        return self._once("text", super().doc_to_text, doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        return self._once("target", super().doc_to_target, doc, doc_to_target)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        return self._once("choice", super().doc_to_choice, doc, doc_to_choice)

    def _once(self, what: str, render: Callable[..., Any], doc: Any, template: Any) -> Any:
        """The harness compiles a template anew for every use, and few-shot examples recur."""
        key = (what, id(doc), id(template))
        if key not in self._rendered:
            # The document is kept, so that its id cannot become that of another one.
            self._rendered[key] = (render(doc, template), doc)
        return self._rendered[key][0]


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """The harness and datasets show a bar or more a task, which would drown the sweep's own."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _load(
    defined: Definition,
    shots: int,
    data_path: Path | None,
    limit: int | None,
    seed: int,
    groups: tuple[TaskGroup, ...],
) -> list[EvalTask]:
    """The tasks of a definition, with the groups among and around them."""
    if defined.members is None:
        task = _make_task(dict(defined.config), shots, data_path)
        return [EvalTask(task, shots, limit, seed, groups)]
    group = None
    if defined.config.get("aggregate_metric_list"):
        harness = Group.from_config(GroupConfig(**defined.config))
        group = TaskGroup(defined.config["group"], shots, limit, harness)
        groups = (*groups, group)
    loaded = []
    for member in defined.members:
        loaded += _load(member, shots, data_path, limit, seed, groups)
    if group is not None:
        for member_task in loaded:
            group.harness.add(member_task._task)
    return loaded


def _make_task(config: dict[str, Any], shots: int, data_path: Path | None) -> _Task:
    name = config["task"]
    for key in ("tag", "group", "task_list", "include"):
        config.pop(key, None)
    _check_kind(name, config, shots)
    config["num_fewshot"] = shots
    splits, folder = None, None
    if data_path is not None:
        splits, folder = read_splits(name, config, shots, data_path)
    elif is_own(name):
        raise ValueError(f"task {name} has no data of its own: name a folder by eval.data_path")
    try:
        with _without_progress_bars():
            task = _Task(config, splits, folder)
    except Exception as error:  # of the hub, of datasets, or of a template of the task
        raise ValueError(_load_failure(name, config, folder, error)) from error
    _check_shots(task, shots)
    return task


def _check_kind(name: str, config: dict[str, Any], shots: int) -> None:
    """Raises ValueError for tasks that cannot be asked greedily, one request at a time."""
    generation = config.get("generation_kwargs") or {}
    plain = {"do_sample", "temperature", "until", "max_gen_toks", "max_new_tokens", "max_tokens"}
    problem = None
    if "class" in config:
        problem = "is written in Python, not YAML"
    elif config.get("output_type") == "loglikelihood_rolling":
        problem = "asks for the likelihood of whole documents"
    elif config.get("doc_to_image") or config.get("doc_to_audio"):
        problem = "needs images or sound"
    elif config.get("unsafe_code"):
        problem = "runs code that the model wrote"
    elif config.get("repeats", 1) != 1:
        problem = f"asks for {config['repeats']} answers a document"
    elif generation.get("do_sample") or generation.get("temperature"):
        problem = "samples its answers"
    elif extra := sorted(generation.keys() - plain - {"top_p", "top_k"}):
        problem = f"sets generation options {extra}"
    if problem:
        raise ValueError(f"task {name} {problem}; this is not supported, choose another task")
    if config.get("num_fewshot") == 0 and shots:
        raise ValueError(
            f"task {name} fixes its number of shots at 0 (the harness ignores any other); "
            f"got {shots}"
        )


def _check_shots(task: _Task, shots: int) -> None:
    if not shots:
        return
    available = len(task.sampler.df)
    # Drawn from the evaluated split itself, one more is needed: the document may be among them.
    own_split = task.fewshot_cfg.split == task.config.test_split
    if shots > available - own_split:
        raise ValueError(
            f"task {task.task_name}: {shots} shots are more than its few-shot split can give "
            f"({available - own_split} examples)"
        )


def _load_failure(name: str, config: dict[str, Any], folder: Path | None, error: Exception) -> str:
    if folder is not None:
        return f"task {name} cannot use the data in {folder}: {_reason(error)}"
    return (
        f"the data of task {name} ({config.get('dataset_path')}) cannot be loaded: "
        f"{_reason(error)}. Without network use a local copy: eval.data_path=FOLDER"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, jinja2.UndefinedError | KeyError):
        return f"it lacks a field ({error})"
    return f"{type(error).__name__}: {error}"


def _check_folders(tasks: Sequence[EvalTask]) -> None:
    """Raises ValueError where several data sets would be read from the same files."""
    seen: dict[Path, tuple[str, Any]] = {}
    for task in [loaded._task for loaded in tasks]:
        if task.folder is None:
            continue
        identity = (task.config.dataset_path, task.config.dataset_name)
        first, known = seen.setdefault(task.folder, (task.task_name, identity))
        if known != identity:
            raise ValueError(
                f"{task.folder} would be read for {first} and for {task.task_name}, which are "
                f"different data sets; make a subfolder per task, for example "
                f"{task.folder / task.task_name}"
            )


class _Document:
    """Makes the requests of one document; what they share is tokenised and kept once."""

    def __init__(self, task: str, doc_id: int, lm: HFLM) -> None:
        self.truncated = False
        self._where = f"task {task}, document {doc_id}"
        self._doc_id = doc_id
        self._lm = lm
        self._encoded: dict[str, list[int]] = {}
        self._contexts: dict[tuple[int, ...], tuple[int, ...]] = {}

    def request(self, instance: Instance) -> Request:
        """The instance, tokenised and cut as HFLM does it."""
        if instance.request_type == "generate_until":
            return self._generation(instance)
        return self._loglikelihood(instance)

    def _generation(self, instance: Instance) -> Request:
        """As `HFLM.generate_until`: the context makes room for the answer at its beginning."""
        lm, (context, options) = self._lm, instance.args
        options = normalize_gen_kwargs(options, lm.max_gen_toks)
        room = lm.max_length - options["max_gen_toks"]
        if room < 1 or options["max_gen_toks"] < 1:
            raise ValueError(
                f"{self._where}: it asks for {options['max_gen_toks']} new tokens; allowed are 1 "
                f"to {lm.max_length - 1}, what the model's window has beside a token of context"
            )
        eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        return Request(
            kind="generate",
            doc_id=self._doc_id,
            context=self._cut(self._encode(context), room),
            target=(),
            until=tuple(handle_stop_sequences(options["until"], eos=eos)),
            max_new_tokens=options["max_gen_toks"],
            instance=instance,
        )

    def _loglikelihood(self, instance: Instance) -> Request:
        """As `HFLM.loglikelihood`: the pair loses its beginning where the window is too small."""
        lm, (context, continuation) = self._lm, instance.args
        if context:
            # Spaces between the two belong to the continuation, as tokenizers see them.
            stripped = context.rstrip()
            head = self._encode(stripped)
            target = lm.tok_encode(context + continuation)[len(head) :]
        else:
            target = lm.tok_encode(continuation, add_special_tokens=False)
            head = [lm.prefix_token_id]
            if target[:1] == head:
                head, target = target[:1], target[1:]
        if len(target) > lm.max_length:
            raise ValueError(
                f"{self._where}: its target has {len(target)} tokens, the model's window is "
                f"{lm.max_length} tokens"
            )
        return Request(
            kind="loglikelihood",
            doc_id=self._doc_id,
            # The last target token is never fed, hence the one more.
            context=self._cut(head, lm.max_length + 1 - len(target)),
            target=tuple(target),
            until=(),
            max_new_tokens=0,
            instance=instance,
        )

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._lm.tok_encode(text)
        return self._encoded[text]

    def _cut(self, tokens: list[int], room: int) -> tuple[int, ...]:
        """The last `room` tokens, as the one tuple that equal contexts of the document share."""
        self.truncated = self.truncated or len(tokens) > room
        kept = tuple(tokens[-room:])
        return self._contexts.setdefault(kept, kept)


def loss_aggregate(losses: Sequence[tuple[float, int]]) -> tuple[Aggregate, list[float]]:
    """Mean loss over all target tokens, from (nats, tokens) of each document, and its scores.

    value R = sum L / sum T; stderr of this ratio (delta method): sqrt(n/(n-1) sum (L - R T)^2) /
    sum T. The scores are the linearised contributions R + (L - R T) / mean(T): their mean is R and
    their standard error is that of R, so a bootstrap over documents needs nothing else.
    """
    nats = np.array([nats for nats, _ in losses], dtype=np.float64)
    tokens = np.array([tokens for _, tokens in losses], dtype=np.float64)
    n, ratio = len(losses), nats.sum() / tokens.sum()
    scores = ratio + (nats - ratio * tokens) / tokens.mean()
    stderr = math.sqrt(((scores - ratio) ** 2).sum() / (n * (n - 1))) if n > 1 else None
    return Aggregate(float(ratio), stderr, n), scores.tolist()


def _plain(value: Any) -> Any:
    """Numpy numbers and arrays as Python's own, so that they survive JSON unchanged."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
