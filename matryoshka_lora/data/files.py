"""Rows of local files, each with its place in the file."""

from pathlib import Path
from typing import Any

import pyarrow.parquet

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import parse_json

SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """(where it stands, row) for each row of a JSONL, JSON (a list) or Parquet file.

    Raises UserError naming the file, and the line of what is not JSON.
    """
    if path.suffix == ".parquet":
        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a Parquet file: {error}") from error
        return [(f"row {n}", row) for n, row in enumerate(table.to_pylist(), 1)]
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
