"""How far a run is: trained, finished, to be gone on with, or failed; and what is added to it."""

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matryoshka_lora.config import Config
from matryoshka_lora.evaluation.rows import Row, merge_rows
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.record import Record, read_record, write_record

logger = logging.getLogger(__name__)


def is_trained(folder: RunFolder, record: Record) -> bool:
    """Whether training has ended and the adapter is there to be read."""
    return record.training is not None and folder.adapter.is_file()


def has_points(record: Record, wanted: Collection[str]) -> bool:
    """Whether every point of `config.wanted_points` is in the record."""
    return set((record.evaluation or {}).get("finished", ())).issuperset(wanted)


def finished_record(folder: RunFolder, wanted: Collection[str]) -> Record | None:
    """The run's record if training and every wanted point are in it. UserError if corrupt."""
    if not folder.record.exists():
        return None
    record = read_record(folder.record)
    return record if record.status == "finished" and has_points(record, wanted) else None


def open_record(config: Config, folder: RunFolder, fresh: Record) -> Record:
    """The run's record so far, made ready to go on, or `fresh`; nothing is written."""
    if not folder.record.exists():
        return fresh
    record = read_record(folder.record)
    # Where it was trained stays; what it is evaluated with now is added to what it has.
    record.config["eval"] = dataclasses.asdict(config.eval)
    record.error = None
    if not is_trained(folder, record):
        record.status = "training"
    elif record.status != "finished":
        record.status = "evaluating"
    return record


def record_failure(folder: RunFolder, record: Record, error: Exception) -> None:
    """Write into the record why this start failed."""
    record.error = f"{type(error).__name__}: {error}"
    # What a finished run has stays of use, whatever becomes of further points.
    if record.status != "finished":
        record.status = "failed"
    try:
        write_record(folder.record, record)
    except (OSError, ValueError) as other:  # the disk, or the record, may be what failed
        logger.error("%s", other)


@contextmanager
def replacing(folder: RunFolder, replace: bool) -> Iterator[Callable[[], None]]:
    """Let a run begin anew in its folder, while the old one is set aside.

    Yields what is to be called when the new run has begun to train: the old one is then removed. If
    it never comes to that, the old one is put back, here or, after a kill, at the next start.
    """
    if folder.replaced.exists():
        _put_back(folder)
    if replace and folder.path.exists():
        os.rename(folder.path, folder.replaced)
    try:
        yield lambda: shutil.rmtree(folder.replaced, ignore_errors=True)
    finally:
        if folder.replaced.exists():
            _put_back(folder)


def _put_back(folder: RunFolder) -> None:
    if folder.train_log.exists() and folder.train_log.stat().st_size:
        shutil.rmtree(folder.replaced)  # its successor has begun; only its removal was cut short
        return
    if folder.path.exists():
        shutil.rmtree(folder.path)
    os.rename(folder.replaced, folder.path)


class Additions:
    """The rows that an evaluation adds to a record, which is saved at each point.

    phase: the entry of `Record.phases` for it; it is added with the first row that is computed.
    """

    def __init__(self, record: Record, folder: RunFolder, phase: dict[str, Any]) -> None:
        self._record, self._folder, self._phase = record, folder, phase
        self._facts: dict[str, Any] = {"seconds": 0.0, "finished": [], **(record.evaluation or {})}
        record.evaluation = self._facts
        self._spent, self._began = self._facts["seconds"], time.monotonic()

    def add(self, rows: Sequence[Row], computed: bool) -> None:
        """Merge rows into the record; computed: they are this evaluation's own work."""
        self._record.rows = merge_rows(self._record.rows, rows)
        if computed:
            if not any(phase is self._phase for phase in self._record.phases):
                self._record.phases.append(self._phase)
            points: dict[str, list[str]] = self._phase.setdefault("rows", {})
            for row in rows:
                of_task = points.setdefault(f"{row.task}:{row.shots}", [])
                if (point := f"{row.rule}@{row.rank}") not in of_task:
                    of_task.append(point)
        self._save()

    def finish(self, points: Collection[str], **facts: Any) -> None:
        """All of `points`, as `config.wanted_points` names them, are in the record now."""
        self._facts["finished"] = sorted({*self._facts["finished"], *points})
        self._facts |= facts
        self._save()

    def _save(self) -> None:
        self._facts["seconds"] = self._spent + time.monotonic() - self._began
        write_record(self._folder.record, self._record)
