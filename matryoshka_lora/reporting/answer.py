"""The answer to the project's question, short: one figure and one table of at most six rows."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from matryoshka_lora.config import AdapterConfig
from matryoshka_lora.reporting.curves import Cell, Curve
from matryoshka_lora.reporting.dedicated import (
    Comparison,
    Comparisons,
    cost_text,
    percent_text,
)
from matryoshka_lora.reporting.grids import Grid, write_grids
from matryoshka_lora.reporting.names import method_style
from matryoshka_lora.reporting.plots import rank_axis, save_figure


@dataclass(frozen=True)
class Headline:
    """A row: the best training of a method under a rule."""

    method: str
    rule: str
    label: str


ROWS = (
    Headline("matryoshka", "prefix", "MatryoshkaLoRA, as published"),
    Headline("lora", "svd", "LoRA, cut by SVD"),
    Headline("nested_matryoshka", "trained", "nested MatryoshkaLoRA"),
)
"""Beside them stand the dedicated LoRAs and the untrained model."""
SCALES = {"none": "1", "sqrt": "1/sqrt(r)", "rank": "1/r"}
NEAR = 1.15
"""Of the figure's second panel: the largest loss over that of the dedicated LoRAs."""


def write_answer(found: Sequence[Comparisons], stem: Path, figure: Path) -> list[Path]:
    """Write `<stem>.md`, `.tex` and `<figure>.png`, `.pdf` of the table with the most runs.

    Nothing where no table has any of ROWS, or one has several sets of training records.
    """
    answers = [(one, rows) for one in found if (rows := _rows(one))]
    if not answers or len({one.table.metric for one in found}) < len(found):
        return []
    one, rows = max(answers, key=lambda answer: sum(row.curve.seeds for row in answer[1].values()))
    paths = write_grids([_grid(one, rows)], stem, "One adapter, or a LoRA for every rank?")
    return paths + save_figure(lambda: _figure(one, rows), figure)


def _rows(one: Comparisons) -> dict[Headline, Comparison]:
    """Of several trainings (rates, scalings, initialisers) the one with the lowest mean loss."""
    rows = {}
    for headline in ROWS:
        mine = [
            compared
            for compared in one.curves
            if (compared.curve.method_name, compared.curve.rule) == (headline.method, headline.rule)
            and not set(one.dedicated) - set(compared.curve.cells)
        ]
        if mine:
            rows[headline] = min(mine, key=lambda compared: _mean(compared.curve, one))
    return rows


def _mean(curve: Curve, one: Comparisons) -> float:
    return statistics.fmean(curve.cells[rank].mean for rank in one.dedicated)


def _grid(one: Comparisons, rows: dict[Headline, Comparison]) -> Grid:
    metric, ranks = one.table.metric, [*one.dedicated]
    lines = []
    for headline, compared in rows.items():
        curve = compared.curve
        cells = [
            f"{_loss(one, curve, rank)}\n{percent_text(compared.excess[rank])} %"
            f"\nr {one.rank_text(compared.equivalent[rank])}"
            for rank in ranks
        ]
        names = [_label(one, headline, curve), curve.rule or ""]
        names += [f"{curve.lr:g}", f"{curve.epochs:g}"]
        lines.append([*names, str(curve.seeds), cost_text(compared.cost), *cells])
    alone = one.dedicated.values()
    epochs, seeds = (_span([*map(of, alone)]) for of in (lambda c: c.epochs, lambda c: c.seeds))
    names = ["a LoRA for each rank alone", "", "each its own", epochs, seeds, cost_text(one.cost)]
    lines.append([*names, *(_loss(one, curve, rank) for rank, curve in one.dedicated.items())])
    if base := _base(one):
        text = metric.text(base.cells[0].mean)
        lines.append(["untrained model", *[""] * 5, *[text] * len(ranks)])
    return Grid(
        metric.label,
        f"{', '.join(f'{name} {value}' for name, value in one.table.shared.items())}; "
        f"n = {one.table.documents[0]} problems. First line: loss ({metric.unit}), mean ± standard "
        "deviation over seeds. Second: above the LoRA trained for this rank alone. Third: the rank "
        f"r of a dedicated LoRA with the same loss. {one.legend}",
        ["", "rule", "lr", "epochs", "seeds", "cost", *map(str, ranks)],
        lines,
    )


def _label(one: Comparisons, headline: Headline, curve: Curve) -> str:
    """The headline, and which settings of the adapter differ from the defaults, or the LoRAs."""
    settings = curve.method.partition(" (")[2].removesuffix(")").split(", ")
    told = [text for text in settings if text and not _is_default(text)]
    if {lora.scaling for lora in one.dedicated.values()} != {curve.scaling}:
        told.append(f"scaling {SCALES.get(curve.scaling, curve.scaling)}")
    return ", ".join([headline.label, *told])


def _is_default(setting: str) -> bool:
    """Whether a text such as `init=lora` says what the adapter has anyway."""
    key, _, value = setting.partition("=")
    return str(getattr(AdapterConfig(), key, None)) == value


def _loss(one: Comparisons, curve: Curve, rank: int) -> str:
    cell, text = curve.cells[rank], one.table.metric.text
    return text(cell.mean) + ("" if cell.sd is None else f" ± {text(cell.sd)}")


def _span(values: Sequence[float | None]) -> str:
    known = sorted({f"{value:g}" for value in values if value is not None}, key=float)
    return "–".join(dict.fromkeys([known[0], known[-1]]))


def _base(one: Comparisons) -> Curve | None:
    return next((row for row in one.table.rows if row.kind == "base"), None)


def _figure(one: Comparisons, rows: dict[Headline, Comparison]) -> Figure:
    """All of it, and beside it what is near the dedicated LoRAs."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    everything, near = figure.subplots(1, 2)
    for ax in (everything, near):
        if base := _base(one):
            ax.axhline(base.cells[0].mean, color="#444444", linestyle="--", label="untrained model")
        for headline, compared in rows.items():
            colour, marker = method_style(headline.method) or ("#999999", "o")
            cells = [compared.curve.cells[rank] for rank in one.dedicated]
            _line(ax, one, cells, _label(one, headline, compared.curve), colour, marker)
        cells = [curve.cells[rank] for rank, curve in one.dedicated.items()]
        _line(ax, one, cells, "a LoRA for each rank alone", "#000000", "s")
        rank_axis(ax, [*one.dedicated])
    metric = one.table.metric
    everything.set_ylabel(f"loss on {metric.task} ({metric.unit})")
    # Below the line of the untrained model.
    everything.legend(edgecolor="none", loc="upper right", bbox_to_anchor=(1.0, 0.95))
    means = [curve.cells[rank].mean for rank, curve in one.dedicated.items()]
    near.set_ylim(min(means) * 0.95, max(means) * NEAR)
    near.set_title(f"the same, up to {NEAR - 1:.0%} above the LoRAs", loc="left")
    shared = ", ".join(f"{name} {value}" for name, value in one.table.shared.items())
    everything.set_title(shared.replace(", dataset", "\ndataset"), loc="left")
    return figure


def _line(
    ax: Axes, one: Comparisons, cells: Sequence[Cell], label: str, colour: str, marker: str
) -> None:
    """Means over ranks, with a band of one standard deviation over seeds."""
    ranks, means = [*one.dedicated], [cell.mean for cell in cells]
    ax.plot(ranks, means, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=label)
    if any(cell.sd for cell in cells):
        low, high = ([c.mean + sign * (c.sd or 0.0) for c in cells] for sign in (-1, 1))
        ax.fill_between(ranks, low, high, color=colour, alpha=0.2, linewidth=0)
