"""The run record `record.json`: its schema, atomic write and strict read.

A record alone is enough for every table, plot and bootstrap. A missing number is null, never 0;
NaN and infinity are refused. A record that does not follow the schema is named and left alone.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    ValidationError,
    create_model,
)

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import parse_json, write_atomically
from matryoshka_lora.evaluation.rows import Row, RowKey, decode_scores
from matryoshka_lora.runs.folder import RECORD

SCHEMA = 2
Status = Literal["training", "evaluating", "finished", "failed"]


@dataclass
class Record:
    """Everything known about one run.

    config: the resolved config, without settings of other methods (`config.recorded`). run_hash:
        hash over the fields that change the adapter.
    model: identity of the base model that was really loaded.
    data: fingerprint and counts of used, truncated and fully masked examples.
    training: steps, tokens, label_tokens, seconds, tokens_per_second, peak_memory_gib, loss, ...;
        empty for an adapter that was trained elsewhere. `validation` has the losses on a sample of
        the held-out records, read at R on the way.
    evaluation: seconds, finished, ...; None before there is any.
    phases: who did what, in order: "training", from `first_step` on, once for each start that
        trained; "evaluation", once for each start that computed rows, which it names, with the
        settings and the engine; "import" with the adapter that was read; or "all" in a record of an
        older version, which tells of the first start alone. Each with git ({"sha", "dirty"} of the
        code, None outside a checkout), versions (package -> version) and device.
    diagnostics: anything else measured.
    error: one line that says why the last start failed; a finished run may have one, too.
    """

    status: Status
    name: str
    config: dict[str, Any]
    run_hash: str
    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def training_device(self) -> dict[str, Any]:
        """What the training ended on; empty where no phase tells."""
        found = [p["device"] for p in self.phases if p["phase"] in ("training", "all")]
        return found[-1] if found else {}


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

    Raises UserError that names the file and the field for anything that is not a record of this
    schema: not JSON, an unknown or missing key, a wrong type, NaN, repeated rows. The file is
    never changed.
    """
    path = Path(path)
    try:
        return _parse_record(parse_json(path.read_bytes(), parse_constant=_refuse_constant))
    except ValueError as error:
        raise UserError(
            f"{path} is not a valid run record: {error}. The file is left alone; "
            "restore it, or move it away to run again"
        ) from error


def find_records(folder: str | Path, pattern: str = RECORD) -> list[Path]:
    """Paths below `folder` whose file name matches, sorted; none if the folder does not exist.

    What is hidden, such as a run that is being replaced, is left out.
    """
    folder = Path(folder)
    return sorted(
        path
        for path in folder.rglob(pattern)
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


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
    if type(document["schema"]) is int and document["schema"] == 1:
        document = _upgraded(document)
    if type(document["schema"]) is not int or document["schema"] != SCHEMA:
        raise ValueError(
            f"field 'schema': this version reads {SCHEMA}, got {_shown(document['schema'])}"
        )
    entries = {name: value for name, value in document.items() if name != "schema"}
    try:
        _RecordSchema.model_validate(entries)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    for index, phase in enumerate(entries["phases"]):
        if not (isinstance(phase.get("phase"), str) and isinstance(phase.get("device"), dict)):
            raise ValueError(f"field 'phases[{index}]' lacks 'phase' or 'device'")
    # From what was read, not from pydantic's copy, which turns a 1 into a 1.0.
    rows = [Row(**entry) for entry in entries["rows"]]
    seen: dict[RowKey, int] = {}
    for index, row in enumerate(rows):
        _check_row(row, f"rows[{index}]")
        if row.key in seen:
            raise ValueError(f"field 'rows[{index}]' repeats rows[{seen[row.key]}]: {row.key}")
        seen[row.key] = index
    return Record(**{**entries, "rows": rows})


def _upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A document of schema 1 as one of schema 2; what is wrong with it stays wrong."""
    first: dict[str, Any] = {}
    for name in ("git", "versions", "device"):
        if name not in document:
            raise ValueError(f"field '{name}' is missing")
        first[name] = document[name]
    if not isinstance(first["device"], dict):
        raise ValueError(f"field 'device': expected an object, got {_shown(first['device'])}")
    upgraded = {name: value for name, value in document.items() if name not in first}
    rows = document.get("rows")
    if isinstance(rows, list):
        rows = [row | {"fingerprint": None} if isinstance(row, dict) else row for row in rows]
        upgraded["rows"] = rows
    return upgraded | {"schema": 2, "phases": [{"phase": "all", **first}]}


def _check_row(row: Row, where: str) -> None:
    """What the types of a row do not say."""
    if (row.rank == 0) != (row.rule == "base"):
        raise ValueError(
            f"field '{where}.rule': rank 0 and only rank 0 has rule 'base', got rank "
            f"{row.rank} with rule {row.rule!r}"
        )
    if row.scores is None:
        return
    try:
        length = len(decode_scores(row.scores))
    except ValueError as error:
        raise ValueError(f"field '{where}.scores': {error}") from error
    if length != row.n:
        raise ValueError(f"field '{where}.scores' holds {length} documents, but n is {row.n}")


def _schema_of(fields: type, **stricter: Any) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass, all required, and no others.

    Strict: "1" and True are no integers; NaN and infinity are no numbers. `stricter` replaces the
    types of fields.
    """
    types = {**typing.get_type_hints(fields), **stricter}
    required: Any = {name: (kind, ...) for name, kind in types.items()}
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return create_model(fields.__name__, __config__=config, **required)


_RowSchema = _schema_of(Row, shots=NonNegativeInt, rank=NonNegativeInt, n=NonNegativeInt)


class _Facts(BaseModel):
    """What a part of a record must hold where other code relies on it, whatever else is there."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _ModelFacts(_Facts):
    name: str
    revision: str | None


class _EvaluationFacts(_Facts):
    seconds: NonNegativeFloat = 0.0
    finished: list[str] = []
    truncated_prompts: dict[str, Any] = {}


_RecordSchema = _schema_of(
    Record,
    model=_ModelFacts,
    evaluation=_EvaluationFacts | None,
    rows=list[_RowSchema],  # type: ignore[valid-type]
)


def _first_problem(error: ValidationError) -> str:
    """One line: the first field that is wrong and why."""
    first = error.errors(include_url=False, include_context=False)[0]
    # ("rows", 3, "scores", ...): what follows a row's field is pydantic's own name of a type.
    depth = {"rows": 3, "model": 2, "evaluation": 2}.get(str(first["loc"][0]), 1)
    name = ""
    for part in first["loc"][:depth]:
        name += f"[{part}]" if isinstance(part, int) else f"{'.' * bool(name)}{part}"
    if first["type"] == "missing":
        return f"field '{name}' is missing"
    if first["type"] == "extra_forbidden":
        schema = _RowSchema if first["loc"][0] == "rows" else _RecordSchema
        return f"unknown field '{name}'; known are {', '.join(schema.model_fields)}"
    return f"field '{name}': {first['msg']}, got {_shown(first['input'])}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
