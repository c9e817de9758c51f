"""Run the grid of a table, go on where it was stopped, and write the table and its figure.

    python scripts/reproduce.py table2 model=tiny
    python scripts/reproduce.py table2 model=llama3_1b gpus=8 dry=1
    python scripts/reproduce.py table3 model=llama3_8b launcher=submitit_slurm \\
        hydra.launcher.partition=gpu

The grids are in configs/experiment. With several learning rates each (method, R, scaling) first
trains with each of them on the first seed, with some training records held out, and the lowest
held-out loss wins (scripts/search.py); then all seeds train on all records. A subset of the grid,
such as seeds=42, adds to the records of the table that are there, and the table is on all of them.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from estimate import show_plan
from grid import Planner, Run, Table
from publish import publish
from reproduce_options import AXES, Options

from hydra_plugins.gpu_queue.jobs import Job, Outcome, Slot, find_slots, run_jobs
from matryoshka_lora.cli import run_script

logger = logging.getLogger("matryoshka_lora.scripts.reproduce")

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
# A day, because Hydra's default of one hour ends most trainings; one GPU a job.
SLURM = {"hydra.launcher.timeout_min": "1440", "hydra.launcher.gpus_per_node": "1"}


def main(options: Options) -> int:
    """Plan, run, report. Returns 1 where a run failed, else 0."""
    planner = Planner(options)
    tables = planner.tables()
    choose(tables)
    output = Path(tables[0].groups[0].final[0].config.output_dir)
    slots = [Slot("this machine", {})]
    if options.launcher == "gpu_queue":
        slots = find_slots(options.gpus)
    where = {"submitit_slurm": "Slurm", "local": "this machine, one after the other"}.get(
        options.launcher or "", ", ".join(slot.name for slot in slots)
    )
    show_plan(tables, where, len(slots), output, planner.unreachable)
    if options.dry:
        return 0
    outcomes: list[Outcome] = []
    for stage in ("search", "final"):
        runs: list[Run] = [run for table in tables for run in getattr(table, stage)]
        todo = [run for run in runs if run.is_pending()]
        logs = output / "logs" / options.table
        if todo and options.launcher == "submitit_slurm":
            jobs = slurm_jobs(todo, options)
            outcomes += run_jobs(jobs, [Slot("Slurm", {})] * len(jobs), TRAIN, logs)
        elif todo:
            jobs = [Job(run.name, run.overrides) for run in todo]
            outcomes += run_jobs(jobs, slots, TRAIN, logs, show=options.launcher == "local")
        choose(tables)
    for table in tables:
        if table.search:
            publish(f"{table.name}-search", table.search, output, table.holds, options.prune)
        publish(table.name, table.final, output, table.holds, options.prune)
    return report_failures(tables, outcomes)


def choose(tables: Sequence[Table]) -> None:
    """Take the best learning rate of every group whose search has ended."""
    for table in tables:
        for group in table.groups:
            group.choose()


def slurm_jobs(runs: Sequence[Run], options: Options) -> list[Job]:
    """`train.py -m hydra/launcher=submitit_slurm ...`: each submits a job array and waits."""
    of_launcher = {"hydra/launcher": "submitit_slurm"} | SLURM | options.launcher_overrides
    jobs = []
    for number, sweep in enumerate(as_products([run.settings for run in runs])):
        overrides = [f"{key}={text}" for key, text in (of_launcher | sweep).items()]
        logger.info("python train.py -m %s", " ".join(overrides))
        jobs.append(Job(f"slurm-{number}", ("-m", *overrides)))
    return jobs


def as_products(runs: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Few sweeps `key=a,b` whose products are together exactly `runs`."""
    for axis in AXES:
        merged: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for run in runs:
            rest = tuple((key, text) for key, text in run.items() if key != axis)
            merged.setdefault(rest, []).append(run[axis])
        runs = [dict(rest) | {axis: ",".join(texts)} for rest, texts in merged.items()]
    return list(runs)


def report_failures(tables: Sequence[Table], outcomes: Sequence[Outcome]) -> int:
    """Name every run that should be finished and is not; 1 if there are any."""
    of_job = {outcome.job.name: outcome for outcome in outcomes}
    lines = []
    for table in tables:
        for run in table.search:
            if run.diverged():
                logger.warning("%s, %s: %s", table.name, run.name, run.failure())
        for group in table.groups:
            if group.lr is None:
                lines.append(f"{table.name}, {group.label}: no learning rate could be chosen")
        for run in table.runs:
            if run.is_pending():
                outcome = of_job.get(run.name)
                error = run.failure() or (outcome and outcome.error) or "not finished"
                log = f" (see {outcome.log})" if outcome else ""
                lines.append(f"{table.name}, {run.name}: {error}{log}")
    lines += [
        f"{outcome.job.name}: {outcome.error} (see {outcome.log})"
        for outcome in outcomes
        if outcome.error is not None and outcome.job.name.startswith("slurm-")
    ]
    if not lines:
        return 0
    print("\nfailed; the same command goes on with these:", *lines, sep="\n  ", file=sys.stderr)
    return 1


if __name__ == "__main__":
    run_script(main, __doc__, Options)
