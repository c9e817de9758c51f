"""`Row`, one measured number of a record, and how the scores of documents become rows.

Imports nothing heavy: reports read rows without torch, transformers or lm-eval.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np

logger = logging.getLogger(__name__)

RowKey = tuple[str, int, int | None, str | None, int, str, str, str | None]

Key = tuple[str | None, str]
"""(answer filter, metric); the harness's filter "none" is None here."""

LOSS: Key = (None, "loss")


@dataclass(frozen=True)
class Row:
    """One measured number: a metric of a task at one rank under one inference rule.

    task, shots: the harness's task name and the number of few-shot examples.
    limit: only the first `limit` documents were evaluated; None is all.
    filter: the harness's answer filter ("strict-match", ...); None where there is none.
    rank: 0 is the base model (rule "base"); 1..R a sub-rank.
    rule: "base" or one of `core.rules`.
    metric: "exact_match", "acc", "acc_norm", "loss", ...
    value, stderr: accuracies as fractions 0-1, loss in nats a token; None is not measured.
    n: documents behind the value.
    same_as: "rule@rank" of the point that is the same function, whose value is repeated here.
    trained_rank: False where the rank lies outside S, the sub-ranks of training; None where S has
        no meaning (base model, svd).
    scores: the per-document values in doc_id order, see `encode_scores`; None if not kept.
    fingerprint: of the documents, of the task's definition and of how the base generates; rows of
        two fingerprints are of two test sets. None in records that do not hold it.
    """

    task: str
    shots: int
    limit: int | None
    filter: str | None
    rank: int
    rule: str
    metric: str
    value: float | None
    stderr: float | None
    n: int
    same_as: str | None = None
    trained_rank: bool | None = None
    scores: str | list[float] | None = None
    fingerprint: str | None = None

    @property
    def key(self) -> RowKey:
        """What makes two rows the same measurement."""
        return (
            *(self.task, self.shots, self.limit, self.filter),
            *(self.rank, self.rule, self.metric, self.fingerprint),
        )


class ReadingFields(TypedDict):
    """The fields of a row that say how the adapter was read; see `Row`."""

    rank: int
    rule: str
    same_as: str | None
    trained_rank: bool | None


@dataclass(frozen=True)
class Score:
    """What the answers to one document are worth at one point.

    Holds only what JSON has (lists for tuples, no numpy), so that a score is the same before it is
    written to a file and after it is read back.
    """

    values: dict[Key, Any]
    """Per-document metrics of the harness; numbers, or lists for metrics like F1."""
    answers: dict[str | None, Any]
    """generate: filter -> filtered answer."""
    loss: tuple[float, int] | None
    """(negative log-likelihood of the gold target in nats, its tokens); None without a gold."""


@dataclass(frozen=True)
class Aggregate:
    """One number over documents; stderr is None where the harness gives none."""

    value: float
    stderr: float | None
    n: int


class Scored(Protocol):
    """A task, or a group of tasks, as the rows name it."""

    @property
    def name(self) -> str: ...
    @property
    def shots(self) -> int: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...


class ScoredTask(Scored, Protocol):
    """A task that aggregates the values of its documents."""

    def aggregate(self, key: Key, values: Sequence[Any]) -> Aggregate:
        """One metric over all documents."""
        ...


class ScoredGroup(Scored, Protocol):
    """A group that aggregates the aggregates of its member tasks."""

    def aggregate(self, members: Mapping[str, Mapping[Key, Aggregate]]) -> dict[Key, Aggregate]:
        """The group's metrics, from (task name -> metric -> aggregate)."""
        ...

    def weights_documents(self, metric: str) -> bool:
        """Whether the group's value is the mean over all documents of all members."""
        ...


def task_rows(
    task: ScoredTask, scores: Sequence[Score], readings: Sequence[ReadingFields]
) -> list[Row]:
    """The rows of a task at one point, the harness's first metric first and the loss last.

    scores: of all documents, in their order. readings: what the point is the answer to.
    """
    return [
        row
        for key, (aggregate, values) in _aggregates(task, scores).items()
        for row in _rows(task, key, aggregate, values, readings)
    ]


def group_rows(
    group: ScoredGroup,
    members: Sequence[tuple[ScoredTask, Sequence[Score]]],
    readings: Sequence[ReadingFields],
) -> list[Row]:
    """The group's metrics as the harness weights them, and its loss over all target tokens."""
    of_members = {task.name: _aggregates(task, scores) for task, scores in members}
    metrics = {
        name: {key: aggregate for key, (aggregate, _) in of_task.items() if key != LOSS}
        for name, of_task in of_members.items()
    }
    rows: list[Row] = []
    for key, aggregate in group.aggregate(metrics).items():
        values: list[Any] = []
        if group.weights_documents(key[1]):
            for of_task in of_members.values():
                values += of_task[key][1] if key in of_task else []
        rows += _rows(group, key, aggregate, values, readings)
    losses = [score.loss for _, scores in members for score in scores if score.loss is not None]
    if losses:
        rows += _rows(group, LOSS, *loss_aggregate(losses), readings)
    return rows


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


def encode_scores(scores: Iterable[float]) -> str | list[float]:
    """Per-document values in compact form.

    Values that are all 0 or 1 become a string of "0" and "1"; others a list rounded to six
    significant digits. Raises ValueError for NaN or infinity.
    """
    values = [float(s) for s in scores]
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"the score of document {index} is {value}, not a number")
    if all(value in (0.0, 1.0) for value in values):
        return "".join("1" if value else "0" for value in values)
    return [float(f"{value:.6g}") for value in values]


def decode_scores(encoded: str | Sequence[float]) -> list[float]:
    """The values behind `encode_scores`; raises ValueError for other characters or infinity."""
    if isinstance(encoded, str):
        if set(encoded) - {"0", "1"}:
            raise ValueError(f"scores must be a string of 0 and 1, got {encoded[:40]!r}")
        return [float(digit) for digit in encoded]
    if not all(map(math.isfinite, encoded)):
        raise ValueError("scores must be finite numbers")
    return [float(value) for value in encoded]


def merge_rows(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows of both; where two have the same key the later one stands.

    The order follows from the rows alone (task, shots, limit, metric, filter, rule, rank), so it
    does not depend on the order in which points were evaluated.
    """
    # Not at the top: the rules need torch, which reports do not load.
    from matryoshka_lora.core.rules import BASE, RULES

    place = {rule: index for index, rule in enumerate((BASE, *RULES))}

    def order(row: Row) -> tuple[Any, ...]:
        rule = place.get(row.rule, len(place))
        limit = -1 if row.limit is None else row.limit
        last = (rule, row.rule, row.rank, row.fingerprint or "")
        return (row.task, row.shots, limit, row.metric, row.filter or "", *last)

    merged = {row.key: row for row in (*old, *new)}
    return sorted(merged.values(), key=order)


def test_sets(rows: Iterable[Row]) -> dict[tuple[str, int, int | None, str | None], str | None]:
    """(task, shots, limit, fingerprint) -> its test set's name; None for the only one.

    rows: of one base model. No curve, mean or area may be over rows of two test sets.
    """
    keys = {(row.task, row.shots, row.limit, row.fingerprint) for row in rows}
    counts = Counter(key[:3] for key in keys)
    return {
        key: None
        if counts[key[:3]] == 1
        else f"test set {(key[3] or '')[:12] or 'of an older record'}"
        for key in keys
    }


def _aggregates(
    task: ScoredTask, scores: Sequence[Score]
) -> dict[Key, tuple[Aggregate, list[Any]]]:
    """Each metric over the documents, with the documents' own values."""
    result: dict[Key, tuple[Aggregate, list[Any]]] = {}
    for key in dict.fromkeys(key for score in scores for key in score.values):
        values = [score.values[key] for score in scores if key in score.values]
        result[key] = (task.aggregate(key, values), values)
    if losses := [score.loss for score in scores if score.loss is not None]:
        result[LOSS] = loss_aggregate(losses)
    for (name, metric), (_, values) in result.items():
        if len(values) < len(scores):
            logger.warning(
                "task %s: %d of %d documents have no %s%s, and its rows are over the others",
                *(task.name, len(scores) - len(values), len(scores), metric),
                f" ({name})" if name else "",
            )
    return result


def _rows(
    source: Scored,
    key: Key,
    aggregate: Aggregate,
    values: Sequence[Any],
    readings: Sequence[ReadingFields],
) -> list[Row]:
    """One number as a row for each reading; values: what documents are worth, if they are kept."""
    value, stderr = aggregate.value, aggregate.stderr
    finite = math.isfinite(value)
    if not finite:
        logger.warning(
            "%s is %s for task %s at rank %d (%s)",
            *(key[1], value, source.name, readings[0]["rank"], readings[0]["rule"]),
        )
    # Some metrics are no means of numbers (F1 counts pairs), others weight tasks, not documents.
    numbers = len(values) == aggregate.n and all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    )
    scores = encode_scores(values) if numbers else None
    return [
        Row(
            task=source.name,
            shots=source.shots,
            limit=source.limit,
            filter=key[0],
            metric=key[1],
            value=value if finite else None,
            stderr=stderr if stderr is not None and math.isfinite(stderr) else None,
            n=aggregate.n,
            scores=scores,
            fingerprint=source.fingerprint,
            **reading,
        )
        for reading in readings
    ]
