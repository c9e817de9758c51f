"""Rank tables as CSV, Markdown, LaTeX, pandas and plain text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from matryoshka_lora.reporting.aurac import AXES, Axis
from matryoshka_lora.reporting.curves import Cell, Curve, RankTable, rank_tables, run_tables
from matryoshka_lora.reporting.differences import (
    Column,
    Difference,
    Reference,
    differences,
    references,
    svd_of_lora,
)
from matryoshka_lora.reporting.grids import (
    HOLE,
    Grid,
    row_header,
    row_names,
    row_settings,
    write_csv,
    write_grids,
)
from matryoshka_lora.runs.record import Record

_Marks = dict[tuple[int, Column], str]
"""By id of a row and column, the marks of the differences that hold."""


def table_frame(table: RankTable) -> pd.DataFrame:
    """One line a row, columns `<rank> mean`, `<rank> sd`, ..., `AURAC log2 mean`, ...

    Accuracies in percent, losses raw; what was not measured is NaN.
    """
    return _frame([table])


def write_tables(tables: Sequence[RankTable], stem: str | Path, title: str) -> list[Path]:
    """Write `<stem>.csv`, `.md` and `.tex` and return their paths; same tables, same bytes.

    CSV: one line for each row of any table, mean and sd apart. Markdown and LaTeX: a section a
    table, `mean ± sd`, what is missing named below, then the differences from each reference, see
    `differences`; those that hold are marked.
    """
    stem = Path(stem)
    csv = write_csv(_frame(tables), stem)
    return [csv, *write_grids([grid for table in tables for grid in _grids(table)], stem, title)]


def format_run_table(record: Record) -> str:
    """Scores of one run at every rank as plain text: a block a metric, a line a rule.

    Ends in AURAC over log2(rank) and over the linear axis. A run that is not finished shows what
    it has.
    """
    blocks = [_plain_block(table) for table in run_tables(record)]
    return "\n\n".join(blocks) or f"{record.name}: nothing evaluated yet ({record.status})"


def format_multirun(records: Sequence[Record]) -> str:
    """Scores of several runs as plain text: a block a metric, a line for each method and rule.

    As in `write_tables` seeds are pooled. Raises UserError as `rank_tables` does.
    """
    blocks = []
    for table in rank_tables(records):
        grid = _scores(table, {})
        lines = [grid.header, *grid.lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        block = [grid.title, grid.caption]
        for line in lines:
            cells = [
                text.ljust(width) if place < grid.text_columns else text.rjust(width)
                for place, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            block.append("  ".join(cells).rstrip())
        blocks.append("\n".join([*block, *grid.notes]))
    return "\n\n".join(blocks)


def _line(table: RankTable, row: Curve) -> dict[str, Any]:
    metric = table.metric
    line: dict[str, Any] = {
        "task": metric.task,
        "shots": metric.shots,
        "limit": metric.limit,
        "metric": metric.metric,
        "filter": metric.filter,
        **row_settings(row),
    }
    cells: list[tuple[str, Cell | None]] = [(str(r), row.cells.get(r)) for r in table.ranks]
    cells += [(f"AURAC {axis}", row.aurac.get(axis)) for axis in AXES]
    for name, cell in cells:
        line[f"{name} mean"] = None if cell is None else cell.mean
        line[f"{name} sd"] = None if cell is None else cell.sd
    return line


def _frame(tables: Sequence[RankTable]) -> pd.DataFrame:
    """One line for each row of any table, with a column for each rank of any of them."""
    frame = pd.DataFrame([_line(table, row) for table in tables for row in table.rows])
    ranks = sorted({rank for table in tables for rank in table.ranks})
    names = [*map(str, ranks), *(f"AURAC {axis}" for axis in AXES)]
    measured = [f"{name} {part}" for name in names for part in ("mean", "sd")]
    settings = [name for name in frame if name not in measured]
    return frame[[*settings, *measured]].astype(
        {"limit": "Int64"} | dict.fromkeys(["lr", "epochs", *measured], float)
    )


def _grids(table: RankTable) -> list[Grid]:
    """The scores, and the differences from each reference that there is."""
    compared = [(reference, differences(table, reference)) for reference in references(table)]
    compared = [(reference, found) for reference, found in compared if found]
    marks: _Marks = {}
    for reference, found in compared:
        for row, cells in found:
            for column, cell in cells.items():
                if cell.holds:
                    marks[id(row), column] = marks.get((id(row), column), "") + reference.mark
    return [_scores(table, marks), *(_differences(table, *each) for each in compared)]


def _scores(table: RankTable, marks: _Marks) -> Grid:
    """The rows of a table; constant columns are left to the caption."""
    lines = []
    for row in table.rows:
        line = row_names(table, row)
        for column in (*table.ranks, *AXES):
            cell = _at(row, column)
            if cell is None:
                line.append(HOLE if _is_hole(row, column) else "")
                continue
            text = table.metric.text(cell.mean)
            if cell.sd is not None:
                text += f" ± {table.metric.text(cell.sd)}"
            text += "*" if cell.untrained else ""
            mark = marks.get((id(row), column), "")
            line.append(f"{text} {mark}" if mark else text)
        lines.append(line)
    header = _header(table, (*table.ranks, *AXES))
    return Grid(table.metric.label, _caption(table), header, lines, _notes(table, marks))


def _header(table: RankTable, columns: Sequence[Column]) -> list[str]:
    names = [f"AURAC {column}" if column in AXES else str(column) for column in columns]
    return [*row_header(table), *names]


def _differences(
    table: RankTable,
    reference: Reference,
    found: Sequence[tuple[Curve, dict[Column, Difference]]],
) -> Grid:
    columns = [*filter(reference.rows.__contains__, (*table.curve_ranks, *AXES))]
    lines = []
    for row, cells in found:
        if row.same_as is not None:
            continue  # its other name has a line
        texts = [
            _difference(table, cells[c], reference.mark) if c in cells else "" for c in columns
        ]
        lines.append([*row_names(table, row), *texts])
    return Grid(
        table.metric.label,
        f"Minus {reference.name}, with the 95 % interval of a bootstrap over the problems for "
        f"these seeds. {reference.mark} where it and that over seeds and problems exclude 0; with "
        "one seed each, neither knows how seeds differ",
        _header(table, columns),
        lines,
    )


def _difference(table: RankTable, cell: Difference, mark: str) -> str:
    digits = table.metric.digits
    # + 0.0 turns -0.0 into 0.0.
    mean, low, high = (round(x, digits) + 0.0 for x in (cell.mean, cell.low, cell.high))
    text = f"{mean:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{text} {mark}" if cell.holds else text


def _at(row: Curve, column: int | Axis) -> Cell | None:
    return row.cells.get(column) if isinstance(column, int) else row.aurac.get(column)


def _is_hole(row: Curve, column: int | Axis) -> bool:
    return column in row.holes if isinstance(column, int) else row.kind == "curve"


def _caption(table: RankTable) -> str:
    documents = "–".join(map(str, sorted({*table.documents[:1], *table.documents[-1:]}))) or "0"
    parts = [f"{name} {value}" for name, value in table.shared.items()]
    parts += [f"{documents} documents", f"unit {table.metric.unit}"]
    if any(cell.sd is not None for row in table.rows for cell in row.cells.values()):
        parts.append("mean ± standard deviation over seeds")
    return ", ".join(parts)


def _notes(table: RankTable, marks: _Marks) -> list[str]:
    notes = ["* rank outside the trained sub-ranks"] if _untrained(table) else []
    held = "".join(marks.values())
    legend = [
        f"{ref.mark} differs from {ref.name}" for ref in references(table) if ref.mark in held
    ]
    if legend:
        notes.append(", ".join(legend) + ": see the differences below")
    if len(table.documents) > 1:
        notes.append("not all values are over the same number of documents")
    if table.missing:
        notes.append("missing: " + "; ".join(table.missing))
    if len(several := svd_of_lora(table)) > 1:
        first = several[0]
        notes.append(
            f"no differences from {first.method} {first.rule}: there are {len(several)} such rows"
        )
    return notes


def _untrained(table: RankTable) -> bool:
    return any(cell.untrained for row in table.rows for cell in row.cells.values())


def _plain_block(table: RankTable) -> str:
    metric = table.metric
    head = f"{metric.label} [{metric.unit}], {max(table.documents, default=0)} documents"
    for row in table.rows:
        if row.kind == "base":
            head += f", base model {metric.text(row.cells[0].mean)}"
    lines = [["rule", *(f"r={rank}" for rank in table.curve_ranks), "AURAC", "linear"]]
    for row in table.rows:
        if row.kind == "base" or row.rule is None:
            continue
        line = [row.rule]
        for column in (*table.curve_ranks, *AXES):
            cell = _at(row, column)
            partial = column in AXES and row.aurac_ranks != table.curve_ranks
            if cell is None or partial:
                line.append("- ")
            else:
                # A blank where no star is, so that the digits stay aligned.
                line.append(metric.text(cell.mean) + ("*" if cell.untrained else " "))
        lines.append(line)
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    block = [head]
    for rule, *values in lines:
        if rule == "rule":
            values = [f"{name} " for name in values]
        padded = [value.rjust(width + 1) for value, width in zip(values, widths[1:], strict=True)]
        block.append(" ".join([rule.ljust(widths[0]), *padded]).rstrip())
    if _untrained(table):
        block.append("* rank outside the trained sub-ranks")
    return "\n".join(block)
