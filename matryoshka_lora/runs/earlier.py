"""Finding the folder of a run, also where an older version gave it another hash."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_lora.config import Config, read_config, run_hash
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.runs.folder import RECORD, run_path
from matryoshka_lora.runs.record import read_record


class Place(NamedTuple):
    """Where a run is, or will be."""

    folder: Path
    doubtful: str | None = None
    """One line on an earlier run that may be the same, but whose record does not tell."""


def find_run(config: Config, model: Mapping[str, Any], data_fingerprint: str) -> Place:
    """The folder of this run, named after today's hash unless an older version made it.

    model: the base model's identity. What an earlier record holds is compared by today's rules.
    """
    own = run_path(config, run_hash(config, model, data_fingerprint))
    if own.exists():
        return Place(own)
    doubtful = None
    for path in sorted(own.parent.glob(f"{own.name.rpartition('-')[0]}-*/{RECORD}")):
        try:
            record = read_record(path)
            theirs = read_config(record.config, str(path))
        except UserError:  # of another version, or damaged
            continue
        known = {key: record.model[key] for key in model if key in record.model}
        if run_hash(theirs, known, record.data.get("fingerprint", "")) != run_hash(
            config, {key: model[key] for key in known}, data_fingerprint
        ):
            continue
        if lacking := [key for key in model if key not in known]:
            doubtful = (
                f"{path.parent} has the same settings and data, but its record does not hold the "
                f"base's {' and '.join(lacking)}, so it may be of another base: the run is made "
                "anew"
            )
        else:
            return Place(path.parent)
    return Place(own, doubtful)
