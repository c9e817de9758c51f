"""The tidy frame -> rank curves with mean and deviation over seeds, and the holes among them."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import pandas as pd

from matryoshka_lora import methods
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import BASE
from matryoshka_lora.reporting.aurac import AXES, Axis, aurac
from matryoshka_lora.reporting.frame import (
    CONTENT,
    Metric,
    grouped,
    lines_of,
    metrics_of,
    runs_of,
    tidy_frame,
)
from matryoshka_lora.reporting.names import is_baseline, rule_place, was_trained_here
from matryoshka_lora.runs.record import Record

_WHOLE = ("trained", "prefix", "svd")
"""Rules that read the function that was trained where the rank is R and the method a baseline."""


@dataclass(frozen=True)
class Cell:
    """Mean over seeds in the unit of the table; sd (ddof=1) is None with fewer than two values.

    untrained: the rank lies outside the trained sub-ranks of a run behind it.
    """

    mean: float
    sd: float | None
    untrained: bool = False


@dataclass(frozen=True)
class Curve:
    """A row of a table: scores over ranks, or the one point of the base or of a dedicated LoRA.

    kind: "base" (rank 0), "curve", or "dedicated": a LoRA shown at its own R alone.
    method: display label; `method_name` is the config's name.
    rule: None where nothing of the row was measured.
    seeds, planned: runs with at least one point in this row, and runs that there should be.
    cells: by rank. holes: ranks at which no seed has a point, although the table has one there.
    aurac: by axis; mean and sd of the seeds' own AURACs, over `aurac_ranks`, the ranks > 0 that
        all seeds of the row have.
    same_as: another curve's rule of this method that is the same function at every rank.
    points: the lines of the tidy frame behind the cells, one a seed and rank.
    """

    kind: Literal["base", "curve", "dedicated"]
    model: str
    dataset: str
    method_name: str
    method: str
    rank: int
    scaling: str
    lr: float | None
    epochs: float | None
    rule: str | None
    seeds: int
    planned: int
    cells: Mapping[int, Cell]
    holes: tuple[int, ...] = ()
    aurac: Mapping[Axis, Cell] = field(default_factory=dict)
    aurac_ranks: tuple[int, ...] = ()
    same_as: str | None = None
    points: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False, repr=False)

    @cached_property
    def content(self) -> frozenset[Any]:
        """What the points were made from: base model, training data and test documents."""
        if self.points.empty:
            return frozenset()
        columns = (self.points[name] for name in ("model", "dataset", "variant", "fingerprint"))
        return frozenset(
            (model, dataset, tuple(pair for pair in variant if pair[0] in CONTENT), documents)
            for model, dataset, variant, documents in zip(*columns, strict=True)
        )


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
        """Of model, dataset, R and scaling those that all curves have in common; of all, epochs."""
        main = [row for row in self.rows if row.kind == "curve"] or list(self.rows)
        values = {
            "model": {row.model for row in main},
            "dataset": {row.dataset for row in main},
            "R": {str(row.rank) for row in main},
            "scaling": {row.scaling for row in main},
            "epochs": {f"{row.epochs:g}" for row in self.rows if row.epochs is not None},
        }
        return {name: next(iter(found)) for name, found in values.items() if len(found) == 1}


def rank_tables(
    records: Sequence[Record], planned: Sequence[Mapping[str, Any]] | None = None
) -> list[RankTable]:
    """Every table that the records hold, main metric first and loss last.

    One table for each (model, dataset, scaling, R) and each (task, shots, limit, metric, filter).
    Scalings without a plain LoRA to be compared with stand in the table of the one that has it.
    Where runs have names of rows, which then are their labels, one for each inference rule instead
    of each scaling, because such tables have many lines.
    R is a rank at which a method other than LoRA was trained, or else the largest; LoRA runs of
    smaller rank stand in it as dedicated runs. `planned` are the resolved configs of all runs that
    there should be; those without a finished record are holes, and so are unfinished records.
    Raises UserError as `tidy_frame` does, and if nothing was measured at all.
    """
    frame = tidy_frame(records, planned)
    tables = []
    named = bool(frame["row"].notna().any())
    for block in _blocks(frame, named):
        baseline = block["method"].map(is_baseline).astype(bool)
        for rank in sorted(set(block["R"][~baseline]) or {max(block["R"])}):
            members = block[(block["R"] == rank) | (baseline & (block["R"] < rank))]
            if named:
                tables += _named_tables(members)
            else:
                tables += [_table(members, metric) for metric in metrics_of(members)]
    if not tables:
        runs = zip(*(runs_of(frame)[column] for column in ("run", "problem")), strict=True)
        state = "; ".join(f"{run}: {problem or 'no rows'}" for run, problem in runs)
        raise UserError(f"there is nothing to report yet ({state or 'no records'})")
    return tables


def _blocks(frame: pd.DataFrame, whole: bool) -> Iterator[pd.DataFrame]:
    """The lines of each model and dataset; of each scaling, unless `whole` or one has all LoRAs."""
    for _, block in grouped(frame, ["model", "dataset"]):
        if whole or block["scaling"][block["method"].map(is_baseline).astype(bool)].nunique() == 1:
            yield block
        else:
            yield from (found for _, found in grouped(block, "scaling"))


def rank_table(
    records: Sequence[Record],
    task: str,
    shots: int,
    metric: str,
    filter: str | None = None,
    limit: int | None = None,
    planned: Sequence[Mapping[str, Any]] | None = None,
) -> RankTable:
    """One table of all records: a row for each (model, dataset, method, R, scaling, lr, epochs,
    rule).

    LoRA runs of a smaller rank than the largest are dedicated runs. Raises UserError as
    `rank_tables` does, and if no finished record has this metric.
    """
    frame = tidy_frame(records, planned)
    wanted = Metric(task, shots, limit, metric, filter)
    found = metrics_of(frame)
    if wanted not in found:
        names = "; ".join(m.label for m in found) or "nothing"
        raise UserError(f"no finished record has {wanted.label}; there is: {names}")
    return _table(frame, wanted)


def _named_tables(members: pd.DataFrame) -> list[RankTable]:
    """A table for each inference rule and metric, on the runs that have it and on the holes."""
    tables = []
    for rule in sorted(set(members["rule"].dropna()) - {BASE}, key=rule_place):
        part = members[members["rule"].isin([rule, BASE]) | members["rule"].isna()]
        for metric in metrics_of(part[part["rule"] == rule]):
            lines = lines_of(part, metric)
            read = set(lines["group"][lines["rule"] == rule])
            tables.append(_table(part[part["group"].isin(read) | part["rule"].isna()], metric))
    return tables


def run_tables(record: Record) -> list[RankTable]:
    """The tables of one run alone, finished or not; an empty list if nothing is evaluated yet."""
    frame = tidy_frame([record], unfinished=True)
    return [_table(frame, metric) for metric in metrics_of(frame)]


def _table(frame: pd.DataFrame, metric: Metric) -> RankTable:
    """The table of one metric; `frame` has all lines of the runs that belong in it.

    A run that ended well lacks nothing where no run that asks for the same tasks was measured.
    """
    lines = lines_of(frame, metric)
    frame = frame[frame["asked"].isin(lines["asked"]) | frame["problem"].notna()]
    runs = runs_of(frame)
    smaller = runs["R"] < max(runs["R"])
    baseline = runs["method"].map(is_baseline).astype(bool)
    # A LoRA of the table's R that was read there alone stands beside those of smaller R.
    read = lines[lines["rank"] > 0].groupby("group")["rank"].agg(set)
    alone = set(read.index[read == {max(runs["R"])}]) if (read.map(len) > 1).any() else set()
    dedicated = set(runs["group"][baseline & (smaller | runs["group"].isin(alone))])
    labels = _labels(runs.drop_duplicates("group"), dedicated)
    axis = sorted({rank for rank in lines["rank"][~lines["group"].isin(dedicated)] if rank > 0})
    points = lines.dropna(subset="value").assign(shown=lambda line: line["value"] * metric.scale)
    rows: list[Curve] = []
    missing: list[str] = []
    for group, members in grouped(runs, "group"):
        own = points[points["group"] == group]
        if group in dedicated:
            made, gaps = [_dedicated(members, own, labels[group])], list[str]()
        else:
            made, gaps = _curves(members, own, labels[group], axis)
        rows += made
        missing += _absent(members, own, labels[group]) + gaps
    # Curves keep their order; dedicated LoRAs follow by rank.
    rows.sort(key=lambda row: row.rank if row.kind == "dedicated" else 0)
    rows = _base_rows(points) + rows
    return RankTable(
        metric,
        ranks=tuple(sorted({rank for row in rows for rank in (*row.cells, *row.holes)})),
        curve_ranks=tuple(axis),
        rows=tuple(rows),
        documents=tuple(sorted(set(points["n"]))),
        missing=tuple(missing),
    )


def group_labels(runs: pd.DataFrame) -> dict[Any, str]:
    """A label for each group of `runs`, the lines of `runs_of`: method and differing settings."""
    return _labels(runs.drop_duplicates("group"), set())


def _labels(groups: pd.DataFrame, dedicated: set[Any]) -> dict[Any, str]:
    """A label for each group: the method, and the settings in which the groups of a table differ.

    Settings of the method and the adapter are compared within one method and R, where they mean
    the same thing; content within what has the same name; all others over the whole table.
    """
    settings = groups.explode("variant").dropna(subset="variant")
    settings = settings.assign(key=settings["variant"].str[0], value=settings["variant"].str[1])
    scopes = {"method": ["method", "R"], "adapter": ["method", "R"]}
    scopes |= {"base": ["model"], "data": ["dataset"]}
    scope = settings.apply(
        lambda run: (run["key"], *run[scopes.get(run["key"].partition(".")[0], [])]), axis=1
    )
    # A setting that came later is only in runs that changed it: others differ by lacking it.
    alike = groups.groupby(["method", "R"])["group"].nunique()
    having = settings.groupby(["key", "method", "R"])["group"].transform("nunique")
    lacking = having < [alike[pair] for pair in zip(settings["method"], settings["R"], strict=True)]
    settings = settings[lacking | (settings.groupby(scope)["value"].transform("nunique") > 1)]
    labels = {}
    columns = (groups[name] for name in ("group", "method", "R", "row"))
    for group, method, rank, row in zip(*columns, strict=True):
        if isinstance(row, str):
            labels[group] = row
            continue
        label = methods.label(method) + (f" dedicated R={rank}" if group in dedicated else "")
        differing = ", ".join(
            f"{key.rpartition('.')[2]}={value.strip(chr(34))}"
            for key, value in settings["variant"][settings["group"] == group]
        )
        labels[group] = f"{label} ({differing})" if differing else label
    return labels


def _absent(runs: pd.DataFrame, points: pd.DataFrame, label: str) -> list[str]:
    """The runs of a group without a single point."""
    absent: Any = runs[~runs["seed"].isin(points["seed"])].itertuples()
    return [f"{_named(run, label)}: {run.problem or 'not evaluated'}" for run in absent]


def _named(run: Any, label: str) -> str:
    rank = "" if label.endswith(f"R={run.R}") else f" R={run.R}"
    trained = f", lr {run.lr:g}, seed {run.seed}" if was_trained_here(run.method) else ""
    return f"{label}{rank}, scaling {run.scaling}{trained}"


def _curves(
    runs: pd.DataFrame, points: pd.DataFrame, label: str, axis: Sequence[int]
) -> tuple[list[Curve], list[str]]:
    """A curve for each rule that any seed of the group has, and the points that are missing."""
    evaluated = runs[runs["seed"].isin(points["seed"])]
    curves: list[Curve] = []
    gaps: list[str] = []
    by_rule = grouped(points[points["rank"] > 0], "rule")
    for rule, found in sorted(by_rule, key=lambda item: (rule_place(item[0]), item[0])):
        # Lines: seeds, columns: ranks, NaN where a seed lacks a rank.
        scores = found.pivot(index="seed", columns="rank", values="shown").reindex(columns=[*axis])
        complete = tuple(rank for rank in axis if scores[rank].notna().all())
        areas = {
            name: _cell(
                [aurac(complete, seed, name) for seed in scores[[*complete]].to_numpy().tolist()]
            )
            for name in AXES
            if complete
        }
        cells = _cells(found)
        curves.append(
            _curve(
                "curve",
                runs,
                label,
                rule,
                seeds=len(scores),
                cells=cells,
                holes=tuple(rank for rank in axis if rank not in cells),
                aurac=areas,
                aurac_ranks=complete,
                same_as=_same_as(found, set(points["rule"])),
                points=found,
            )
        )
        measured = scores.notna().reindex(evaluated["seed"], fill_value=False)
        for run, (_, has) in zip(evaluated.itertuples(), measured.iterrows(), strict=True):
            if lost := ", ".join(str(rank) for rank in axis if not has[rank]):
                gaps.append(f"{_named(run, label)}: rule {rule} at rank {lost}")
        if len(complete) < len(axis):
            ranks = ", ".join(map(str, complete)) or "none"
            gaps.append(f"{label}, rule {rule}: AURAC covers only the ranks {ranks}")
    if not curves:
        curves = [_curve("curve", runs, label, None, seeds=0, cells={}, holes=tuple(axis))]
    return curves, gaps


def _dedicated(runs: pd.DataFrame, points: pd.DataFrame, label: str) -> Curve:
    """The one point for which a LoRA of smaller R was trained.

    At its own R plain LoRA is the same function under all of _WHOLE, so the first at hand serves.
    """
    rank = runs["R"].iloc[0]
    found = points[(points["rank"] == rank) & points["rule"].isin(_WHOLE)]
    found = found.sort_values("rule", key=lambda rules: rules.map(_WHOLE.index))
    found = found.drop_duplicates("seed").sort_values("seed")
    return _curve(
        "dedicated",
        runs,
        label,
        None if found.empty else found["rule"].iloc[0],
        seeds=len(found),
        cells=_cells(found),
        holes=(rank,) if found.empty else (),
        points=found,
    )


def _base_rows(points: pd.DataFrame) -> list[Curve]:
    """The untrained model, a row for each (model, dataset) that measured it.

    It has no seed, so equal values of several runs are one measurement.
    """
    curves = []
    base = points[points["rule"] == BASE]
    for (model, dataset), found in grouped(base, ["model", "dataset"]):
        values = found["shown"]
        cell = _cell(values[:1] if values.nunique() == 1 else values)
        curves.append(
            Curve("base", model, dataset, "base", "base", 0, "", None, None, BASE, 0, 0, {0: cell})
        )
    return curves


def _curve(
    kind: Literal["curve", "dedicated"],
    runs: pd.DataFrame,
    label: str,
    rule: str | None,
    **measured: Any,
) -> Curve:
    run: Any = next(runs.itertuples())
    return Curve(
        kind=kind,
        model=run.model,
        dataset=run.dataset,
        method_name=run.method,
        method=label,
        rank=run.R,
        scaling=run.scaling,
        lr=run.lr if was_trained_here(run.method) else None,
        epochs=run.epochs if was_trained_here(run.method) else None,
        rule=rule,
        planned=len(runs),
        **measured,
    )


def _same_as(points: pd.DataFrame, rules: set[str]) -> str | None:
    """Of `rules` the one that all points of a curve name as the same function at their own rank."""
    targets = set()
    for same_as, rank in zip(points["same_as"], points["rank"], strict=True):
        rule, _, at = (same_as or "").partition("@")
        targets.add(rule if at == str(rank) and rule in rules else "")
    return targets.pop() or None if len(targets) == 1 else None


def _cells(points: pd.DataFrame) -> dict[int, Cell]:
    """By rank, the cell of the points of one rule."""
    return {
        rank: _cell(found["shown"], untrained=bool(found["trained_rank"].eq(False).any()))
        for rank, found in grouped(points, "rank")
    }


def _cell(values: Iterable[float], untrained: bool = False) -> Cell:
    values = list(values)
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Cell(statistics.fmean(values), sd, untrained)
