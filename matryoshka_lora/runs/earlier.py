"""Finding the folder of a run, also where an older version gave it another hash."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_lora.config import Config, affecting, read_config, run_hash
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.runs.folder import RECORD, run_path
from matryoshka_lora.runs.record import Record, read_record


class Place(NamedTuple):
    """Where a run is, or will be."""

    folder: Path
    doubtful: str | None = None
    """One line on an earlier run that may be the same, but whose record does not tell."""


def find_run(config: Config, model: Mapping[str, Any], data_fingerprint: str) -> Place:
    """The folder of this run, named after today's hash unless an older version made it.

    model: the base model's identity. What an earlier record holds is compared by today's rules.
    Raises UserError where the folder holds the record of another run, unless it is to be replaced.
    """
    own = run_path(config, run_hash(config, model, data_fingerprint))
    if own.exists():
        if not config.force:
            _check_own(own / RECORD, config, model, data_fingerprint)
        return Place(own)
    doubtful = None
    for path in sorted(own.parent.glob(f"{own.name.rpartition('-')[0]}-*/{RECORD}")):
        try:
            record = read_record(path)
        except UserError:  # of another version, or damaged
            continue
        if not may_be(record, config, model, data_fingerprint):
            continue
        if lacking := [key for key in model if key not in record.model]:
            doubtful = (
                f"{path.parent} has the same settings and data, but its record does not hold the "
                f"base's {' and '.join(lacking)}, so it may be of another base: the run is made "
                "anew"
            )
        else:
            return Place(path.parent)
    return Place(own, doubtful)


def _check_own(path: Path, config: Config, model: Mapping[str, Any], data_fingerprint: str) -> None:
    """Raise UserError where a record tells that it was copied from another run's folder."""
    try:
        record = read_record(path)
        theirs = affecting(read_config(record.config, record.name), "adapter")
    except (OSError, UserError):  # none, damaged, or of another version: for others to tell
        return
    if may_be(record, config, model, data_fingerprint):
        return
    own = affecting(config, "adapter")
    other = [key for key in own if own[key] != theirs.get(key)]
    what = ", ".join(f"{key}={theirs.get(key)}" for key in other) or "another base model or data"
    raise UserError(
        f"{path} is of another run than its folder, with {what}; restore the run's own record, or "
        "move the folder away to run again"
    )


def may_be(record: Record, config: Config, model: Mapping[str, Any], data_fingerprint: str) -> bool:
    """Whether nothing that the record holds speaks against its being of this run.

    By today's rules, whatever its hash is. A record of an older version may hold less of the base.
    """
    try:
        theirs = read_config(record.config, record.name)
    except UserError:  # of another version
        return False
    known = {key: value for key, value in record.model.items() if key in model}
    return run_hash(theirs, known, record.data.get("fingerprint", "")) == run_hash(
        config, {key: model[key] for key in known}, data_fingerprint
    )
