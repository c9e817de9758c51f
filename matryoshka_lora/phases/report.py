"""Show a run: its table printed, and table and plot beside its record."""

import logging
from pathlib import Path

from matryoshka_lora.comparison import note_run
from matryoshka_lora.reporting import format_run_table, plot_tables, run_tables, write_tables
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.record import Record

logger = logging.getLogger(__name__)


def report(record: Record, folder: RunFolder) -> Path | None:
    """Print the rank-accuracy table, write table and plot beside the record, name the files.

    Returns the plot as PNG, or None where the record has no rows for one or nothing can be written:
    a finished run is shown on a disk that is only read, too.
    """
    note_run(folder.record)
    tables = run_tables(record)
    print(f"\n{format_run_table(record)}\n")
    if not tables:
        return None
    files = (folder.record, folder.adapter, folder.config, folder.train_log, folder.samples)
    paths = [path for path in files if path.exists()]
    try:
        paths += write_tables(tables, folder.table, title=record.name)
        figures = plot_tables(tables, folder.plot)
    except OSError as error:
        logger.warning("table and plot are not written: %s", error)
        return None
    print("wrote", *(str(path) for path in [*paths, *figures]), sep="\n  ", flush=True)
    return next(path for path in figures if path.suffix == ".png")
