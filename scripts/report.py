"""Rewrite every committed table and figure from the records behind it.

    python scripts/report.py [results/records]

Reads all records below `results/records/<table>/`, writes `results/tables/<table>.{csv,md,tex}`
and `results/figures/<table>.{png,pdf}`; the same records give the same bytes.
"""

import argparse
import sys
from pathlib import Path

from matryoshka_lora.reporting import write_report
from matryoshka_lora.runs.record import find_records, read_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "records",
        nargs="?",
        type=Path,
        default=Path("results/records"),
        help="folder with one folder of records a table (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for tables/ and figures/ (default: the one above RECORDS)",
    )
    arguments = parser.parse_args()
    try:
        for path in report(arguments.records, arguments.output or arguments.records.parent):
            print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def report(folder: Path, output: Path) -> list[Path]:
    """Write the report of every table folder; returns the paths.

    Raises ValueError if there is no folder with records, or one of them is not valid.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of records (one folder a table)")
    written = []
    for table in sorted(path for path in folder.iterdir() if path.is_dir()):
        records = [read_record(path) for path in find_records(table, "*.json")]
        if records:
            written += write_report(table.name, records, output)
    if not written:
        raise ValueError(f"no records below {folder}: expected {folder}/<table>/.../*.json")
    return written


if __name__ == "__main__":
    main()
