"""Local files: rows read with their place in the file, and writing that is never half done."""

import json
import os
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


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data` so that no reader ever sees half of it; makes missing folders.

    The temporary file lies in the same folder, because a rename is atomic only within one file
    system. On an OSError (a full disk) the old file is untouched and the temporary one removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:  # an interrupt, too, must not leave the temporary file
            # With a file in the folder's place there is nothing to remove.
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"cannot write {path} ({reason}); an older version of this "
            "file, if there was one, is unchanged",
        ) from error
