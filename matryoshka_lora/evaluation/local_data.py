"""Local copies of the data of evaluation tasks, checked as they are read."""

from bisect import bisect_left
from pathlib import Path
from typing import Any

import datasets
import lm_eval.utils
import pyarrow
from jinja2 import meta

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.data.files import SUFFIXES, find_file, read_rows


def read_splits(
    name: str, config: dict[str, Any], shots: int, data_path: Path
) -> tuple[dict[str, datasets.Dataset], Path]:
    """The splits that a task needs, by name, and the folder at or below `data_path` they are in.

    config: the task's definition. Raises UserError for a folder or file that is missing or empty,
    for what is not JSON (with its line), and for a document that lacks a field the task needs.
    """
    folder = _data_folder(name, config, data_path)
    splits = {
        split: _read_split(folder, split, _needed_fields(config, split))
        for split in _needed_splits(config, shots)
    }
    return splits, folder


def _needed_splits(config: dict[str, Any], shots: int) -> list[str]:
    """The split that is evaluated and, if shots are drawn, the one that they come from."""
    evaluated = config.get("test_split") or config.get("validation_split")
    fewshot = config.get("fewshot_config") or {}
    drawn = fewshot.get("split") or config.get("fewshot_split")
    if not drawn and not fewshot.get("samples"):
        drawn = config.get("training_split") or config.get("validation_split") or evaluated
    wanted = [evaluated, drawn] if shots else [evaluated]
    return list(dict.fromkeys(split for split in wanted if split))


def _needed_fields(config: dict[str, Any], split: str) -> set[str] | None:
    """Fields that the task's templates name; None if functions decide, which say nothing."""
    fewshot = config.get("fewshot_config") or {}
    keys = ("doc_to_text", "doc_to_target", "doc_to_choice")
    used = [config.get(key) for key in keys]
    if split != (config.get("test_split") or config.get("validation_split")):
        used = [fewshot.get(key) or config.get(key) for key in keys]
    used += [config.get("description"), config.get("gen_prefix")]
    functions = [config.get("process_docs"), config.get("process_results"), *used]
    if any(callable(value) for value in (*functions, fewshot.get("process_docs"))):
        return None
    needed: set[str] = set()
    for value in used:
        if isinstance(value, str):
            found = meta.find_undeclared_variables(lm_eval.utils.env.parse(value))
            # A template without variables may be a field's name instead, as mmlu's "answer".
            needed |= found or ({value} if value in used[:3] and value.isidentifier() else set())
    return needed


def _data_folder(name: str, config: dict[str, Any], data_path: Path) -> Path:
    """The first folder at or below `data_path` that holds split files for this task."""
    repository = str(config.get("dataset_path") or name).rpartition("/")[2]
    subset = str(config.get("dataset_name") or "")
    places = [name, f"{repository}/{subset}", repository, subset, ""]
    folders = list(dict.fromkeys(data_path / place for place in places))
    for folder in folders:
        if folder.is_dir() and any(p.suffix in SUFFIXES for p in folder.iterdir()):
            return folder
    raise UserError(
        f"evaluation data folder {data_path} holds nothing for task {name}: no "
        f"{'/'.join(_needed_splits(config, 0))}{{{','.join(SUFFIXES)}}} there or in a subfolder "
        f"{name}"
    )


def _read_split(folder: Path, split: str, needed: set[str] | None) -> datasets.Dataset:
    """The documents of a split file; UserError names the file and the line that is wrong."""
    path = find_file(folder, split)
    if path is None:
        found = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
        raise UserError(
            f"{folder} has no {split}{{{','.join(SUFFIXES)}}}; it holds {', '.join(found)}"
        )
    documents = read_rows(path)
    if not documents:
        raise UserError(f"{path} is empty")
    for where, document in documents:
        if not isinstance(document, dict):
            raise UserError(f"{path}, {where}: expected an object, got {str(document)[:60]!r}")
        if needed is None:
            missing = [key for key in documents[0][1] if key not in document]
        else:
            missing = sorted(key for key in needed if document.get(key) is None)
        if missing:
            raise UserError(
                f"{path}, {where}: field {missing[0]!r} is missing; it has {', '.join(document)}"
            )
    try:
        return datasets.Dataset.from_list([document for _, document in documents])
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are these
        raise UserError(
            f"{path}{_first_unfit(documents)}: all documents have to have fields of the "
            f"same types ({error})"
        ) from error


def _first_unfit(documents: list[tuple[str, Any]]) -> str:
    """Where pyarrow first meets a value that does not fit those before it; empty if in no field."""
    for field in documents[0][1]:
        column = [document.get(field) for _, document in documents]

        def is_unfit(last: int, column: list[Any] = column) -> bool:
            try:
                pyarrow.array(column[: last + 1])
            except (ValueError, TypeError, OverflowError):
                return True
            return False

        first = bisect_left(range(len(column)), True, key=is_unfit)
        if first < len(column):
            return f", {documents[first][0]}, field {field!r}"
    return ""
