"""Rank tables as CSV, Markdown, LaTeX, pandas and plain text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.reporting.aurac import AXES, Axis
from matryoshka_lora.reporting.curves import Cell, Curve, RankTable, rank_tables, run_tables
from matryoshka_lora.reporting.differences import Difference, differences, references
from matryoshka_lora.runs.record import Record

_SHARED = ("model", "dataset", "R", "scaling")


def table_frame(table: RankTable) -> pd.DataFrame:
    """One line a row, columns `<rank> mean`, `<rank> sd`, ..., `AURAC log2 mean`, ...

    Accuracies in percent, losses raw; what was not measured is NaN.
    """
    return _frame([table])


def write_tables(tables: Sequence[RankTable], stem: str | Path, title: str) -> list[Path]:
    """Write `<stem>.csv`, `.md` and `.tex` and return their paths; same tables, same bytes.

    CSV: one line for each row of any table, mean and sd apart. Markdown and LaTeX: a section a
    table, `mean ± sd`, the best value of each column bold unless all are equal, what is missing
    named below. Markdown also has the differences from one curve, see `differences`.
    """
    stem = Path(stem)
    contents = {
        ".csv": _csv(tables),
        ".md": "\n".join([f"# {title}\n", *map(_markdown, tables)]),
        ".tex": "\n".join(["% Needs \\usepackage{booktabs}.\n", *map(_latex, tables)]),
    }
    paths = [stem.with_name(stem.name + suffix) for suffix in contents]
    for path, text in zip(paths, contents.values(), strict=True):
        write_atomically(path, text.encode())
    return paths


def format_run_table(record: Record) -> str:
    """Scores of one run at every rank as plain text: a block a metric, a line a rule.

    Ends in AURAC over log2(rank) and over the linear axis. A run that is not finished shows what
    it has.
    """
    blocks = [_plain_block(table) for table in run_tables(record)]
    return "\n\n".join(blocks) or f"{record.name}: nothing evaluated yet ({record.status})"


def format_multirun(records: Sequence[Record]) -> str:
    """Scores of several runs as plain text: a block a metric, a line for each method and rule.

    As in `write_tables` seeds are pooled, and the best value of a column is marked by `>`. Raises
    UserError as `rank_tables` does.
    """
    blocks = []
    for table in rank_tables(records):
        lines = _body(table, _PLAIN)
        text_columns = lines[0].index("seeds")
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        block = [table.metric.label, f"{_caption(table)}; > marks the best"]
        for line in lines:
            cells = [
                text.ljust(width) if place < text_columns else text.rjust(width)
                for place, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            block.append("  ".join(cells).rstrip())
        blocks.append("\n".join([*block, *_notes(table)]))
    return "\n\n".join(blocks)


@dataclass(frozen=True)
class _Markup:
    """How one format writes a cell."""

    plus_minus: str
    hole: str
    untrained: str
    bold: Callable[[str], str]
    escape: Callable[[str], str]


_PLAIN = _Markup("±", "-", "*", ">{}".format, lambda text: text)
_MARKDOWN = _Markup("±", "–", "\\*", "**{}**".format, lambda text: text.replace("|", "\\|"))
_LATEX_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}"}
)
_LATEX = _Markup(
    "$\\pm$", "--", "$^*$", "\\textbf{{{}}}".format, lambda text: text.translate(_LATEX_SPECIAL)
)


def _line(table: RankTable, row: Curve) -> dict[str, Any]:
    metric = table.metric
    line: dict[str, Any] = {
        "task": metric.task,
        "shots": metric.shots,
        "limit": metric.limit,
        "metric": metric.metric,
        "filter": metric.filter,
        "model": row.model,
        "dataset": row.dataset,
        "method": row.method,
        "R": row.rank,
        "scaling": row.scaling,
        "lr": row.lr,
        "rule": row.rule,
        "seeds": row.seeds,
        "planned": row.planned,
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
        {"limit": "Int64"} | dict.fromkeys(["lr", *measured], float)
    )


def _csv(tables: Sequence[RankTable]) -> str:
    frame = _frame(tables)
    frame["lr"] = frame["lr"].map("{:g}".format, na_action="ignore")
    return frame.to_csv(index=False, float_format="%.4f", lineterminator="\n")


def _body(table: RankTable, markup: _Markup) -> list[list[str]]:
    """Header and rows as text of one format; constant columns are left to the caption."""
    best = _best(table)
    body = [[markup.escape(name) for name in _header(table, table.ranks)]]
    for row in table.rows:
        line = [markup.escape(text) for text in _names(table, row)]
        for column in (*table.ranks, *AXES):
            cell = _at(row, column)
            if cell is None:
                line.append(markup.hole if _is_hole(row, column) else "")
                continue
            text = table.metric.text(cell.mean)
            is_best = text == best.get(column)
            if cell.sd is not None:
                text += f" {markup.plus_minus} {table.metric.text(cell.sd)}"
            text = markup.bold(text) if is_best and _competes(table, row, column) else text
            line.append(text + (markup.untrained if cell.untrained else ""))
        body.append(line)
    return body


def _header(table: RankTable, ranks: Sequence[int]) -> list[str]:
    varying = [name for name in _SHARED if name not in table.shared]
    areas = [f"AURAC {axis}" for axis in AXES]
    return ["method", *varying, "rule", "lr", "seeds", *map(str, ranks), *areas]


def _names(table: RankTable, row: Curve) -> list[str]:
    """What stands before the numbers of a row."""
    identity = {
        "model": row.model,
        "dataset": row.dataset,
        "R": str(row.rank),
        "scaling": row.scaling,
    }
    seeds = str(row.seeds) if row.seeds == row.planned else f"{row.seeds}/{row.planned}"
    return [
        row.method,
        *(identity[name] for name in _SHARED if name not in table.shared),
        (row.rule or "") if row.kind == "curve" else "",
        "" if row.lr is None else f"{row.lr:g}",
        "" if row.kind == "base" else seeds,
    ]


def _at(row: Curve, column: int | Axis) -> Cell | None:
    return row.cells.get(column) if isinstance(column, int) else row.aurac.get(column)


def _is_hole(row: Curve, column: int | Axis) -> bool:
    return column in row.holes if isinstance(column, int) else row.kind == "curve"


def _competes(table: RankTable, row: Curve, column: int | Axis) -> bool:
    """The base has nobody to beat; areas over fewer ranks are another quantity."""
    if row.kind == "base":
        return False
    return isinstance(column, int) or row.aurac_ranks == table.curve_ranks


def _best(table: RankTable) -> dict[int | Axis, str]:
    """The best value of each column as printed, so that what looks equal is marked equal."""
    best: dict[int | Axis, str] = {}
    choose = min if table.metric.lower_is_better else max
    for column in (*table.ranks, *AXES):
        cells = [_at(row, column) for row in table.rows if _competes(table, row, column)]
        means = [cell.mean for cell in cells if cell is not None]
        if len({table.metric.text(mean) for mean in means}) > 1:  # else nothing won
            best[column] = table.metric.text(choose(means))
    return best


def _caption(table: RankTable) -> str:
    documents = "–".join(map(str, sorted({*table.documents[:1], *table.documents[-1:]}))) or "0"
    parts = [f"{name} {value}" for name, value in table.shared.items()]
    parts += [f"{documents} documents", f"unit {table.metric.unit}"]
    if any(cell.sd is not None for row in table.rows for cell in row.cells.values()):
        parts.append("mean ± standard deviation over seeds")
    return ", ".join(parts)


def _notes(table: RankTable) -> list[str]:
    notes = []
    if len(table.documents) > 1:
        notes.append("not all values are over the same number of documents")
    if table.missing:
        notes.append("missing: " + "; ".join(table.missing))
    return notes


def _untrained(table: RankTable) -> bool:
    return any(cell.untrained for row in table.rows for cell in row.cells.values())


def _markdown(table: RankTable) -> str:
    notes = ["\\* rank outside the trained sub-ranks"] if _untrained(table) else []
    notes += [_MARKDOWN.escape(note) for note in _notes(table)]
    paragraphs = [f"## {table.metric.label}", _caption(table) + ".", _grid(_body(table, _MARKDOWN))]
    return "\n\n".join([*paragraphs, *notes, *_compared(table)]) + "\n"


def _grid(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    text_columns = header.index("seeds")
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def _compared(table: RankTable) -> list[str]:
    """Paragraphs: the differences from the reference, if there are any."""
    bases, found = references(table), differences(table)
    if len(bases) > 1:
        first = bases[0]
        return [f"No differences: there are {len(bases)} curves of {first.method} {first.rule}."]
    if not found:
        return []
    (base,) = bases
    lines = [_header(table, table.curve_ranks)]
    for row, cells in found:
        columns = [cells.get(column) for column in (*table.curve_ranks, *AXES)]
        numbers = ["" if cell is None else _interval(table, cell) for cell in columns]
        lines.append([_MARKDOWN.escape(text) for text in _names(table, row)] + numbers)
    return [
        f"Minus {_MARKDOWN.escape(base.method)} {base.rule} (seeds: {base.seeds}), with the 95 % "
        "interval of a bootstrap over the documents for these seeds; others may differ by more. "
        "Bold where it excludes 0 and no seed of one is among those of the other.",
        _grid(lines),
    ]


def _interval(table: RankTable, cell: Difference) -> str:
    digits = table.metric.digits
    # + 0.0 turns -0.0 into 0.0.
    mean, low, high = (round(x, digits) + 0.0 for x in (cell.mean, cell.low, cell.high))
    text = f"{mean:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return _MARKDOWN.bold(text) if (low > 0 or high < 0) and cell.apart else text


def _latex(table: RankTable) -> str:
    header, *body = _body(table, _LATEX)
    text_columns = header.index("seeds")
    alignment = "l" * text_columns + "r" * (len(header) - text_columns)
    caption = _LATEX.escape(f"{table.metric.label}; {_caption(table)}").replace("±", "$\\pm$")
    notes = ["$^*$ rank outside the trained sub-ranks"] if _untrained(table) else []
    notes += [_LATEX.escape(note) for note in _notes(table)]
    lines = [
        f"% {table.metric.label}",
        "\\begin{table}",
        f"\\caption{{{caption.replace('–', '--')}}}",
        f"\\begin{{tabular}}{{{alignment}}}",
        "\\toprule",
        " & ".join(header) + " \\\\",
        "\\midrule",
        *(" & ".join(line) + " \\\\" for line in body),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"\\par {note}" for note in notes),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


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
            if cell is None or not _competes(table, row, column):
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
