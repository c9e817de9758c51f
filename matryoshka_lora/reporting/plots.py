"""Rank curves as figures (PNG, PDF), the same bytes for the same tables."""

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.reporting.curves import Curve, RankTable
from matryoshka_lora.reporting.names import method_style, rule_place

# For methods without a style of their own, and for further variants of a method in one table; of
# Okabe and Ito's palette, told apart by all common kinds of colour vision.
_SPARE_STYLES = (("#CC79A7", "v"), ("#56B4E9", "P"), ("#999999", "X"))
# For tables of many variants, which no palette tells apart without markers: 7 x 10 pairs. Those
# that come first must not look like a method's own.
_MANY_STYLES = tuple((f"C{n % 10}", "^vDPXos"[n % 7]) for n in range(70))
# By the order of the rules.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))

# The same for the markers, because a marker hides most of its line in a legend.
_FILLS: tuple[Any, ...] = ("full", "none", "bottom", "left")

_PANEL_COLUMNS = 2  # more would be too small to read on a page
_PANEL_INCHES = (5.8, 3.7)
_TITLE_CHARACTERS = 64  # of a line that fits above a panel
_LEGEND_LINE_INCHES = 0.19
_SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "legend.fontsize": 7.6,
    "legend.title_fontsize": 7.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "pdf.fonttype": 42,
}


def plot_tables(
    tables: Sequence[RankTable], stem: str | Path, suffixes: Sequence[str] = (".png", ".pdf")
) -> list[Path]:
    """Draw a panel a table, write `<stem>.png` and `<stem>.pdf`, and return the paths.

    A row of panels holds the metrics of one (model, dataset, R, scaling). Score over log2 rank, a
    line for each method (colour, marker) and rule (dash, fill of the marker), a band of one
    standard deviation over seeds, the base model dashed, dedicated LoRAs as open diamonds; AURAC
    (log2) in the legend below. No date or version goes into the files.
    """
    return save_figure(lambda: _figure(tables), Path(stem), suffixes)


def save_figure(
    draw: Callable[[], Figure], stem: Path, suffixes: Sequence[str] = (".png", ".pdf")
) -> list[Path]:
    """Write what `draw` makes in the project's style; the same figure gives the same bytes."""
    paths = [stem.with_name(stem.name + suffix) for suffix in suffixes]
    # The user's own matplotlibrc must not change a committed figure.
    with matplotlib.style.context(["default", _SETTINGS]):
        figure = draw()
        for path in paths:
            buffer = io.BytesIO()
            kind = path.suffix.removeprefix(".")
            clean = {"Software": None} if kind == "png" else {"CreationDate": None}
            figure.savefig(buffer, format=kind, dpi=150, metadata=clean)
            write_atomically(path, buffer.getvalue())
    return paths


def _figure(tables: Sequence[RankTable]) -> Figure:
    # A new (model, dataset, R, scaling) starts a new line of panels.
    blocks: dict[tuple[Any, ...], list[RankTable]] = {}
    for table in tables:
        blocks.setdefault(tuple(table.shared.items()), []).append(table)
    columns = min(_PANEL_COLUMNS, max(len(block) for block in blocks.values()))
    lines = [
        block[start : start + columns]
        for block in blocks.values()
        for start in range(0, len(block), columns)
    ]
    width, height = _PANEL_INCHES
    heights = [size for line in lines for size in (height, max(map(_legend_inches, line)))]
    figure = Figure(figsize=(width * columns, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2 * len(lines), columns, height_ratios=heights)
    for index, line in enumerate(lines):
        for column, table in enumerate(line):
            ax = figure.add_subplot(grid[2 * index, column])
            below = figure.add_subplot(grid[2 * index + 1, column])
            _panel(ax, table)
            _legend(below, ax)
    return figure


def _legend_inches(table: RankTable) -> float:
    """The height of the legend below a panel, dedicated LoRAs being one entry."""
    kinds = {row.kind for row in _references(table)}
    return _LEGEND_LINE_INCHES * (len(_drawn(table)) + len(kinds) + 3)


def _panel(ax: Axes, table: RankTable) -> None:
    for curve, rules in _drawn(table):
        _line(ax, table, curve, rules)
    kinds = set()
    for curve in _references(table):
        _reference(ax, table, curve, named=curve.kind not in kinds)
        kinds.add(curve.kind)
    rank_axis(ax, [rank for rank in table.ranks if rank > 0])
    ax.set_ylabel(f"{table.metric.metric} ({table.metric.unit})")
    shared = ", ".join(f"{name} {value}" for name, value in table.shared.items())
    lines = textwrap.wrap(shared, _TITLE_CHARACTERS, break_on_hyphens=False)
    ax.set_title("\n".join([table.metric.label, *lines]), loc="left")


def rank_axis(ax: Axes, ranks: Sequence[int]) -> None:
    """The horizontal axis: log2 of the rank, a tick at each of `ranks`."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(ranks))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("rank at inference")


def _legend(below: Axes, ax: Axes) -> None:
    """The legend of `ax` in axes of its own, where it can hide no curve."""
    below.set_axis_off()
    handles, labels = ax.get_legend_handles_labels()
    legend = below.legend(
        handles,
        labels,
        title="method, inference rule: AURAC over log2 rank",
        loc="upper left",
        bbox_to_anchor=(-0.08, 1.0),
        frameon=False,
        alignment="left",
        handlelength=4.2,
        borderaxespad=0,
    )
    legend.set_in_layout(False)


def _drawn(table: RankTable) -> list[tuple[Curve, list[str]]]:
    """The curves to draw, each with all rules that it stands for.

    Rules that are the same function lie on top of each other, so one line carries their names.
    """
    lines: list[tuple[Curve, list[str]]] = []
    for curve in table.rows:
        if curve.kind != "curve" or curve.rule is None:
            continue
        for drawn, rules in lines:
            siblings = _identity(drawn) == _identity(curve) and drawn.cells == curve.cells
            if siblings and (curve.same_as in rules or drawn.same_as == curve.rule):
                rules.append(curve.rule)
                break
        else:
            lines.append((curve, [curve.rule]))
    return lines


def _identity(curve: Curve) -> tuple[Any, ...]:
    return (
        *(curve.model, curve.dataset, curve.method, curve.rank),
        *(curve.scaling, curve.lr, curve.epochs),
    )


def _references(table: RankTable) -> list[Curve]:
    return [row for row in table.rows if row.kind != "curve" and row.cells]


def _line(ax: Axes, table: RankTable, curve: Curve, rules: Sequence[str]) -> None:
    colour, marker = _style(table, curve)
    ranks = sorted(curve.cells)
    means = [curve.cells[rank].mean for rank in ranks]
    label = f"{curve.method} {' = '.join(rules)}{_distinction(table, curve)}"
    place = min(rule_place(rules[0]), len(_DASHES) - 1)
    area = curve.aurac.get("log2")
    if area is not None and curve.aurac_ranks == table.curve_ranks:
        label += f": {table.metric.text(area.mean)}"
        label += "" if area.sd is None else f" ± {table.metric.text(area.sd)}"
    ax.plot(
        ranks,
        means,
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.6,
        linestyle=_DASHES[place],
        fillstyle=_FILLS[place],
        markerfacecoloralt="white",
        alpha=_opacity(table, curve),
        label=label,
    )
    spread = [curve.cells[rank].sd or 0.0 for rank in ranks]
    if any(spread):
        low = [mean - sd for mean, sd in zip(means, spread, strict=True)]
        high = [mean + sd for mean, sd in zip(means, spread, strict=True)]
        ax.fill_between(ranks, low, high, color=colour, alpha=0.15, linewidth=0)


def _reference(ax: Axes, table: RankTable, curve: Curve, named: bool) -> None:
    """The base model, or a dedicated LoRA, whose kind is `named` once in the legend."""
    ((rank, cell),) = curve.cells.items()
    if curve.kind == "base":
        ax.axhline(
            cell.mean,
            color="#444444",
            linestyle="--",
            linewidth=1,
            zorder=1,
            label=f"base model: {table.metric.text(cell.mean)}",
        )
        return
    ax.errorbar(
        [rank],
        [cell.mean],
        yerr=None if cell.sd is None else [cell.sd],
        color="black",
        marker="D",
        markersize=6,
        markerfacecolor="white",
        linestyle="none",
        capsize=2,
        zorder=5,
        label="LoRA trained for the rank alone" if named else None,
    )


def _distinction(table: RankTable, curve: Curve) -> str:
    """What tells a curve from others of the same method and rule."""
    values = {"model": curve.model, "dataset": curve.dataset, "scaling": curve.scaling}
    if curve.epochs is not None:
        values["epochs"] = f"{curve.epochs:g} epochs"
    if curve.kind == "curve":
        values["R"] = f"R={curve.rank}"
    parts = [value for name, value in values.items() if name not in table.shared]
    if len(_rates(table, curve)) > 1:
        parts.append(f"lr {curve.lr:g}")
    return "".join(f", {part}" for part in parts)


def _rates(table: RankTable, curve: Curve) -> list[float]:
    """Learning rates of a method in a table, the largest first."""
    rates = {row.lr for row in table.rows if row.method == curve.method and row.lr is not None}
    return sorted(rates, reverse=True)


def _opacity(table: RankTable, curve: Curve) -> float:
    """Paler for each smaller learning rate."""
    return max(0.25, 0.6 ** _rates(table, curve).index(curve.lr)) if curve.lr else 1.0


def _style(table: RankTable, curve: Curve) -> tuple[str, str]:
    """Colour and marker. The first variant of a method has the method's own, the others spare ones.

    A variant is what has a label, a scaling and epochs of its own.
    """
    variants = list(dict.fromkeys(_variant(row) for row in table.rows if row.kind == "curve"))
    first = {each[0]: each for each in reversed(variants)}
    variant, own = _variant(curve), method_style(curve.method_name)
    if own is not None and first[curve.method_name] == variant:
        return own
    others = [each for each in variants if each != first[each[0]] or method_style(each[0]) is None]
    styles = _SPARE_STYLES if len(others) <= len(_SPARE_STYLES) else _MANY_STYLES
    return styles[others.index(variant) % len(styles)]


def _variant(curve: Curve) -> tuple[Any, ...]:
    return curve.method_name, curve.method, curve.scaling, curve.epochs
