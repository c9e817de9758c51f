"""Write tables and figures from run records; the same records give the same bytes.

    python scripts/report.py                                rewrite every committed table
    python scripts/report.py records=results/runs           one table of one's own runs

A folder of committed records has a folder for each table; `results/records/<table>/` becomes
`results/tables/<table>.{csv,md,tex}` and `results/figures/<table>.{png,pdf}`. A folder of runs, as
train.py leaves them, becomes one table named after the folder, with all finished runs below it; the
others are named as missing. The folder may also be given without `records=`.
"""

import dataclasses
from pathlib import Path

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.reporting import write_report
from matryoshka_lora.runs.folder import RECORD, RunFolder
from matryoshka_lora.runs.record import find_records, read_record


@dataclasses.dataclass
class Options:
    """The command line."""

    records: str = option(
        "results/records", "folder of committed records, or of runs", positional=True
    )
    output: str | None = option(None, "gets tables/ and figures/; null: the folder above records")


def main(options: Options) -> None:
    """Raises what `report` raises."""
    folder = Path(options.records)
    for path in report(folder, folder.parent if options.output is None else Path(options.output)):
        print(path, flush=True)


def report(folder: Path, output: Path) -> list[Path]:
    """Write the report of every table that `folder` holds; returns the paths.

    Raises UserError if there is no folder with records, or one of them is not valid.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of records or runs")
    tables = find_tables(folder)
    if not tables:
        raise UserError(
            f"no records below {folder}: expected {folder}/<table>/.../*.json, or runs with their "
            f"{RECORD}"
        )
    written = []
    for name, paths in tables.items():
        written += write_report(name, [read_record(path) for path in paths], output)
    return written


def find_tables(folder: Path) -> dict[str, list[Path]]:
    """Name of each table below `folder` -> the paths of its records."""
    paths = records_below(folder)
    if paths and all(is_of_a_run(path) for path in paths):
        return {folder.resolve().name: paths}
    tables = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {table.name: records_below(table) for table in tables}
    return {name: paths for name, paths in found.items() if paths}


def records_below(folder: Path) -> list[Path]:
    """Every JSON file, but in a run's folder, where other tools write JSON too, only the record."""
    names = (RECORD, RunFolder(folder).config.name)
    runs = {path.parent for name in names for path in folder.rglob(name)}
    return [
        path
        for path in find_records(folder, "*.json")
        if path.name == RECORD or runs.isdisjoint(path.parents)
    ]


def is_of_a_run(path: Path) -> bool:
    """Whether the record lies in a run's folder as train.py makes it."""
    return path.name == RECORD and RunFolder(path.parent).config.is_file()


if __name__ == "__main__":
    run_script(main, __doc__, Options)
