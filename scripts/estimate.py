"""What a plan says before it starts: its runs, what is finished, how long the rest takes."""

import dataclasses
import logging
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grid import Run, Table

from matryoshka_lora.runs.folder import RECORD
from matryoshka_lora.runs.provenance import environment
from matryoshka_lora.runs.record import find_records, read_record
from matryoshka_lora.training.plan import total_steps

logger = logging.getLogger("matryoshka_lora.scripts.estimate")


def show_plan(
    tables: Sequence[Table], where: str, slots: int, output: Path, unreachable: str | None
) -> None:
    """Print what will run `where`, `slots` at a time.

    output: folder of runs and records. unreachable: why what is finished is not known.
    """
    for table in tables:
        print(f"{table.name}:")
        for group in table.groups:
            seeds = ", ".join(map(str, group.seeds))
            rate = "the best lr" if group.lr is None else f"lr {group.lr:g}"
            parts = [f"{rate}, seeds {seeds}: {_finished(group.final)}"] if group.final else []
            if group.search:
                tried = dict.fromkeys(f"{run.config.trainer.rate:g}" for run in group.search)
                lrs = ", ".join(tried)
                on = f"on seed {group.seeds[0]}: {_finished(group.search)}"
                parts.insert(0, f"search lr {lrs} {on}")
            if group.also:
                tasks = ", ".join(group.also[0].config.eval.tasks)
                parts.append(f"{tasks} on the first seed: {_finished(group.also)}")
            print(f"  {group.label:<28} {'; then '.join(parts)}")
    every = [run for table in tables for run in table.runs]
    todo = [run for run in every if run.finished() is None]
    if unreachable is not None:
        print(f"what is finished is unknown, because {unreachable}")
    print(f"{len(every)} runs, {len(every) - len(todo)} finished, {len(todo)} to do on {where}")
    if todo:
        print(f"estimated time: {_duration(estimate(todo, output, slots))}")
    sys.stdout.flush()


def _finished(runs: Sequence[Run]) -> str:
    if any(run.inputs is None for run in runs):
        return f"{len(runs)} runs"
    return f"{sum(run.finished() is not None for run in runs)} of {len(runs)} finished"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown (no finished run of this model, data, R and device to go by)"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def estimate(todo: Iterable[Run], output: Path, slots: int) -> float | None:
    """Seconds of training and evaluation, by finished runs of the same shape on the same device.

    Start-up is not in it. None where a run has nothing to go by. Slots of a CPU share its cores, so
    only those of GPUs shorten it.
    """
    here = environment()["device"]
    known = []
    paths = find_records(output / "runs", RECORD) + find_records(output / "records", "*.json")
    for path in paths:
        try:
            record = read_record(path)
        except ValueError as error:  # of a run that is planned it would have been raised before
            logger.warning("%s", error)
            continue
        if record.training and all(
            record.training_device.get(k) == here[k] for k in ("kind", "name")
        ):
            known.append(record)
    total = 0.0
    for run in todo:
        config = dataclasses.asdict(run.config)
        like = [r for r in known if _shape(r.config) == _shape(config)]
        read_alike = [
            r.evaluation["seconds"]
            for r in like
            if r.evaluation
            and all(
                r.config["eval"][k] == config["eval"][k]
                for k in ("tasks", "rules", "ranks", "limit")
            )
        ]
        if run.inputs is None or not like or not (read_alike or not config["eval"]["tasks"]):
            return None
        steps = total_steps(len(run.inputs.train), run.config.trainer)
        pace = [r.training["seconds"] / r.training["steps"] for r in like if r.training]
        total += steps * statistics.median(pace)
        total += statistics.median(read_alike) if read_alike else 0.0
    return total / (slots if here["kind"] == "cuda" else 1)


def _shape(config: Mapping[str, Any]) -> tuple[Any, ...]:
    model, dataset, adapter = config["model"], config["dataset"], config["adapter"]
    return (
        *(model["name"], model["dtype"], dataset["name"]),
        *(adapter["rank"], config["trainer"]["effective_batch"]),
    )
