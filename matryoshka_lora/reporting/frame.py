"""Run records and planned runs -> one tidy pandas frame, and the metrics it holds."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from matryoshka_lora.config import COLUMNS, read_config, variant
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.rows import Row, test_sets
from matryoshka_lora.reporting.names import method_place, place, was_trained_here
from matryoshka_lora.runs.record import Record

RUN_COLUMNS = (
    "run",
    "group",
    "model",
    "dataset",
    "method",
    "R",
    "scaling",
    "lr",
    "epochs",
    "seed",
    "variant",
    "row",
    "asked",
    "problem",
)
ROW_COLUMNS = (*(field.name for field in dataclasses.fields(Row)), "test_set")
CONTENT = ("base", "data")
"""Keys of a variant that stand for the content of model and data, which a plan does not know."""

Variant = tuple[tuple[str, str], ...]

_METRIC_ORDER = ("exact_match", "acc", "acc_norm")
_FILTER_ORDER = ("strict-match", "none", None, "flexible-extract")


class Metric(NamedTuple):
    """One measured quantity: what one table or panel shows."""

    task: str
    shots: int
    limit: int | None
    metric: str
    filter: str | None
    test_set: str | None = None
    """What to call the documents where several test sets were measured, see `rows.test_sets`."""

    @property
    def lower_is_better(self) -> bool:
        """Losses are shown raw and low is good; anything else is a fraction shown in percent."""
        return self.metric.endswith(("loss", "perplexity"))

    @property
    def unit(self) -> str:
        if self.metric == "loss":
            return "nats/token"
        return "raw" if self.lower_is_better else "%"

    @property
    def scale(self) -> int:
        """A value of a record times this is in the unit of tables and plots."""
        return 1 if self.lower_is_better else 100

    @property
    def digits(self) -> int:
        """Decimals printed."""
        return 3 if self.lower_is_better else 1

    @property
    def label(self) -> str:
        name = self.metric if self.filter in (None, "none") else f"{self.metric} ({self.filter})"
        first = "" if self.limit is None else f", first {self.limit} documents"
        which = "" if self.test_set is None else f", {self.test_set}"
        return f"{self.task} {self.shots}-shot{first}{which}, {name}"

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts by task and shots, then the main metric first and the loss last."""
        return (
            self.task,
            self.shots,
            -1 if self.limit is None else self.limit,
            self.lower_is_better,
            place(self.metric, _METRIC_ORDER),
            self.metric,
            place(self.filter, _FILTER_ORDER),
            self.filter or "",
            self.test_set or "",
        )

    def text(self, shown: float) -> str:
        """A value in the unit of tables, as tables and legends print it."""
        return f"{shown:.{self.digits}f}"


def tidy_frame(
    records: Iterable[Record],
    planned: Iterable[Mapping[str, Any]] | None = None,
    *,
    unfinished: bool = False,
) -> pd.DataFrame:
    """One line for each row of each record, and one line for each run without rows.

    The columns of a run (`RUN_COLUMNS`) are repeated on all its lines:
        run: its name, for messages.
        group: a number; runs that differ in nothing but the seed share it. Lines are ordered by
            it, then by seed: model, dataset, scaling, method, falling R, rising lr and epochs.
        model, dataset, method, R, scaling, lr, epochs, seed: its settings.
        variant: what else may change what is trained (`config.variant`), as sorted (key, JSON)
            pairs.
        row: the name that the table gives the run, else None.
        asked: the tasks that its config asks for, as JSON.
        problem: why a run has no rows ("no record", "training", "failed: ..."), else None.
    Those of a row (`ROW_COLUMNS`) are the fields of `Row` and what its test set is called, all
    missing where a run has no rows; the scores stay encoded. `value` is a float (NaN: not
    measured), all other columns are objects.

    planned: resolved configs of all runs that there should be; one that has a record is that
    record. They are taken to train on the same content as the records of the same settings, or else
    of the same model and data set.
    unfinished: take the rows of records that are not finished, too.
    Raises UserError for a config that lacks a setting tables need, and for two records of one run.
    """
    runs: dict[tuple[Any, int], tuple[dict[str, Any], list[Row]]] = {}
    for record in records:
        complete = unfinished or record.status == "finished"
        found = _variant(record.name, record.config, record.model, record.data.get("fingerprint"))
        problem = None if complete else _problem(record)
        run = _run(record.name, record.config, found, problem, record.diagnostics.get("row"))
        twin, _ = runs.setdefault(_key(run), (run, record.rows if complete else []))
        if twin is not run:
            raise UserError(
                f"two records hold the same run, {twin['run']!r} and {run['run']!r}: take one "
                "away, or its seed would count twice"
            )
    recorded: dict[Any, Variant] = {}
    contents: dict[tuple[str, str], Variant] = {}
    for key in sorted(runs):
        run = runs[key][0]
        recorded.setdefault(_settings(run), run["variant"])
        content = tuple(pair for pair in run["variant"] if pair[0] in CONTENT)
        contents.setdefault((run["model"], run["dataset"]), content)
    for number, config in enumerate(planned or (), start=1):
        name = f"planned run {number}"
        run = _run(name, config, _variant(name, config, {}, None), "no record")
        content = contents.get((run["model"], run["dataset"]), ())
        likely = tuple(sorted((dict(run["variant"]) | dict(content)).items()))
        run["variant"] = recorded.get(_settings(run), likely)
        runs.setdefault(_key(run), (run, []))
    numbers = {group: n for n, group in enumerate(sorted({group for group, _ in runs}))}
    by_base: dict[tuple[str, str], list[Row]] = {}
    for run, rows in runs.values():
        by_base.setdefault((run["model"], run["dataset"]), []).extend(rows)
    names = {base: test_sets(rows) for base, rows in by_base.items()}

    def of_row(run: Mapping[str, Any], row: Row | None) -> dict[str, Any]:
        if row is None:
            return {}
        measured = (row.task, row.shots, row.limit, row.fingerprint)
        return vars(row) | {"test_set": names[run["model"], run["dataset"]][measured]}

    lines = [
        {**run, "group": numbers[key[0]], **of_row(run, row)}
        for key, (run, rows) in sorted(runs.items(), key=lambda item: item[0])
        for row in rows or [None]  # type: ignore[list-item]
    ]
    frame = pd.DataFrame(lines, columns=[*RUN_COLUMNS, *ROW_COLUMNS], dtype=object)
    return frame.astype({"value": float})


def runs_of(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a run, with the columns of a run."""
    return frame.drop_duplicates(["group", "seed"])[list(RUN_COLUMNS)]


def grouped(frame: pd.DataFrame, by: str | list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """(value or values of `by`, their lines) in the order of the values."""
    return iter(frame.groupby(by))


def metrics_of(frame: pd.DataFrame) -> list[Metric]:
    """The metrics of a frame, main metric first and loss last."""
    keys = frame.dropna(subset="task")[list(Metric._fields)].drop_duplicates()
    found = [Metric(*key) for key in keys.itertuples(index=False, name=None)]
    return sorted(found, key=lambda metric: metric.order)


def lines_of(frame: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """The lines of one metric."""
    keys = frame[list(Metric._fields)].itertuples(index=False, name=None)
    return frame[[key == metric for key in keys]]


def _run(
    name: str,
    config: Mapping[str, Any],
    variant: Variant,
    problem: str | None,
    row: str | None = None,
) -> dict[str, Any]:
    def setting(key: str, kind: type) -> Any:
        value: Any = config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise UserError(f"the config of run {name!r} lacks '{key}'; tables need it")
            value = value[part]
        try:
            return kind(value)
        except (TypeError, ValueError):
            raise UserError(f"the config of run {name!r}: '{key}' is {value!r}") from None

    # How an adapter was trained elsewhere is not known; what its file holds is in its variant.
    known = was_trained_here(setting("method.name", str))
    return {
        "run": name,
        "model": setting("model.name", str),
        "dataset": setting("dataset.name", str),
        "method": setting("method.name", str),
        "R": setting("adapter.rank", int),
        "scaling": setting("adapter.scaling", str),
        "lr": setting("trainer.lr", float) if known else math.nan,
        "epochs": setting("trainer.epochs", float) if known else math.nan,
        "seed": setting("seed", int) if known else 0,
        "variant": variant,
        "row": row,
        "asked": json.dumps((config.get("eval") or {}).get("tasks")),
        "problem": problem,
    }


def _key(run: Mapping[str, Any]) -> tuple[Any, int]:
    """(group, seed), which no two runs share; sorts runs in the order of the tables."""
    undecided = math.isnan(run["lr"])  # a planned run whose learning rate is still searched for
    group = (
        run["model"],
        run["dataset"],
        run["scaling"],
        method_place(run["method"]),
        run["method"],
        -run["R"],
        (undecided, 0.0 if undecided else run["lr"]),
        run["epochs"],
        run["variant"],
    )
    return group, run["seed"]


def _problem(record: Record) -> str:
    if not record.error:
        return record.status
    return f"{record.status}: {record.error.strip().splitlines()[0][:100]}"


def _settings(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """The group of a run but for the content that it was made from."""
    pairs = tuple(pair for pair in run["variant"] if pair[0] not in CONTENT)
    return _key({**run, "variant": pairs})[0]


def _variant(
    name: str, config: Mapping[str, Any], model: Mapping[str, Any], fingerprint: str | None
) -> Variant:
    """Settings without a column of their own that may change what is trained.

    A config of another version, or of a method that is not known here, counts with all its
    settings, so that its runs are rather kept apart than pooled.
    """
    try:
        read = read_config(config, name)
        found = variant(read, model, fingerprint)
        if not was_trained_here(read.method.name):
            # What its record lacks has a default, which says nothing of it.
            known = {key for section, node in config.items() for key, _ in _flat(section, node)}
            found = {key: value for key, value in found.items() if key in known | {*CONTENT}}
    except UserError:
        found = {
            key: json.dumps(value, default=str)
            for section in ("model", "dataset", "method", "adapter", "trainer")
            for key, value in _flat(section, config.get(section, {}))
            if key not in (*COLUMNS, "model.name", "dataset.name")
        }
    return tuple(sorted(found.items()))


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _flat(f"{key}.{name}", entry)
    else:
        yield key, value
