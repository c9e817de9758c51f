"""How far a run is: trained, finished, to be gone on with, or failed."""

import dataclasses
import logging

from matryoshka_lora.config import Config, wanted_points
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.record import Record, read_record, write_record

logger = logging.getLogger(__name__)


def is_trained(folder: RunFolder, record: Record) -> bool:
    """Whether training has ended and the adapter is there to be read."""
    return record.training is not None and folder.adapter.is_file()


def finished_record(config: Config, folder: RunFolder) -> Record | None:
    """The run's record if training and every point asked for are in it. UserError if corrupt."""
    if config.force or not folder.record.exists():
        return None
    record = read_record(folder.record)
    measured = set((record.evaluation or {}).get("finished", ()))
    complete = record.status == "finished" and measured.issuperset(wanted_points(config))
    return record if complete else None


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
