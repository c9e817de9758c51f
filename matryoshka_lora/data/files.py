"""Rows of local files, each with its place in the file."""

from pathlib import Path
from typing import Any

import pyarrow.parquet

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import parse_json

SUFFIXES = (".jsonl", ".json", ".parquet")


def find_file(folder: Path, split: str) -> Path | None:
    """`<folder>/<split>.jsonl`, `.json` or `.parquet`; None where the folder has none.

    Raises UserError where it has several, or where that name is not a file's.
    """
    paths = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    # Where it leads nowhere a link does not exist, and is there nevertheless.
    found = [path for path in paths if path.exists() or path.is_symlink()]
    if len(found) > 1:
        raise UserError(
            f"{folder} holds {' and '.join(path.name for path in found)}; leave one of them there"
        )
    for path in found:
        if not path.is_file():
            raise UserError(
                f"{path} is no file, or a link that leads to none; put the {split} records there"
            )
    return found[0] if found else None


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """(where it stands, row) for each row of a JSONL, JSON (a list) or Parquet file.

    Raises UserError naming the file, and the line of what is not JSON.
    """
    if path.suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        # The first two: of a damaged file, of a name that two columns have, of bytes that are no
        # text. The last: of a type that this pyarrow does not know.
        except (OSError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read as a Parquet file: {reason}") from error
        return [(f"row {n}", row) for n, row in enumerate(rows, 1)]
    try:
        data = path.read_bytes()
        if path.suffix == ".json":
            content = parse_json(data)
            if not isinstance(content, list):
                raise UserError("something else: expected a list of objects")
            return [(f"entry {n}", row) for n, row in enumerate(content, 1)]
        # Not splitlines(), which also splits at separators that JSON strings may hold.
        lines = enumerate(data.split(b"\n"), 1)
        return [(f"line {n}", parse_json(line, n)) for n, line in lines if line.strip()]
    except UserError as error:
        raise UserError(f"{path} is {error}") from error
