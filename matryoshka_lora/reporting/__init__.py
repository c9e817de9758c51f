"""Run records -> tables and figures. Reads nothing but records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka_lora.reporting.curves import RankTable, rank_table, rank_tables, run_tables
from matryoshka_lora.reporting.plots import plot_tables
from matryoshka_lora.reporting.tables import (
    format_comparison,
    format_run_table,
    table_frame,
    write_tables,
)
from matryoshka_lora.runs.record import Record

__all__ = [
    "RankTable",
    "format_comparison",
    "format_run_table",
    "plot_tables",
    "rank_table",
    "rank_tables",
    "run_tables",
    "table_frame",
    "write_report",
    "write_tables",
]


def write_report(
    table_name: str,
    records: Sequence[Record],
    results_dir: str | Path,
    planned: Sequence[Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write `tables/<name>.{csv,md,tex}` and `figures/<name>.{png,pdf}` below `results_dir`.

    Returns the five paths. The files depend on the arguments alone, not on the order of the
    records or on the clock. `planned`: see `rank_tables`, whose UserErrors this raises, too.
    """
    results_dir = Path(results_dir)
    tables = rank_tables(records, planned)
    paths = write_tables(tables, results_dir / "tables" / table_name, title=table_name)
    return paths + plot_tables(tables, results_dir / "figures" / table_name)
