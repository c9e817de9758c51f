"""The run record `record.json`: its schema, atomic write and strict read.

A record alone is enough for every table, plot and bootstrap. A missing number is null, never 0;
NaN and infinity are refused. A record that does not follow the schema is named and left alone.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.evaluation.rows import Row, RowKey, decode_scores

SCHEMA = 1
RULES = ("base", "prefix", "trained", "svd")
Status = Literal["training", "evaluating", "finished", "failed"]

_PACKAGES = (
    "matryoshka-lora",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "lm_eval",
    "hydra-core",
    "omegaconf",
    "numpy",
    "pandas",
    "matplotlib",
    "wandb",
)


@dataclass
class Record:
    """Everything known about one run.

    config: the resolved config. run_hash: hash over the fields that change the adapter.
    git: {"sha", "dirty"} of the code, None outside a checkout. versions: package -> version.
    device: what computed it. model: identity of the base model that was really loaded.
    data: fingerprint and counts of used, truncated and fully masked examples.
    training: steps, tokens, label_tokens, seconds, tokens_per_second, peak_memory_gib, loss, ...
    evaluation: seconds, engine, ...; None before there is any. diagnostics: anything else measured.
    error: one line that says why the last start failed; a finished run may have one, too.
    """

    status: Status
    name: str
    config: dict[str, Any]
    run_hash: str
    git: dict[str, Any] | None
    versions: dict[str, Any]
    device: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    rows: list[Row] = field(default_factory=list)


def write_record(path: str | Path, record: Record) -> None:
    """Check the record, then replace `path` by it in one step.

    Raises ValueError for a record that `read_record` would refuse (NaN, wrong types, repeated
    rows), and OSError if the disk refuses: the old file is then still whole.
    """
    path = Path(path)
    document = {"schema": SCHEMA, **_fields(record)}
    document["rows"] = [_fields(row) for row in record.rows]
    try:
        _parse_record(document)
        text = _layout(document)
    except ValueError as error:
        raise ValueError(f"{path}: this record is not written: {error}") from error
    write_atomically(path, text.encode())


def read_record(path: str | Path) -> Record:
    """Read a record strictly.

    Raises ValueError that names the file and the field for anything that is not a record of this
    schema: not JSON, an unknown or missing key, a wrong type, NaN, repeated rows. The file is
    never changed.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        return _parse_record(document)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(
            f"{path} is not a valid run record: {error}. The file is left alone; "
            "restore it, or move it away to run again"
        ) from error


def find_records(folder: str | Path, pattern: str = "record.json") -> list[Path]:
    """Paths below `folder` whose file name matches, sorted; none if the folder does not exist."""
    return sorted(path for path in Path(folder).rglob(pattern) if path.is_file())


class Environment(TypedDict):
    """The part of a record that describes where it was made."""

    git: dict[str, Any] | None
    versions: dict[str, Any]
    device: dict[str, Any]


def environment() -> Environment:
    """Facts about code, packages and hardware, as the fields of the same names in `Record`."""
    return {"git": _git(), "versions": _versions(), "device": _device()}


def _git() -> dict[str, Any] | None:
    """Commit of this package's checkout and whether tracked files outside results/ differ from it.

    A copy without `.git` may name its commit in MATRYOSHKA_GIT_SHA=<sha>[-dirty]. None where
    neither is known, also when the package is installed below somebody else's checkout.
    """
    given = os.environ.get("MATRYOSHKA_GIT_SHA")
    if given:
        return {"sha": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):  # no git here, or no answer from it
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "--", Path(__file__).name) is None:
        return None
    sha = git("rev-parse", "HEAD")
    changes = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"
    )
    if sha is None or changes is None:
        return None
    return {"sha": sha, "dirty": bool(changes)}


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _device() -> dict[str, Any]:
    import torch  # here, because reading records and making tables needs no torch

    facts: dict[str, Any] = {
        "kind": "cpu",
        "name": _cpu_name(),
        "count": 1,
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "kind": "cuda",
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def _cpu_name() -> str:
    try:  # platform.processor() is empty on most Linux systems
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _fields(instance: Row | Record) -> dict[str, Any]:
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}


def _layout(document: dict[str, Any]) -> str:
    """JSON in the order of the schema, indented, except that each row is one line."""
    entries = []
    for name, value in document.items():
        try:
            if name == "rows" and value:
                lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in value)
                text = f"[\n{lines}\n  ]"
            else:
                text = json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
        except (TypeError, ValueError) as error:
            raise ValueError(f"field '{name}': {error}") from error
        entries.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not a number; a missing number is null")


def _parse_record(document: Any) -> Record:
    """The record behind a decoded document; ValueError names the first field that is wrong."""
    if not isinstance(document, dict):
        raise ValueError(f"expected an object, got {_shown(document)}")
    if "schema" not in document:
        raise ValueError("field 'schema' is missing")
    if type(document["schema"]) is not int or document["schema"] != SCHEMA:
        raise ValueError(
            f"field 'schema': this version reads {SCHEMA}, got {_shown(document['schema'])}"
        )
    rest = {name: value for name, value in document.items() if name != "schema"}
    _check_fields(Record, rest, prefix="")
    rows = []
    for index, entry in enumerate(rest["rows"]):
        where = f"rows[{index}]"
        if not isinstance(entry, dict):
            raise ValueError(f"field '{where}': expected an object, got {_shown(entry)}")
        _check_fields(Row, entry, prefix=f"{where}.")
        row = Row(**entry)
        _check_row(row, where)
        rows.append(row)
    seen: dict[RowKey, int] = {}
    for index, row in enumerate(rows):
        if row.key in seen:
            raise ValueError(f"field 'rows[{index}]' repeats rows[{seen[row.key]}]: {row.key}")
        seen[row.key] = index
    return Record(**{**rest, "rows": rows})


def _check_row(row: Row, where: str) -> None:
    for name in ("shots", "rank", "n"):
        if getattr(row, name) < 0:
            raise ValueError(f"field '{where}.{name}' is negative: {getattr(row, name)}")
    if (row.rank == 0) != (row.rule == "base"):
        raise ValueError(
            f"field '{where}.rule': rank 0 and only rank 0 has rule 'base', got rank "
            f"{row.rank} with rule {row.rule!r}"
        )
    for name in ("value", "stderr"):
        value = getattr(row, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"field '{where}.{name}' is {value}; a missing number is null")
    if row.scores is None:
        return
    try:
        length = len(decode_scores(row.scores))
    except (TypeError, ValueError) as error:
        raise ValueError(f"field '{where}.scores': {error}") from error
    if length != row.n:
        raise ValueError(f"field '{where}.scores' holds {length} documents, but n is {row.n}")


def _check_fields(schema: type, values: dict[str, Any], prefix: str) -> None:
    hints = typing.get_type_hints(schema)
    for name in values:
        if name not in hints:
            raise ValueError(f"unknown field '{prefix}{name}'; known are {', '.join(hints)}")
    for name, hint in hints.items():
        if name not in values:
            raise ValueError(f"field '{prefix}{name}' is missing")
        if not _matches(values[name], hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            expected = expected.replace("typing.", "").replace("None", "null")
            raise ValueError(
                f"field '{prefix}{name}': expected {expected}, got {_shown(values[name])}"
            )


def _matches(value: Any, hint: Any) -> bool:
    """Whether a decoded JSON value fits a field's type hint; rows are checked by the caller."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is list and typing.get_args(hint) == (float,):
        return isinstance(value, list) and all(_matches(item, float) for item in value)
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
