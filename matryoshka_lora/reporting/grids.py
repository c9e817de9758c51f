"""Tables of texts as Markdown and LaTeX, and how a row of a rank table is named in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.reporting.curves import Curve, RankTable

HOLE = "–"
"""What should be there and is not."""
_SHARED = ("model", "dataset", "R", "scaling", "epochs")
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "*": "$^*$", "±": "$\\pm$"}
    | {"–": "--", "★": "$^\\star$", "☆": "$^\\circ$", "<": "$<$", ">": "$>$"}
)
_MARKDOWN = str.maketrans({"|": "\\|", "*": "\\*", "\n": "<br>"})


@dataclass(frozen=True)
class Grid:
    """A table of texts. Columns up to that before "seeds" are aligned left, all others right.

    title: in Markdown no heading is repeated where the one before has the same. A cell may have
    several lines. notes: a paragraph each, below.
    """

    title: str
    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def text_columns(self) -> int:
        return list(self.header).index("seeds")


def write_grids(grids: Sequence[Grid], stem: Path, title: str) -> list[Path]:
    """Write `<stem>.md` and `<stem>.tex` and return their paths."""
    before = [None, *(grid.title for grid in grids)]
    parts = [
        _markdown(grid, heading=grid.title != above)
        for grid, above in zip(grids, before, strict=False)
    ]
    contents = {
        ".md": "\n".join([f"# {title}\n", *parts]),
        ".tex": "\n".join(["% Needs \\usepackage{booktabs}.\n", *map(_latex, grids)]),
    }
    paths = [stem.with_name(stem.name + suffix) for suffix in contents]
    for path, text in zip(paths, contents.values(), strict=True):
        write_atomically(path, text.encode())
    return paths


def write_csv(frame: pd.DataFrame, stem: Path) -> Path:
    """Write `<stem>.csv`, of rows that have what `row_settings` gives, and return its path."""
    settings = {
        name: frame[name].map("{:g}".format, na_action="ignore") for name in ("lr", "epochs")
    }
    text = frame.assign(**settings).to_csv(index=False, float_format="%.4f", lineterminator="\n")
    path = stem.with_name(stem.name + ".csv")
    write_atomically(path, text.encode())
    return path


def row_header(table: RankTable) -> list[str]:
    """The names of what stands before the numbers of a row; what rows share is in the caption."""
    varying = [name for name in _SHARED if name not in table.shared]
    return ["method", *varying, "rule", "lr", "seeds"]


def row_names(table: RankTable, row: Curve) -> list[str]:
    """What stands before the numbers of a row."""
    identity = row_settings(row)
    seeds = str(row.seeds) if row.seeds == row.planned else f"{row.seeds}/{row.planned}"
    return [
        row.method,
        *(_text(identity[name]) for name in _SHARED if name not in table.shared),
        (row.rule or "") if row.kind == "curve" else "",
        _text(row.lr),
        "" if row.kind == "base" else seeds,
    ]


def row_settings(row: Curve) -> dict[str, Any]:
    """What a row is, for CSV."""
    return {
        "model": row.model,
        "dataset": row.dataset,
        "method": row.method,
        "R": row.rank,
        "scaling": row.scaling,
        "lr": row.lr,
        "epochs": row.epochs,
        "rule": row.rule,
        "seeds": row.seeds,
        "planned": row.planned,
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _markdown(grid: Grid, heading: bool) -> str:
    rule = ["---"] * grid.text_columns
    rule += ["---:"] * (len(grid.header) - grid.text_columns)
    body = [[cell.translate(_MARKDOWN) for cell in line] for line in (grid.header, *grid.lines)]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in (body[0], rule, *body[1:]))
    head = [f"## {grid.title}"] if heading else []
    notes = [note.translate(_MARKDOWN) for note in grid.notes]
    return "\n\n".join([*head, f"{grid.caption.translate(_MARKDOWN)}.", lines, *notes]) + "\n"


def _latex(grid: Grid) -> str:
    alignment = "l" * grid.text_columns + "r" * (len(grid.header) - grid.text_columns)
    header, *body = [
        " & ".join(map(_latex_cell, line)) + " \\\\" for line in (grid.header, *grid.lines)
    ]
    lines = [
        f"% {grid.title}",
        "\\begin{table}",
        f"\\caption{{{f'{grid.title}; {grid.caption}'.translate(_LATEX)}}}",
        f"\\begin{{tabular}}{{{alignment}}}",
        "\\toprule",
        header,
        "\\midrule",
        *body,
        "\\bottomrule",
        "\\end{tabular}",
        *(f"\\par {note.translate(_LATEX)}" for note in grid.notes),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(text: str) -> str:
    lines = text.translate(_LATEX).replace("\n", " \\\\ ")
    return f"\\shortstack[r]{{{lines}}}" if "\n" in text else lines
