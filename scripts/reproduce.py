"""Run the grid of a table, go on where it was stopped, and write the table and its figure.

    python scripts/reproduce.py smollm2 workers_per_gpu=4
    python scripts/reproduce.py table2 model=tiny
    python scripts/reproduce.py table2 model=llama3_1b gpus=8 dry=1
    python scripts/reproduce.py table3 model=llama3_8b launcher=submitit_slurm \\
        hydra.launcher.partition=gpu

The grids are in configs/experiment. With several learning rates each (method, R, scaling) first
trains with each of them on the first seed, with some training records held out, and the lowest
held-out loss wins (scripts/search.py); then all seeds train on all records. A subset of the grid,
such as seeds=42, adds to the records of the table that are there, and the table is on all of them.
Tables with a file in configs/evidence are lists of rows instead, each at its own learning rate
(scripts/evidence.py); there, published records count as finished runs, and a third stage, `also`,
evaluates some final runs on more tasks.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from estimate import show_plan
from evidence import evidence_file, evidence_table
from grid import Planner, Run, Table
from publish import publish
from reproduce_options import AXES, STAGES, Options

from hydra_plugins.gpu_queue.jobs import Job, Outcome, Slot, find_slots, run_jobs
from matryoshka_lora.cli import run_script
from matryoshka_lora.core.errors import UserError

logger = logging.getLogger("matryoshka_lora.scripts.reproduce")

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
# A day, because Hydra's default of one hour ends most trainings; one GPU a job.
SLURM = {"hydra.launcher.timeout_min": "1440", "hydra.launcher.gpus_per_node": "1"}


def main(options: Options) -> int:
    """Plan, run, report. Returns 1 where a run failed, else 0."""
    planner = Planner(options)
    if (rows := evidence_file(options)) is not None:
        tables = [evidence_table(rows, options, planner)]
    elif options.rows is not None:
        raise UserError(
            f"rows={','.join(options.rows)}: {options.table} of this model is a grid; give "
            "methods=, ranks=, scalings=, lrs= or seeds="
        )
    else:
        tables = planner.tables()
    for table in tables:
        table.settle()
    output = Path(tables[0].runs[0].config.output_dir)
    slots = [Slot("this machine", {})]
    if options.launcher == "gpu_queue":
        slots = find_slots(
            options.gpus, workers_per_gpu=options.workers_per_gpu, cpu_slots=options.slots
        )
    where = {"submitit_slurm": "Slurm", "local": "this machine, one after the other"}.get(
        options.launcher or "", ", ".join(slot.name for slot in slots)
    )
    show_plan(tables, where, len(slots), output, planner.unreachable)
    if options.dry:
        return 0
    outcomes: dict[str, Outcome] = {}
    if options.only in (None, "search"):
        # A search that ends at an end of its rates has more to do.
        while todo := pending(tables, "search", outcomes):
            outcomes |= run_all(todo, options, slots, output, tables)
            for table in tables:
                table.settle()
        for table in tables:
            if table.search:
                name, names = table.search_name, table.row_names
                publish(name, table.search, output, table.holds, options.prune, names)
    for stage in ("final", "also"):
        if options.only in (None, stage):
            if todo := pending(tables, stage, outcomes if stage == "final" else {}):
                outcomes |= run_all(todo, options, slots, output)
            for table in tables:
                if runs := getattr(table, stage):
                    # What is evaluated on more stands last: its record has the most rows.
                    runs = [*table.final, *runs] if stage == "also" else runs
                    publish(table.name, runs, output, table.holds, options.prune)
    return report_failures(tables, outcomes, options)


def pending(tables: Sequence[Table], stage: str, tried: Mapping[str, Outcome]) -> list[Run]:
    """The runs of a stage that are to be started and were not tried yet."""
    runs: list[Run] = [run for table in tables for run in getattr(table, stage)]
    return [run for run in runs if run.is_pending() and run.name not in tried]


def run_all(
    todo: Sequence[Run],
    options: Options,
    slots: Sequence[Slot],
    output: Path,
    searched: Sequence[Table] = (),
) -> dict[str, Outcome]:
    """How each run, or each job array of Slurm, ended, by its name.

    searched: tables whose search goes on at once, where a run settles what is to be tried next.
    """
    logs = output / "logs" / options.table
    if options.launcher == "submitit_slurm":
        jobs = slurm_jobs(todo, options)
        ended = run_jobs(jobs, [Slot("Slurm", {})] * len(jobs), TRAIN, logs)
        of_slurm = {outcome.job.name: outcome for outcome in ended}
        return of_slurm | {run.name: ended[0] for run in todo}
    started = {run.name for run in todo}

    def more(outcome: Outcome) -> list[Job]:
        for table in searched:
            table.settle()
        new = [run for run in pending(searched, "search", {}) if run.name not in started]
        started.update(run.name for run in new)
        return [Job(run.name, run.overrides) for run in new]

    # The longest first, so that none is left alone at the end.
    ordered = sorted(todo, key=lambda run: -run.config.trainer.epochs)
    jobs = [Job(run.name, run.overrides) for run in ordered]
    show = options.launcher == "local"
    ended = run_jobs(jobs, slots, TRAIN, logs, show=show, more=more if searched else None)
    return {outcome.job.name: outcome for outcome in ended}


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


def report_failures(
    tables: Sequence[Table], outcomes: Mapping[str, Outcome], options: Options
) -> int:
    """Name every run that should be finished and is not; 1 if there are any."""
    lines = []
    for table in tables:
        for run in table.search:
            if run.diverged():
                logger.warning("%s, %s: %s", table.name, run.name, run.failure())
        for group in table.groups:
            found = table.search_alone and all(run.diverged() for run in group.search)
            if group.lr is None and not found:
                lines.append(f"{table.name}, {group.label}: no learning rate could be chosen")
        stages = (options.only,) if options.only else STAGES
        for run in (run for stage in stages for run in getattr(table, stage)):
            if run.is_pending():
                outcome = outcomes.get(run.name)
                error = run.failure() or (outcome and outcome.error) or "not finished"
                log = f" (see {outcome.log})" if outcome else ""
                lines.append(f"{table.name}, {run.name}: {error}{log}")
    lines += [
        f"{name}: {outcome.error} (see {outcome.log})"
        for name, outcome in outcomes.items()
        if outcome.error is not None and name.startswith("slurm-")
    ]
    if not lines:
        return 0
    lines = list(dict.fromkeys(lines))
    print("\nfailed; the same command goes on with these:", *lines, sep="\n  ", file=sys.stderr)
    return 1


if __name__ == "__main__":
    run_script(main, __doc__, Options)
