"""The samples files: how each document was answered at each point, and what the answers are worth.

There is one file a task and number of shots, with a line a (rank, rule, document). Files are only
appended to; rows are computed from them, and what stands in a file is never asked again.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import naming, parse_json
from matryoshka_lora.evaluation.engines.protocol import Output, Point
from matryoshka_lora.evaluation.rows import Key, Score
from matryoshka_lora.evaluation.tasks import EvalTask

logger = logging.getLogger(__name__)

Append = Callable[[Point, int, Sequence[Output], Score], None]


@dataclass(frozen=True)
class Sample:
    """One line of a file."""

    rank: int
    rule: str
    doc_id: int
    hash: str
    """Of all that the scores depend on: the document, its prompts, the task's filters, how the base
    generates, the adapter."""
    outputs: list[Any]
    """Of each request: the text, or [log-likelihood in nats, whether it is greedy]."""
    score: Score

    def line(self) -> str:
        """The sample as JSON; `parse` makes the same sample of it, but for the answers."""
        scores: dict[str, dict[str, Any]] = {}
        for (filter_name, metric), value in self.score.values.items():
            scores.setdefault(filter_name or "none", {})[metric] = value
        nats, tokens = self.score.loss or (None, None)
        content = {
            "rank": self.rank,
            "rule": self.rule,
            "doc_id": self.doc_id,
            "hash": self.hash,
            "outputs": self.outputs,
            "answers": {name or "none": answer for name, answer in self.score.answers.items()},
            "scores": scores,
            "loss_sum": nats,
            "target_tokens": tokens,
        }
        return json.dumps(content, ensure_ascii=False)

    def check(self) -> None:
        """Raises ValueError where an aggregate over documents would silently leave this one out.

        A score or a loss may be NaN or infinite only where the model's own answer is.
        """
        answers_are_numbers = all(
            isinstance(output, str) or math.isfinite(output[0]) for output in self.outputs
        )
        if not self.score.values:
            raise ValueError("it has no scores")
        for (_, metric), value in self.score.values.items():
            # Lists are for metrics that are no means, and NaN may have a meaning in them (bbq).
            if not isinstance(value, int | float | list | dict):
                raise ValueError(f"its {metric} is {value!r}, not a number")
            if answers_are_numbers and isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"its {metric} is {value}, not a number")
        if self.score.loss is not None:
            nats, tokens = self.score.loss
            if tokens < 1:
                raise ValueError(f"its target_tokens are {tokens}")
            if answers_are_numbers and not math.isfinite(nats):
                raise ValueError(f"its loss_sum is {nats}, not a number")


def parse(line: Any) -> Sample:
    """The sample behind a decoded line, without its answers; ValueError says what is wrong."""
    if not isinstance(line, dict):
        raise ValueError(f"expected an object, got {str(line)[:60]!r}")
    outputs, loss, tokens = (_field(line, key) for key in ("outputs", "loss_sum", "target_tokens"))
    if not isinstance(outputs, list) or not all(map(_is_output, outputs)):
        raise ValueError(f"its outputs are {str(outputs)[:60]}")
    if (loss is None) != (tokens is None):
        raise ValueError(f"its loss_sum is {loss}, but its target_tokens are {tokens}")
    if loss is not None and not (_is_number(loss) and type(tokens) is int):
        raise ValueError(f"its loss_sum is {loss!r}, its target_tokens are {tokens!r}")
    _typed(line, "answers", dict)
    values: dict[Key, Any] = {}
    for name, metrics in _typed(line, "scores", dict).items():
        if not isinstance(metrics, dict) or not metrics:
            raise ValueError(f"its scores of filter {name!r} are {metrics!r}")
        for metric, value in metrics.items():
            values[(None if name == "none" else name, metric)] = value
    sample = Sample(
        rank=_natural(line, "rank"),
        rule=_typed(line, "rule", str),
        doc_id=_natural(line, "doc_id"),
        hash=_typed(line, "hash", str),
        outputs=outputs,
        score=Score(values, {}, None if loss is None else (loss, tokens)),
    )
    sample.check()
    return sample


def samples_path(folder: Path, task: EvalTask) -> Path:
    """Where the samples of a task are; a harness name may hold characters that a file's cannot."""
    return folder / f"{task.name.replace('/', '_').replace(':', '_')}-{task.shots}.jsonl"


class Samples:
    """The scores of one task, in memory and as lines of its file.

    identity: goes into every hash; samples of another one (another adapter) are not used. Raises
    UserError for a file with a damaged line, unless it is a last one that was not written whole.
    """

    def __init__(self, folder: Path, task: EvalTask, identity: str) -> None:
        self.task = task
        self.path = samples_path(folder, task)
        self._hashes = [
            f"{task.document_fingerprint(doc)}{identity}" for doc in range(task.documents)
        ]
        self._scores: dict[tuple[int, str], dict[int, Score]] = {}
        if self.path.exists():
            self._read()

    def missing(self, point: Point) -> set[int]:
        """The documents that `point` has no sample of."""
        return set(range(self.task.documents)).difference(self._at(point))

    def scores(self, point: Point) -> list[Score]:
        """All documents' scores at a complete point, in the order of the documents."""
        found = self._at(point)
        return [found[doc_id] for doc_id in range(self.task.documents)]

    @contextmanager
    def appending(self) -> Iterator[Append]:
        """A function that appends a document's outputs and their score to the file."""
        kept = "what is in it stays; mend that and run the same command again"
        with naming(self.path, kept):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a", encoding="utf-8")
        with file:

            def append(point: Point, doc_id: int, outputs: Sequence[Output], score: Score) -> None:
                sample = self._sample(point, doc_id, outputs, score)
                with naming(self.path, kept):
                    file.write(sample.line() + "\n")
                    # A killed process loses what it holds itself, not what the system has.
                    file.flush()
                self._keep(sample)

            yield append

    def _sample(self, point: Point, doc_id: int, outputs: Sequence[Output], score: Score) -> Sample:
        requests = self.task.document_requests(doc_id)
        sample = Sample(
            rank=point.rank,
            rule=point.rule,
            doc_id=doc_id,
            hash=self._hashes[doc_id],
            outputs=[
                o.text if r.kind == "generate" else [o.logprob, o.is_greedy]
                for r, o in zip(requests, outputs, strict=True)
            ],
            score=score,
        )
        try:
            sample.check()
        except ValueError as error:
            raise UserError(
                f"task {self.task.name}, document {doc_id} at rank {point.rank} ({point.rule}): "
                f"the harness scores it, but {error}; choose another task"
            ) from error
        return sample

    def _at(self, point: Point) -> dict[int, Score]:
        return self._scores.setdefault((point.rank, point.rule), {})

    def _keep(self, sample: Sample) -> None:
        # The answers are of use in the file alone, and long.
        score = replace(sample.score, answers={})
        self._scores.setdefault((sample.rank, sample.rule), {})[sample.doc_id] = score

    def _read(self) -> None:
        """Keep the samples of the file, and drop a last line that was not written whole."""
        data = self.path.read_bytes()
        lines = data.split(b"\n")
        whole, stale = len(data) - len(lines.pop()), 0
        for number, line in enumerate(lines, 1):
            try:
                decoded = parse_json(line, number)
            except ValueError as error:
                if number < len(lines):
                    raise self._damaged(number, error) from error
                whole -= len(line) + 1
                continue
            try:
                sample = parse(decoded)
            except ValueError as error:
                raise self._damaged(number, error) from error
            if sample.doc_id >= len(self._hashes):
                continue  # beyond the limit, and of use again without it
            if sample.hash == self._hashes[sample.doc_id]:
                self._keep(sample)
            else:
                stale += 1
        if whole < len(data):
            logger.warning("%s: its last line was not written whole and is dropped", self.path)
            with self.path.open("r+b") as file:
                file.truncate(whole)
        if stale:
            logger.info(
                "%s: %d samples are of other documents, prompts or adapters and are not used",
                *(self.path, stale),
            )

    def _damaged(self, number: int, error: ValueError) -> UserError:
        return UserError(
            f"{self.path} is damaged at line {number} ({error}); it is left alone. "
            "Restore it, or move it away to evaluate anew"
        )


def _field(line: dict[str, Any], name: str) -> Any:
    if name not in line:
        raise ValueError(f"field {name!r} is missing")
    return line[name]


def _typed(line: dict[str, Any], name: str, kind: type) -> Any:
    value = _field(line, name)
    if not isinstance(value, kind):
        raise ValueError(f"field {name!r}: expected {kind.__name__}, got {str(value)[:60]!r}")
    return value


def _natural(line: dict[str, Any], name: str) -> int:
    value = _field(line, name)
    if type(value) is not int or value < 0:
        raise ValueError(f"field {name!r} is {str(value)[:60]!r}, not a number from 0 on")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_output(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == 2 and _is_number(value[0]) and isinstance(value[1], bool)
    return isinstance(value, str)
