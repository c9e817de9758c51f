"""Run records -> tables and figures. Reads nothing but records."""

import itertools
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


RATES, DEDICATED, ANSWER = "rates", "dedicated", "answer"
"""What stands in the names of the files beside a table, where its records give them."""


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
    or on the clock, and those of an earlier report that these records do not give are removed.
    `planned`: see `rank_tables`, whose UserErrors this raises, too.
    """
    results_dir = Path(results_dir)
    table, figure = results_dir / "tables" / table_name, results_dir / "figures" / table_name
    tables = rank_tables(records, planned)
    paths = write_tables(tables, table, title=table_name)
    paths += plot_tables(tables, figure)
    beside = {
        kind: (table.with_name(f"{table_name}-{kind}"), figure.with_name(f"{table_name}-{kind}"))
        for kind in (RATES, DEDICATED, ANSWER)
    }
    paths += write_rates(records, *beside[RATES], title=table_name)
    against = [found for one in tables for found in compare(one, records)]
    paths += write_comparisons(
        against, beside[DEDICATED][0], f"{table_name}: against dedicated LoRAs"
    )
    paths += write_answer(against, *beside[ANSWER])
    for stem in itertools.chain(*beside.values()):
        for suffix in (".csv", ".md", ".tex", ".png", ".pdf"):
            path = stem.with_name(stem.name + suffix)
            if path not in paths:
                path.unlink(missing_ok=True)
    return paths
