"""Run records -> tables and figures. Reads nothing but records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka_lora.reporting.answer import write_answer
from matryoshka_lora.reporting.curves import RankTable, rank_table, rank_tables, run_tables
from matryoshka_lora.reporting.dedicated import compare, write_comparisons
from matryoshka_lora.reporting.plots import plot_tables
from matryoshka_lora.reporting.rates import write_rates
from matryoshka_lora.reporting.tables import (
    format_multirun,
    format_run_table,
    table_frame,
    write_tables,
)
from matryoshka_lora.runs.record import Record

__all__ = [
    "RankTable",
    "format_multirun",
    "format_run_table",
    "plot_tables",
    "rank_table",
    "rank_tables",
    "run_tables",
    "table_frame",
    "write_rates",
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

    Records of a search also give `<name>-rates`, a table and a figure of the loss over the learning
    rate; those of at least FEWEST dedicated LoRAs `tables/<name>-dedicated.{csv,md,tex}`, how near
    each row comes to them, and `<name>-answer`, a short table and a figure. Returns the paths, the
    main table first. The files depend on the arguments alone, not on the order of the records
    or on the clock. `planned`: see `rank_tables`, whose UserErrors this raises, too.
    """
    results_dir = Path(results_dir)
    table, figure = results_dir / "tables" / table_name, results_dir / "figures" / table_name
    tables = rank_tables(records, planned)
    paths = write_tables(tables, table, title=table_name)
    paths += plot_tables(tables, figure)
    of_rates = f"{table_name}-rates"
    paths += write_rates(
        records, table.with_name(of_rates), figure.with_name(of_rates), title=table_name
    )
    against = [found for one in tables if (found := compare(one, records)) is not None]
    paths += write_comparisons(
        against,
        table.with_name(f"{table_name}-dedicated"),
        f"{table_name}: against dedicated LoRAs",
    )
    answer = f"{table_name}-answer"
    return paths + write_answer(against, table.with_name(answer), figure.with_name(answer))
