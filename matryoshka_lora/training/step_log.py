"""The log of a training: one line a step in `train.jsonl`, and progress."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import naming, parse_json, write_atomically
from matryoshka_lora.ops.device import to_host

logger = logging.getLogger(__name__)

FILE = "train.jsonl"
# Between two progress lines, and the steps that their speed is averaged over.
PROGRESS_SECONDS, PROGRESS_STEPS = 5.0, 50


@dataclass(frozen=True)
class _Step:
    """A step whose values are still on their way from the device."""

    number: int
    records: list[int]
    values: Callable[[], dict[str, Tensor]]
    known: dict[str, Any]


class StepLog:
    """Writes `train.jsonl` and shows progress; a context manager that closes the file.

    It reads the values of a step only after the next step was started, so that the device never
    waits for the host. So a non-finite loss is noticed at the latest one step after it came up, and
    always before the next checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        writes: bool,
        on_step: Callable[[dict[str, Any]], None],
    ) -> None:
        """steps: of the training. writes: whether this process writes the file.

        on_step: what to call with each entry of the log, in the process that writes.
        """
        self.path = folder / FILE
        self.steps = steps
        self.writes = writes
        self.on_step = on_step
        self.entries: list[dict[str, Any]] = []
        self._pending: _Step | None = None
        self._shown = time.monotonic()
        self._file: TextIO | None = None

    def start(self, first: int) -> None:
        """Keep the entries of the steps before `first` and drop later ones: they are done again.

        Raises UserError if the file is damaged, or lacks entries of steps that the checkpoint has
        behind it.
        """
        if self.path.is_file():
            # What follows the last newline is half a line that a killed process left.
            lines = self.path.read_bytes().split(b"\n")[:-1]
            self.entries = [self._entry(number, line) for number, line in enumerate(lines[:first])]
        if len(self.entries) < first and self.writes:
            raise UserError(
                f"{self.path} has {len(self.entries)} rows, its checkpoint is of step {first}; "
                "restore the file, or set force=true to train again"
            )
        if self.writes:
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
            write_atomically(self.path, text.encode())
            self._file = self.path.open("a")

    def _entry(self, step: int, line: bytes) -> dict[str, Any]:
        """The entry of a step, counted from 0. Raises UserError unless it is that step's."""
        try:
            entry = parse_json(line, step + 1)
            fits = isinstance(entry, dict) and entry.get("step") == step
            needed = ("loss", "tokens", "label_tokens", "seconds")
            if fits and all(isinstance(entry.get(key), int | float) for key in needed):
                return entry
            reason = f"no entry of step {step} at line {step + 1}"
        except UserError as error:
            reason = str(error)
        raise UserError(
            f"{self.path} is damaged ({reason}); restore the file, or set force=true to train again"
        )

    def add(
        self, step: int, records: list[int], tensors: dict[str, Tensor], known: dict[str, Any]
    ) -> None:
        """Log a step, counted from 0: values on the device, and values that the host knows."""
        # The copy starts now: one that is started later waits for the next step's work.
        values = to_host(tensors)
        self.flush()
        self._pending = _Step(step, records, values, known)

    def sync(self) -> None:
        """`flush`, and have all entries on the disk: a checkpoint must not be ahead of them."""
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def flush(self) -> None:
        """Read the values of the last step, write its entry, show progress.

        Raises FloatingPointError, naming step and records, if loss or gradient norm is not finite.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        values: dict[str, Any] = {name: tensor.tolist() for name, tensor in step.values().items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(
                f"step {step.number + 1}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}; training records of the step, counted from 1: "
                f"{step.records}. Lower trainer.lr, or look at these records"
            )
        before = self.entries[-1]["seconds"] if self.entries else 0.0
        speed = step.known["tokens"] / max(step.known["seconds"] - before, 1e-9)
        entry = {"step": step.number, **values, **step.known, "tokens_per_second": speed}
        self.entries.append(entry)
        if self._file is None:
            return
        with naming(self.path, "mend that and run the same command again"):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        self.on_step(entry)
        waited = time.monotonic() - self._shown
        if waited > PROGRESS_SECONDS or step.number + 1 in (1, self.steps):
            self._show_progress()

    def _show_progress(self) -> None:
        self._shown = time.monotonic()
        last = self.entries[-1]
        window = self.entries[-PROGRESS_STEPS:]
        done = len(self.entries)
        start = self.entries[-PROGRESS_STEPS - 1]["seconds"] if done > PROGRESS_STEPS else 0.0
        seconds = last["seconds"] - start
        logger.info(
            "step %d/%d  loss %.4f  %.0f tokens/s  %s left",
            done,
            self.steps,
            last["loss"],
            sum(entry["tokens"] for entry in window) / seconds,
            timedelta(seconds=round(seconds / len(window) * (self.steps - done))),
        )

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def summary(self, peak_memory_gib: float | None) -> dict[str, Any]:
        """Of the whole training, for the record; `final_loss` is the mean of the last 10 steps."""
        last = self.entries[-10:]
        seconds = self.entries[-1]["seconds"]
        tokens = sum(entry["tokens"] for entry in self.entries)
        return {
            "steps": len(self.entries),
            "tokens": tokens,
            "label_tokens": sum(entry["label_tokens"] for entry in self.entries),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": peak_memory_gib,
            "first_loss": self.entries[0]["loss"],
            "final_loss": sum(entry["loss"] for entry in last) / len(last),
        }
