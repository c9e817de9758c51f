"""Run records -> rank curves with mean and deviation over seeds, and the holes among them."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from matryoshka_lora.reporting.aurac import AXES, Axis, aurac
from matryoshka_lora.runs.record import RULES, Record, Row

METHOD_LABELS = {
    "lora": "LoRA",
    "dylora": "DyLoRA",
    "nested_dropout": "nested dropout",
    "matryoshka": "MatryoshkaLoRA",
}

# Two runs that differ in these sections of the config are never pooled as seeds of one row, ...
_VARIANT_SECTIONS = ("model", "dataset", "method", "adapter", "trainer")
# ... except for what has a column of its own, or changes how a run is computed but not its result
# (as in config.run_hash).
_NOT_A_VARIANT = {
    "model.name",
    "model.path",
    "model.trust_remote_code",
    "dataset.name",
    "dataset.path",
    "dataset.revision",
    "method.name",
    "adapter.rank",
    "adapter.scaling",
    "trainer.lr",
    "trainer.max_tokens",
    "trainer.packed",
    "trainer.save_every",
    "trainer.gradient_checkpointing",
    "trainer.compile",
    "trainer.cuda_graphs",
    "trainer.dry_run",
}
# Settings that only one method reads.
_READ_BY = {
    "method.draw": "dylora",
    "method.frozen": "dylora",
    "method.normalise": "matryoshka",
}
_METRIC_ORDER = ("exact_match", "acc", "acc_norm")
_FILTER_ORDER = ("strict-match", "none", None, "flexible-extract")


class Metric(NamedTuple):
    """One measured quantity: what one table or panel shows."""

    task: str
    shots: int
    limit: int | None
    metric: str
    filter: str | None

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
    def label(self) -> str:
        name = self.metric if self.filter in (None, "none") else f"{self.metric} ({self.filter})"
        cut = "" if self.limit is None else f", first {self.limit} documents"
        return f"{self.task} {self.shots}-shot{cut}, {name}"

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts by task and shots, then the main metric first and the loss last."""
        return (
            self.task,
            self.shots,
            -1 if self.limit is None else self.limit,
            self.lower_is_better,
            _place(self.metric, _METRIC_ORDER),
            self.metric,
            _place(self.filter, _FILTER_ORDER),
            self.filter or "",
        )

    def shown(self, value: float) -> float:
        """A value of a record in the unit of tables and plots."""
        return value if self.lower_is_better else 100 * value

    @property
    def digits(self) -> int:
        """Printed behind the point."""
        return 3 if self.lower_is_better else 1

    def text(self, value: float) -> str:
        """A shown value as tables and legends print it."""
        return f"{value:.{self.digits}f}"


@dataclass(frozen=True)
class Cell:
    """Mean over seeds in the unit of the table; sd (ddof=1) is None with fewer than two values."""

    mean: float
    sd: float | None
    untrained: bool = False


@dataclass(frozen=True)
class Curve:
    """A row of a table: scores over ranks, or the one point of the base or of a dedicated LoRA.

    kind: "base" (rank 0), "curve", or "dedicated": a LoRA of smaller R, shown at its own R alone.
    method: display label; `method_name` is the config's name.
    rule: None where nothing of the row was measured.
    seeds, planned: runs with at least one point in this row, and runs that there should be.
    cells: by rank. holes: ranks at which no seed has a point, although the table has one there.
    aurac: by axis; mean and sd of the seeds' own AURACs, over `aurac_ranks`, the ranks > 0 that
        all seeds of the row have.
    same_as: another rule of this method that is the same function at every rank.
    scored: by rank, the rows behind a cell, one a seed.
    """

    kind: Literal["base", "curve", "dedicated"]
    model: str
    dataset: str
    method_name: str
    method: str
    rank: int
    scaling: str
    lr: float | None
    rule: str | None
    seeds: int
    planned: int
    cells: Mapping[int, Cell]
    holes: tuple[int, ...] = ()
    aurac: Mapping[Axis, Cell] = field(default_factory=dict)
    aurac_ranks: tuple[int, ...] = ()
    same_as: str | None = None
    scored: Mapping[int, Sequence[Row]] = field(default_factory=dict)


@dataclass(frozen=True)
class RankTable:
    """All curves of one metric over one axis of ranks.

    ranks: every column, 0 (the base) included where it was measured; `curve_ranks`: those of the
    curves, the axis that a complete AURAC covers. documents: the numbers of documents behind the
    values, one number if all is well. missing: one line for each thing that should be there.
    """

    metric: Metric
    ranks: tuple[int, ...]
    curve_ranks: tuple[int, ...]
    rows: tuple[Curve, ...]
    documents: tuple[int, ...]
    missing: tuple[str, ...]

    @property
    def shared(self) -> dict[str, str]:
        """Of model, dataset, R and scaling those that all curves have in common."""
        main = [row for row in self.rows if row.kind == "curve"] or list(self.rows)
        values = {
            "model": {row.model for row in main},
            "dataset": {row.dataset for row in main},
            "R": {str(row.rank) for row in main},
            "scaling": {row.scaling for row in main},
        }
        return {name: next(iter(found)) for name, found in values.items() if len(found) == 1}


@dataclass(frozen=True)
class _Run:
    """A run that a table has to account for; `problem` says why it has no rows."""

    name: str
    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    problem: str | None

    def setting(self, key: str) -> Any:
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ValueError(f"the config of run {self.name!r} lacks '{key}'; tables need it")
            value = value[part]
        return value

    @property
    def model(self) -> str:
        return str(self.setting("model.name"))

    @property
    def dataset(self) -> str:
        return str(self.setting("dataset.name"))

    @property
    def method(self) -> str:
        return str(self.setting("method.name"))

    @property
    def rank(self) -> int:
        return int(self.setting("adapter.rank"))

    @property
    def scaling(self) -> str:
        return str(self.setting("adapter.scaling"))

    @property
    def lr(self) -> float:
        return float(self.setting("trainer.lr"))

    @property
    def seed(self) -> int:
        return int(self.setting("seed"))

    @property
    def variant(self) -> dict[str, str]:
        """Settings without a column of their own that may change what was trained."""
        found: dict[str, str] = {}

        def collect(key: str, value: Any) -> None:
            if isinstance(value, Mapping):
                for name, entry in value.items():
                    collect(f"{key}.{name}", entry)
            elif key not in _NOT_A_VARIANT and _READ_BY.get(key, self.method) == self.method:
                found[key] = json.dumps(value, default=str)

        for section in _VARIANT_SECTIONS:
            collect(section, self.config.get(section, {}))
        if self.method == "lora":
            found.pop("adapter.train_ranks", None)  # LoRA trains no sub-ranks
        if found.get("method.draw") != '"micro_batch"':
            found.pop("trainer.micro_batch", None)  # only cuts a batch, unless each cut draws
        return found

    @property
    def group(self) -> tuple[Any, ...]:
        """Runs with the same group are seeds of one row; also the order of the rows."""
        place = _place(self.method, tuple(METHOD_LABELS))
        variant = tuple(sorted(self.variant.items()))
        return (
            self.model,
            self.dataset,
            self.scaling,
            place,
            self.method,
            -self.rank,
            self.lr,
            variant,
        )

    def points(self, metric: Metric) -> dict[tuple[str, int], Row]:
        """Rows of this metric that have a value, by (rule, rank)."""
        return {
            (row.rule, row.rank): row
            for row in self.rows
            if _metric(row) == metric and row.value is not None
        }


def rank_tables(
    records: Sequence[Record], planned: Sequence[Mapping[str, Any]] | None = None
) -> list[RankTable]:
    """Every table that the records hold, main metric first and loss last.

    One table for each (model, dataset, scaling, R) and each (task, shots, limit, metric, filter).
    R is a rank at which a method other than LoRA was trained, or else the largest; LoRA runs of
    smaller rank stand in it as dedicated runs. `planned` are the resolved configs of all runs that
    there should be; those without a finished record are holes, and so are unfinished records.
    Raises ValueError for a config that lacks a setting tables need, for two records of one run,
    and if nothing was measured at all.
    """
    runs = _runs(records, planned)
    tables = []
    for block in sorted({(run.model, run.dataset, run.scaling) for run in runs}):
        inside = [run for run in runs if (run.model, run.dataset, run.scaling) == block]
        main = {run.rank for run in inside if run.method != "lora"}
        for rank in sorted(main or {max(run.rank for run in inside)}):
            members = [
                run
                for run in inside
                if run.rank == rank or (run.method == "lora" and run.rank < rank)
            ]
            metrics = {_metric(row) for run in members for row in run.rows}
            tables += [_table(members, m) for m in sorted(metrics, key=lambda m: m.order)]
    if not tables:
        state = "; ".join(f"{run.name}: {run.problem or 'no rows'}" for run in runs) or "no records"
        raise ValueError(f"there is nothing to report yet ({state})")
    return tables


def rank_table(
    records: Sequence[Record],
    task: str,
    shots: int,
    metric: str,
    filter: str | None = None,
    limit: int | None = None,
    planned: Sequence[Mapping[str, Any]] | None = None,
) -> RankTable:
    """One table of all records: a row for each (model, dataset, method, R, scaling, lr, rule).

    LoRA runs of a smaller rank than the largest are dedicated runs. Raises ValueError as
    `rank_tables` does, and if no finished record has this metric.
    """
    runs = _runs(records, planned)
    wanted = Metric(task, shots, limit, metric, filter)
    found = {_metric(row) for run in runs for row in run.rows}
    if wanted not in found:
        names = "; ".join(m.label for m in sorted(found, key=lambda m: m.order)) or "nothing"
        raise ValueError(f"no finished record has {wanted.label}; there is: {names}")
    return _table(runs, wanted)


def run_tables(record: Record) -> list[RankTable]:
    """The tables of one run alone, finished or not; an empty list if nothing is evaluated yet."""
    run = _Run(record.name, record.config, tuple(record.rows), None)
    return [_table([run], m) for m in sorted({_metric(r) for r in run.rows}, key=lambda m: m.order)]


def _place(name: Any, order: Sequence[Any]) -> int:
    return order.index(name) if name in order else len(order)


def _metric(row: Row) -> Metric:
    return Metric(row.task, row.shots, row.limit, row.metric, row.filter)


def _runs(records: Iterable[Record], planned: Iterable[Mapping[str, Any]] | None) -> list[_Run]:
    """All runs in the order of the tables; a planned run that has a record is that record."""
    runs: dict[Any, _Run] = {}
    for record in records:
        run = _run(record)
        twin = runs.setdefault((run.group, run.seed), run)
        if twin is not run:
            raise ValueError(
                f"two records hold the same run, {twin.name!r} and {run.name!r}: take one away, "
                "or its seed would count twice"
            )
    for number, config in enumerate(planned or (), start=1):
        run = _Run(f"planned run {number}", config, (), "no record")
        runs.setdefault((run.group, run.seed), run)
    return [runs[key] for key in sorted(runs)]


def _run(record: Record) -> _Run:
    if record.status == "finished":
        return _Run(record.name, record.config, tuple(record.rows), None)
    problem: str = record.status
    if record.error:
        problem += f": {record.error.strip().splitlines()[0][:100]}"
    return _Run(record.name, record.config, (), problem)


def _table(runs: Sequence[_Run], metric: Metric) -> RankTable:
    main_rank = max(run.rank for run in runs)
    groups: dict[Any, list[_Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    dedicated = {
        group
        for group, (run, *_) in groups.items()
        if run.method == "lora" and run.rank < main_rank
    }
    axis = sorted(
        {
            row.rank
            for run in runs
            if run.group not in dedicated
            for row in run.rows
            if _metric(row) == metric and row.rank > 0
        }
    )
    labels = _labels([members[0] for members in groups.values()], dedicated)
    rows: list[Curve] = []
    missing: list[str] = []
    for group, members in groups.items():
        if group in dedicated:
            made, gaps = [_dedicated(members, metric, labels[group])], list[str]()
        else:
            made, gaps = _curves(members, metric, labels[group], axis)
        rows += made
        missing += _absences(members, metric, labels[group]) + gaps
    # Curves keep their order; dedicated LoRAs follow by rank.
    rows.sort(key=lambda row: row.rank if row.kind == "dedicated" else 0)
    rows = _base_rows(runs, metric) + rows
    columns = {rank for row in rows for rank in (*row.cells, *row.holes)}
    documents = {row.n for run in runs for row in run.points(metric).values()}
    return RankTable(
        metric,
        tuple(sorted(columns)),
        tuple(axis),
        tuple(rows),
        tuple(sorted(documents)),
        tuple(missing),
    )


def _labels(runs: Sequence[_Run], dedicated: set[Any]) -> dict[Any, str]:
    """A label a group: the method, and the settings in which the groups of a table differ.

    Settings of the method and the adapter are compared within one method and R, where they mean
    the same thing; all others over the whole table.
    """
    values: dict[Any, set[str]] = {}

    def scope(run: _Run, key: str) -> tuple[Any, ...]:
        own = key.startswith(("method.", "adapter."))
        return (key, run.method, run.rank) if own else (key,)

    for run in runs:
        for key, value in run.variant.items():
            values.setdefault(scope(run, key), set()).add(value)
    labels = {}
    for run in runs:
        label = METHOD_LABELS.get(run.method, run.method)
        if run.group in dedicated:
            label += f" dedicated R={run.rank}"
        differing = [
            f"{key.rpartition('.')[2]}={value.strip(chr(34))}"
            for key, value in sorted(run.variant.items())
            if len(values[scope(run, key)]) > 1
        ]
        labels[run.group] = f"{label} ({', '.join(differing)})" if differing else label
    return labels


def _absences(members: Sequence[_Run], metric: Metric, label: str) -> list[str]:
    """Whole runs of a group without a single point."""
    return [
        f"{_named(run, label)}: {run.problem or 'not evaluated'}"
        for run in members
        if not run.points(metric)
    ]


def _named(run: _Run, label: str) -> str:
    rank = "" if label.endswith(f"R={run.rank}") else f" R={run.rank}"
    return f"{label}{rank}, scaling {run.scaling}, lr {run.lr:g}, seed {run.seed}"


def _curves(
    members: Sequence[_Run], metric: Metric, label: str, axis: Sequence[int]
) -> tuple[list[Curve], list[str]]:
    """A curve for each rule that any seed of the group has, and the points that are missing."""
    points = {run.seed: run.points(metric) for run in members}
    present = [run for run in members if points[run.seed]]
    rules = {rule for run in present for rule, rank in points[run.seed] if rank > 0}
    curves: list[Curve] = []
    gaps: list[str] = []
    for rule in sorted(rules, key=lambda rule: (_place(rule, RULES), rule)):
        # Rows of this rule by rank, for each seed that has any.
        seeds = {
            run.seed: {
                rank: points[run.seed][rule, rank]
                for rank in axis
                if (rule, rank) in points[run.seed]
            }
            for run in present
        }
        seeds = {seed: rows for seed, rows in seeds.items() if rows}
        at_rank = {rank: [rows[rank] for rows in seeds.values() if rank in rows] for rank in axis}
        complete = tuple(rank for rank in axis if len(at_rank[rank]) == len(seeds))
        areas: dict[Axis, Cell] = {}
        for name in AXES if complete else ():
            areas[name] = _cell(
                [
                    aurac(complete, [_shown(metric, rows[rank]) for rank in complete], name)
                    for rows in seeds.values()
                ]
            )
        curves.append(
            _curve(
                "curve",
                members,
                label,
                rule,
                seeds=len(seeds),
                cells={rank: _mean(metric, rows) for rank, rows in at_rank.items() if rows},
                holes=tuple(rank for rank in axis if not at_rank[rank]),
                aurac=areas,
                aurac_ranks=complete,
                same_as=_alias(at_rank),
                scored=at_rank,
            )
        )
        for run in present:
            lost = [str(rank) for rank in axis if (rule, rank) not in points[run.seed]]
            if lost:
                gaps.append(f"{_named(run, label)}: rule {rule} at rank {', '.join(lost)}")
        if len(complete) < len(axis):
            ranks = ", ".join(map(str, complete)) or "none"
            gaps.append(f"{label}, rule {rule}: AURAC covers only the ranks {ranks}")
    if not curves:
        curves = [_curve("curve", members, label, None, seeds=0, cells={}, holes=tuple(axis))]
    return curves, gaps


def _dedicated(members: Sequence[_Run], metric: Metric, label: str) -> Curve:
    """The one point for which a LoRA of smaller R was trained.

    At its own R plain LoRA is the same function under every rule, so the first one at hand serves.
    """
    rank = members[0].rank
    rows = []
    for run in members:
        points = run.points(metric)
        rows += [
            points[rule, rank] for rule in ("trained", "prefix", "svd") if (rule, rank) in points
        ][:1]
    return _curve(
        "dedicated",
        members,
        label,
        rows[0].rule if rows else None,
        seeds=len(rows),
        cells={rank: _mean(metric, rows)} if rows else {},
        holes=() if rows else (rank,),
        scored={rank: rows},
    )


def _base_rows(runs: Sequence[_Run], metric: Metric) -> list[Curve]:
    """The untrained model, a row for each (model, dataset) that measured it.

    It has no seed, so equal values of several runs are one measurement.
    """
    curves = []
    for model, dataset in sorted({(run.model, run.dataset) for run in runs}):
        members = [run for run in runs if (run.model, run.dataset) == (model, dataset)]
        rows = [p["base", 0] for run in members if ("base", 0) in (p := run.points(metric))]
        if not rows:
            continue
        values = {row.value for row in rows}
        cell = _mean(metric, rows[:1] if len(values) == 1 else rows)
        curves.append(
            Curve("base", model, dataset, "base", "base", 0, "", None, "base", 0, 0, {0: cell})
        )
    return curves


def _curve(
    kind: Literal["curve", "dedicated"],
    members: Sequence[_Run],
    label: str,
    rule: str | None,
    **measured: Any,
) -> Curve:
    run = members[0]
    return Curve(
        kind=kind,
        model=run.model,
        dataset=run.dataset,
        method_name=run.method,
        method=label,
        rank=run.rank,
        scaling=run.scaling,
        lr=run.lr,
        rule=rule,
        planned=len(members),
        **measured,
    )


def _alias(rows: Mapping[int, Sequence[Row]]) -> str | None:
    """The rule that all points of a curve name as the same function at their own rank."""
    targets = set()
    for rank, seeds in rows.items():
        for row in seeds:
            rule, _, at = (row.same_as or "").partition("@")
            targets.add(rule if at == str(rank) else "")
    return targets.pop() or None if len(targets) == 1 else None


def _shown(metric: Metric, row: Row) -> float:
    assert row.value is not None, "points without a value are holes"
    return metric.shown(row.value)


def _mean(metric: Metric, rows: Sequence[Row]) -> Cell:
    cell = _cell([_shown(metric, row) for row in rows])
    return replace(cell, untrained=any(row.trained_rank is False for row in rows))


def _cell(values: Sequence[float]) -> Cell:
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
