"""Publishing a table: its finished runs' records into one folder, and the report on them."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from grid import Run

from matryoshka_lora.reporting import write_report
from matryoshka_lora.runs.record import Record, find_records, read_record, write_record

logger = logging.getLogger("matryoshka_lora.scripts.publish")


def publish(
    table: str,
    runs: Sequence[Run],
    output: Path,
    holds: Callable[[Record], bool],
    prune: bool = False,
    row_names: Mapping[str, str] | None = None,
) -> None:
    """Copy the finished records to records/<table>/, write the report and show the table.

    The report is on all records there that are of the table's grid, as `holds` says, also those of
    other seeds or methods than `runs`, whose missing ones are holes. Records of other grids are
    named and left where they are, but not reported, or with `prune` removed. A record of one of
    `runs` under a name of another version gives way to the new one. Rows of rules that the plan
    reads at another rate are left out, see `for_its_rules`. row_names: by run hash; the copies keep
    them as `diagnostics.row`, the label of their row in the report.
    """
    folder = output / "records" / table
    finished = [
        for_its_rules(record, run, runs) for run in runs if (record := run.ended()) is not None
    ]
    if not finished:
        logger.warning("%s: no run is finished, so the table is not written", table)
        return
    for record in finished:
        if (row := (row_names or {}).get(record.run_hash)) is not None:
            record.diagnostics["row"] = row
    new = {folder / f"{record.name.replace('/', '-')}.json": record for record in finished}
    for path, record in new.items():
        old = {row.key for row in read_record(path).rows} if path.exists() else set()
        if lost := old - {row.key for row in record.rows}:
            logger.warning("%s: %d rows of the old record are not in the new", path, len(lost))
        write_record(path, record)
    kept: dict[Path, Record] = {}
    strangers = []
    for path in find_records(folder, "*.json"):
        if path in new:
            continue
        try:
            record = read_record(path)
        except ValueError as error:
            logger.warning("%s", error)
            strangers.append(path)
            continue
        if any(run.may_be_of(record) for run in runs if run.finished() is not None):
            logger.warning("%s: the record of the same run has a new name and replaces it", path)
            path.unlink()
        elif holds(record):
            kept[path] = record
        else:
            strangers.append(path)
    if prune:
        for path in strangers:
            path.unlink()
    if strangers:
        logger.warning(
            "%s: %d records are not of this grid; %s: %s",
            folder,
            len(strangers),
            "removed (git brings committed ones back)"
            if prune
            else "they stay, but are not in this table (prune=1 removes them, name=... writes a "
            "table of its own)",
            ", ".join(path.name for path in strangers),
        )
    holes = [
        dataclasses.asdict(run.config)
        for run in runs
        if run.finished() is None and not any(map(run.may_be_of, kept.values()))
    ]
    if holes:
        logger.warning("%s: %d of %d runs are missing", table, len(holes), len(runs))
    records = {**kept, **new}
    ordered = [records[path] for path in sorted(records)]
    paths = write_report(table, ordered, output, holes)
    print(f"\n{next(p for p in paths if p.suffix == '.md').read_text()}")
    print("wrote", f"{folder}/ ({len(new)} records)", *map(str, paths), sep="\n  ", flush=True)
    if kept:
        print(f"the table is on {len(kept)} more records of this grid that were there", flush=True)


def for_its_rules(record: Record, run: Run, runs: Sequence[Run]) -> Record:
    """The record of a final run without rules that are read of other runs of the same settings.

    Rows of a table that differ in the rule alone have a rate, and a number of epochs, each. A run's
    folder may hold what an earlier choice asked of it; a rule stands at the rate of its own row.
    """
    mine = run.config.eval.rules
    if mine is None or run.config.dataset.validation:
        return record
    others = {
        rule
        for other in runs
        if _settings(other) == _settings(run)
        for rule in other.config.eval.rules or ()
    }
    if not (foreign := others - set(mine)):
        return record
    evaluation = dict(record.evaluation or {})
    evaluation["finished"] = [
        point
        for point in evaluation.get("finished", ())
        if point.rpartition(" ")[2].partition("@")[0] not in foreign
    ]
    rows = [row for row in record.rows if row.rule not in foreign]
    return dataclasses.replace(record, rows=rows, evaluation=evaluation)


def _settings(run: Run) -> dict[str, str]:
    """What a row of the plan sets, but for what it chooses and how it reads."""
    chosen = ("trainer.lr", "trainer.epochs", "seed", "eval.rules", "eval.ranks", "eval.tasks")
    return {key: text for key, text in run.settings.items() if key not in chosen}
