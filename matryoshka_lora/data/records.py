"""Records: read from files, the hub or the package's generator, checked, split, fingerprinted."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka_lora.config import DatasetConfig
from matryoshka_lora.core.errors import UserError, nearest
from matryoshka_lora.data import arithmetic
from matryoshka_lora.data.arithmetic import Split
from matryoshka_lora.data.files import SUFFIXES, find_file, read_rows
from matryoshka_lora.data.prompts import PROMPTS, texts

Record = Mapping[str, Any]
# Every run holds out the same records: the split belongs to the protocol, not to a run.
VALIDATION_SEED = 0


def load_records(config: DatasetConfig, split: Split = "train") -> list[Record]:
    """The records of a split, each checked for the fields that the dataset's prompt needs.

    Raises UserError: it names the file and the line if a folder or file is missing, empty or not
    JSON or a record lacks a field, and says what to do if the hub cannot be reached.
    """
    if config.name not in PROMPTS:
        raise UserError(
            f"dataset.name={config.name} is unknown; allowed: {', '.join(PROMPTS)}"
            f"{nearest(config.name, PROMPTS)}"
        )
    if config.path is not None:
        path = find_split(Path(config.path), split)
        source, records = str(path), read_file(path)
    elif config.hub is not None:
        source = f"{config.hub} ({split})"
        records = _read_hub(config, split)
    elif config.name == "arithmetic":
        source = f"arithmetic ({split})"
        records = list(arithmetic.records(split))
    else:
        raise UserError(
            f"dataset {config.name} has no source: set dataset.path=FOLDER or "
            "dataset.hub=REPOSITORY"
        )
    if not records:
        raise UserError(f"{source} holds no records")
    for number, record in enumerate(records, 1):
        for name in PROMPTS[config.name].fields:
            if not isinstance(record.get(name), str) or not record[name]:
                found = ", ".join(map(str, record)) or "nothing"
                raise UserError(
                    f"{source}, record {number}: field {name!r} is missing, empty or not text: "
                    f"{str(record.get(name))[:60]!r} (fields found: {found})"
                )
    return records[: config.limit] if split == "train" else records


def find_split(folder: Path, split: str) -> Path:
    """`<folder>/<split>.jsonl`, `.json` or `.parquet`; UserError if the folder has none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; it must hold {split}.jsonl")
    if (path := find_file(folder, split)) is not None:
        return path
    raise UserError(
        f"{folder} holds no {split}{{{','.join(SUFFIXES)}}}; "
        f"files there: {', '.join(sorted(p.name for p in folder.iterdir())) or 'none'}"
    )


def read_file(path: Path) -> list[Record]:
    """The records of a JSONL, JSON (a list) or Parquet file. Raises UserError naming the line."""
    rows = read_rows(path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}, {where}: expected an object, got {str(row)[:60]!r}")
    return [row for _, row in rows]


def _read_hub(config: DatasetConfig, split: str) -> list[Record]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = datasets.load_dataset(
            config.hub, config.subset, split=split, revision=config.revision
        )
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset {config.hub} (subset {config.subset}, revision {config.revision}) cannot be "
            f"read from the hub: {str(error).splitlines()[0] if str(error) else error!r}. For a "
            f"local copy of the same schema set dataset.path=FOLDER"
        ) from None
    return list(rows)


def split_validation(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records), both in the given order.

    Which records are held out depends only on how many there are and on `share`. Raises UserError
    if none is left to train on, and if none is held out although some were to be.
    """
    held_out = np.zeros(len(records), dtype=bool)
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(records))
    held_out[order[: round(len(records) * share)]] = True
    if held_out.all():
        raise UserError(
            f"dataset.validation={share} leaves no record of {len(records)} to train on"
        )
    if share and not held_out.any():
        raise UserError(
            f"dataset.validation={share} holds out none of {len(records)} records; raise it, or "
            "set it to 0"
        )
    train = [record for record, out in zip(records, held_out, strict=True) if not out]
    return train, [record for record, out in zip(records, held_out, strict=True) if out]


def fingerprint(records: Sequence[Record], config: DatasetConfig) -> str:
    """sha256 (hexadecimal) of the (prompt, answer) texts of the records, in order."""
    content = "\n".join(json.dumps(pair) for pair in texts(records, config))
    return hashlib.sha256(content.encode()).hexdigest()
