"""Rows of local files, each with its place in the file."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet

SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """(where it stands, row) for each row of a JSONL, JSON (a list) or Parquet file.

    Raises ValueError naming the file, and the line of what is not JSON.
    """
    if path.suffix == ".parquet":
        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
        return [(f"row {n}", row) for n, row in enumerate(table.to_pylist(), 1)]
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
            if not isinstance(content, list):
                raise ValueError(f"{path}: expected a list of objects")
            return [(f"entry {n}", row) for n, row in enumerate(content, 1)]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON at line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    rows = []
    # Not splitlines(), which also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON at line {number}: {error.msg}") from error
    return rows
