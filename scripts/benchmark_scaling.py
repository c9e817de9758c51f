"""What 2, 4, ... GPUs of one host bring over one: training, the sweep, and a grid of runs.

    python scripts/benchmark_scaling.py model_path=models/SmolLM2-135M-Instruct data_path=data
    python scripts/benchmark_scaling.py parts=[training,sharded] gpus=[1,4] seconds=540
    python scripts/benchmark_scaling.py gpus=[1,2] shapes=[tiny-r32] sweeps=[tiny] steps=5 \\
        loss_steps=20 grid_runs=4 grid_steps=20     everything on CPUs, with the embedded model

The parts: `training` and `sharded` are starts of scripts/benchmark_training.py, 32 samples a step
on each GPU; `sweep` of scripts/benchmark_sweep.py; `losses` trains one run on each number of GPUs,
with the same effective batch, on the most also with a sharded base (configs/accelerate/fsdp.yaml),
and compares the losses of all steps; `grid` is `train.py -m` with the GPU queue, the same runs on
one GPU and on the most. SmolLM2 is trained on GSM8K where `model_path` is given, else the embedded
model.

Measurements that fit on the host's cards run side by side. Each adds an entry to a record in
`output` (training.json, sweep.json, scaling.json) as soon as it is done, and one that is there with
the same options is not measured again. What takes longer than `limit` seconds, or is not done when
`seconds` are over, is ended and named; the rest goes on. `scaling.md` has the speed of n GPUs as a
share of n times the speed of one.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmark_sweep
import benchmark_training
import psutil
from benchmark_common import (
    COMMITTED,
    LOCAL,
    SHARDED,
    merge_entry,
    read_entries,
    settings_of,
    split_key,
    write_table,
)

from hydra_plugins.gpu_queue.jobs import file_name, last_error, visible_gpus
from matryoshka_lora.cli import environment_of_children, option, parse_options, run_script
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.provenance import environment
from matryoshka_lora.runs.record import find_records, read_record

logger = logging.getLogger("matryoshka_lora.benchmark")

SCRIPTS = Path(__file__).parent
TRAIN = SCRIPTS.parent / "train.py"
SHARDED_LAUNCH = SCRIPTS.parent / "configs" / "accelerate" / "fsdp.yaml"
ENDING_SECONDS = 10.0
"""How long the end of a killed process is waited for: freeing a full card takes seconds."""
LLAMA3_70B = "shape=llama3_70b rank=16 gradient_checkpointing=true warmup=3 steps=8"
SHAPES = {
    "llama3_8b-r32": "shape=llama3_8b rank=32",
    "llama3_8b-r256": "shape=llama3_8b rank=256",
    "llama3_1b-r32": "shape=llama3_1b rank=32 cuda_graphs=true warmup=60 steps=60",
    "llama3_1b-r256": "shape=llama3_1b rank=256 cuda_graphs=true warmup=60 steps=60",
    "llama3_8b-r256-sharded": "shape=llama3_8b rank=256 sharded=true",
    "llama3_70b-r16": LLAMA3_70B,
    "llama3_70b-r16-sharded": f"{LLAMA3_70B} sharded=true",
    "tiny-r32": "shape=tiny rank=32",
    "tiny-r32-sharded": "shape=tiny rank=32 sharded=true",
}
"""Name -> options of benchmark_training.py."""
RUN = "run"
SWEEPS = {
    "llama3_1b-3shot": "shape=llama3_1b shots=3",
    # Each token gathers the base, so few documents; the ranks are answered together.
    "llama3_70b-sharded": (
        "shape=llama3_70b rank=16 ranks=[1,4,16] documents=16 shots=0 sharded=true"
    ),
    "tiny-sharded": "shape=tiny rank=32 shots=0 documents=8 sharded=true",
    "tiny": "shape=tiny shots=0 rank=32 documents=40",
    RUN: "",
}
"""Name -> options of benchmark_sweep.py; `run` is the run of `losses` on one GPU."""
LARGE = {"llama3_70b": 131.4}
"""Beginning of a name -> GiB of the base, where a card may be too small for it."""
ROOM = 0.75
"""The share of a card that a base may fill; the rest is for all else."""
ALONE = "losses-x1"
PARTS = ("training", "sharded", "sweep", "losses", "grid")
BENCHMARKS = ("training", "sweep", "scaling")
GOALS = {"llama3_8b-r32": 0.93, "llama3_1b-r256": 0.88, "sweep": 0.85, "grid": 0.875}
# Of a number in bf16, which has 8 significant bits, relative to it.
BF16 = 2.0**-8
NOTE = f"""\
Several GPUs of one host (`make benchmark-scaling`). Training: 32 samples a step on each GPU; of a
sharded base, one GPU has the whole base. Efficiency is the speed as a share of n times that of one
GPU. What fits on the host was measured side by side. Losses: the same run on n GPUs with the same
effective batch; the largest difference of a step's loss from that on one, relative to it. A number
in bf16 is rounded by up to 2^-8 = {BF16:.1e} of it, and a batch that is split otherwise is rounded
otherwise: in the row `losses-split` one GPU makes smaller forwards of it. A grid's seconds include
all starts."""


@dataclass
class Options:
    """The command line."""

    gpus: list[int] = option([1, 2, 4], "how many; without a GPU so many processes of the CPU")
    parts: list[str] = option(list(PARTS), "what", choices=PARTS)
    shapes: list[str] = option(
        ["llama3_8b-r32", "llama3_1b-r256", "llama3_8b-r256-sharded", "llama3_70b-r16-sharded"],
        "of training and sharded",
        choices=SHAPES,
    )
    sweeps: list[str] = option(
        ["llama3_1b-3shot", "llama3_70b-sharded", RUN], "of sweep", choices=SWEEPS
    )
    seconds: float = option(math.inf, "for all; what is not done then is ended")
    limit: float = option(300.0, "of one measurement, grids aside: a hang costs no more")
    steps: int = option(20, "of training, measured after the warm-up, where a shape has no own")
    loss_steps: int = option(300, "of the run of losses")
    grid_runs: int = option(8, "seeds of the grid")
    grid_steps: int = option(300, "of each run of the grid")
    model_path: str | None = option(None, "folder of SmolLM2-135M; null: the embedded model")
    data_path: str | None = option(None, "folder with gsm8k/, for SmolLM2; null: the hub")
    again: bool = option(False, "measure also what is there")
    output: str = option(
        f"{LOCAL}/scaling", f"folder of records and table; {COMMITTED}/scaling has those committed"
    )
    work: str = option(f"{LOCAL}/scaling-work", "folder of the runs themselves and all output")


@dataclass(frozen=True)
class Measurement:
    """Something to run on so many cards; `run` gets their ids and raises RuntimeError.

    after: what has to end before. is_long: whether it takes much longer than others.
    """

    name: str
    cards: int
    run: Callable[[Sequence[str]], object]
    after: str | None = None
    is_long: bool = False


class Bench:
    """Makes the measurements that are asked for and not there yet."""

    def __init__(self, options: Options, on_gpus: bool) -> None:
        self.options, self.on_gpus = options, on_gpus
        self.output, self.work = Path(options.output), Path(options.work)
        self.end = time.monotonic() + options.seconds
        self.entries = {name: read_entries(self.output, name) for name in BENCHMARKS}
        device = environment()["device"]
        self.card = device["name"]
        self.card_gib = device.get("memory_gib", math.inf)

    def plan(self) -> list[Measurement]:
        """All of them, each once."""
        made = [each for part in PARTS if part in self.options.parts for each in self._part(part)]
        return list({each.name: each for each in made if each is not None}.values())

    def _part(self, part: str) -> Iterator[Measurement | None]:
        options, counts = self.options, sorted(self.options.gpus)
        if part == "losses":
            yield self._losses("losses-split", 1, (f"trainer.max_tokens={self._half_step()}",))
            if self.on_gpus and counts[-1] > 1:
                yield self._losses(f"losses{SHARDED}-x{counts[-1]}", counts[-1])
        if part == "grid":
            counts = [count for count in counts if count in (1, counts[-1])]
        for count in counts:
            if part == "losses":
                yield self._losses(f"losses-x{count}", count)
            elif part == "grid":
                yield self._grid(count)
            elif part == "sweep":
                for sweep in options.sweeps:
                    sharded = sweep.endswith(SHARDED)
                    if self._holds(sweep, count) and (count > 1 or not sharded):
                        yield self._sweep(sweep, count)
            else:
                for shape in options.shapes:
                    if shape.endswith(SHARDED) != (part == "sharded"):
                        continue
                    if self._holds(shape, count):
                        yield self._training(shape, count)

    def _holds(self, name: str, count: int) -> bool:
        """Whether so many cards have room for the base, of which each holds a shard or all."""
        gib = sum(gib for beginning, gib in LARGE.items() if name.startswith(beginning))
        return gib <= (count if name.endswith(SHARDED) else 1) * ROOM * self.card_gib

    def _half_step(self) -> int:
        """Tokens of a forward that make two or more of a step."""
        return 512 if self.options.model_path is None else 4096

    def is_measured(
        self, benchmark: str, settings: Mapping[str, Any], processes: int, key: str | None = None
    ) -> bool:
        """Whether a record has an entry of this card with the same options, and this key if any."""
        same = [
            entry
            for name, entry in self.entries[benchmark].items()
            if entry["device"]["name"] == self.card
            and entry["options"] == settings
            and entry.get("processes", 1) == processes
            and key in (None, name.partition(" on ")[0])
        ]
        return bool(same) and not self.options.again

    def _training(self, shape: str, count: int) -> Measurement | None:
        if count == 1:
            shape = shape.removesuffix(SHARDED)
        arguments = [*SHAPES[shape].split(), "methods=[matryoshka]", "baselines=[]"]
        arguments += [] if "steps=" in SHAPES[shape] else [f"steps={self.options.steps}"]
        arguments += [f"output={self.output}"]
        settings = settings_of(parse_options(benchmark_training.Options, arguments))
        if self.is_measured("training", settings, count):
            return None
        name = f"{shape} on {count}"
        script = SCRIPTS / "benchmark_training.py"
        return Measurement(
            name, count, lambda ids: self.start(name, ids, [script, *arguments], count)
        )

    def _sweep(self, sweep: str, count: int) -> Measurement | None:
        after, arguments = None, SWEEPS[sweep].split()
        if sweep == RUN:
            after = ALONE
            tasks = "gsm8k:0" if self.options.model_path else "arithmetic_word_problems:0"
            arguments = [f"tasks=[{tasks}]"]
            if self.options.data_path is not None:
                arguments += [f"data_path={self.options.data_path}"]
        arguments += ["baseline=false", f"output={self.output}"]
        settings = settings_of(parse_options(benchmark_sweep.Options, arguments))
        # The options of a sweep of the run do not say which run it was.
        of_other_run = sweep == RUN and self._losses(ALONE, 1) is not None
        if not of_other_run and self.is_measured("sweep", settings, count):
            return None
        name = f"sweep of {sweep} on {count}"

        def run(ids: Sequence[str]) -> None:
            of_run = [f"run={self.only_run(after).path}"] if after is not None else []
            script = SCRIPTS / "benchmark_sweep.py"
            self.start(name, ids, [script, *arguments, *of_run], count)

        return Measurement(name, count, run, after)

    def _losses(self, key: str, count: int, more: Sequence[str] = ()) -> Measurement | None:
        overrides = [*self._overrides(self.options.loss_steps), "eval.limit=1", *more]
        settings = {"overrides": overrides, "smollm2": self.options.model_path is not None}
        # A sweep of the run needs its folder, too.
        there = key != ALONE or (self.work / key).exists()
        if there and self.is_measured("scaling", settings, count, key):
            return None

        def run(ids: Sequence[str]) -> None:
            command = [TRAIN, *overrides, *self._places(key)]
            seconds = self.start(key, ids, command, count, sharded=SHARDED in key)
            folder = self.only_run(key)
            training = read_record(folder.record).training or {}
            lines = folder.train_log.read_text().splitlines()
            entry = {
                "options": settings,
                "processes": count,
                "losses": [json.loads(line)["loss"] for line in lines],
                "same_on_all_processes": training.get("same_on_all_processes"),
                "training_seconds": training["seconds"],
                "seconds": seconds,
            }
            merge_entry(self.output, "scaling", key, entry)

        return Measurement(key, count, run)

    def _grid(self, count: int) -> Measurement | None:
        seeds = ",".join(map(str, range(1, self.options.grid_runs + 1)))
        overrides = [*self._overrides(self.options.grid_steps), f"seed={seeds}"]
        if self.options.model_path is None:
            overrides += ["eval.limit=50"]
        settings = {"overrides": overrides, "smollm2": self.options.model_path is not None}
        key = f"grid-x{count}"
        if self.is_measured("scaling", settings, count, key):
            return None

        def run(ids: Sequence[str]) -> None:
            queue = ["-m", "hydra/launcher=gpu_queue"]
            queue += [] if self.on_gpus else [f"hydra.launcher.gpus={count}"]
            command = [TRAIN, *queue, *overrides, *self._places(key)]
            seconds = self.start(key, ids, command, 1, limit=math.inf)
            records = [read_record(path) for path in find_records(self.work / key / "runs")]
            finished = sum(record.status == "finished" for record in records)
            if finished != self.options.grid_runs:
                raise RuntimeError(f"{finished} of {self.options.grid_runs} runs are finished")
            entry = {
                "options": settings,
                "processes": count,
                "runs": finished,
                "seconds": seconds,
                "run_seconds": [
                    (record.training or {})["seconds"] + (record.evaluation or {})["seconds"]
                    for record in records
                ],
            }
            merge_entry(self.output, "scaling", key, entry)

        return Measurement(key, count, run, is_long=True)

    def _overrides(self, steps: int) -> list[str]:
        """Of train.py, for a run of so many steps, without folders."""
        overrides = ["method=matryoshka", f"trainer.max_steps={steps}"]
        if self.options.model_path is None:
            return overrides
        return ["model=smollm2_135m", *overrides, "eval.tasks=[gsm8k:0]"]

    def _places(self, key: str) -> list[str]:
        """The folders of a run, whose own is emptied: what is finished would not be run."""
        shutil.rmtree(self.work / key, ignore_errors=True)
        places = [f"output_dir={self.work / key}"]
        if self.options.model_path is not None:
            places += [f"model.path={self.options.model_path}"]
            if self.options.data_path is not None:
                places += [f"dataset.path={self.options.data_path}/gsm8k"]
                places += [f"eval.data_path={self.options.data_path}"]
        return places

    def only_run(self, key: str) -> RunFolder:
        """The one run of a work folder. Raises UserError if it is not there."""
        found = find_records(self.work / key / "runs")
        if len(found) != 1:
            raise UserError(f"{self.work / key} holds {len(found)} runs, not one; measure it again")
        return RunFolder(found[0].parent)

    def start(
        self,
        name: str,
        ids: Sequence[str],
        command: Sequence[Any],
        processes: int,
        *,
        sharded: bool = False,
        limit: float | None = None,
    ) -> float:
        """Run a Python command on these cards; the seconds until its end.

        sharded: launched by the file for that; scripts of this folder have an option instead.
        limit: seconds, in place of those of the options.
        Raises RuntimeError with the last line of its output if it fails or takes too long.
        """
        launch: list[Any] = []
        if sharded:
            launch = ["-m", "accelerate.commands.launch", "--config_file", SHARDED_LAUNCH]
            launch += ["--num_processes", processes]
        elif processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc_per_node={processes}"]
        log = self.work / "logs" / f"{file_name(name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        cores = os.cpu_count() or 1
        own = {
            "CUDA_VISIBLE_DEVICES": ",".join(ids),
            "OMP_NUM_THREADS": str(max(1, cores // max(8, len(ids)))),
        }
        began = time.monotonic()
        seconds = min(self.options.limit if limit is None else limit, self.end - began)
        if seconds <= 0:
            raise RuntimeError("not begun: no time was left")
        with log.open("wb") as output:
            process = psutil.Popen(
                [sys.executable, *map(str, [*launch, *command])],
                env=environment_of_children() | own,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(None if seconds == math.inf else seconds)
            except psutil.TimeoutExpired:
                # Launchers put their processes into sessions of their own. A killed process still
                # holds its card for a moment, which the next measurement may be waiting for.
                family = [process, *process.children(recursive=True)]
                for each in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                psutil.wait_procs(family, timeout=ENDING_SECONDS)
                code = None
        if code != 0:
            what = f"ended after {seconds:.0f} s" if code is None else f"exit code {code}"
            raise RuntimeError(f"{what}: {last_error(log.read_text(errors='replace'))} (see {log})")
        return time.monotonic() - began


def run_all(measurements: Sequence[Measurement], cards: Sequence[str]) -> list[str]:
    """Run each on cards of its own, side by side where there are enough; what failed.

    First go those that others wait for, then the long ones, then the widest; those that need all
    cards go last, so that few cards wait for long.
    """
    awaited = {each.after for each in measurements}
    waiting = sorted(
        measurements,
        key=lambda each: (
            each.name not in awaited,
            each.cards == len(cards),
            not each.is_long,
            -each.cards,
        ),
    )
    free, failed = list(cards), []
    running: dict[Future[object], tuple[Measurement, list[str], float]] = {}
    with ThreadPoolExecutor(max(1, len(cards))) as pool:
        while waiting or running:
            unfinished = {each.name for each in waiting}
            unfinished |= {each.name for each, _, _ in running.values()}
            for each in list(waiting):
                if each.cards <= len(free) and each.after not in unfinished:
                    waiting.remove(each)
                    taken, free = free[: each.cards], free[each.cards :]
                    running[pool.submit(each.run, taken)] = each, taken, time.monotonic()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                each, taken, began = running.pop(future)
                free += taken
                error = future.exception()
                if error is not None:
                    failed.append(f"{each.name}: {error}")
                what = f"failed: {error}" if error is not None else "done"
                seconds = time.monotonic() - began
                logger.info("%s, cards %s: %.0f s, %s", each.name, ",".join(taken), seconds, what)
    return failed


def main(options: Options) -> int:
    """1 where a measurement failed, else 0.

    Raises UserError for cards that are not there, or nothing to measure.
    """
    ids = visible_gpus()
    if min(options.gpus, default=0) < 1 or (ids and max(options.gpus) > len(ids)):
        raise UserError(f"gpus={options.gpus} must be numbers from 1 to {len(ids) or 'any'}")
    for name in ("parts", "shapes", "sweeps"):
        if not getattr(options, name):
            raise UserError(f"{name}=[] must name at least one")
    bench = Bench(options, bool(ids))
    trains = "losses" in options.parts and 1 in options.gpus
    if "sweep" in options.parts and RUN in options.sweeps and not trains:
        bench.only_run(ALONE)
    plan = bench.plan()
    logger.info("%d measurements: %s", len(plan), ", ".join(each.name for each in plan) or "none")
    began = time.monotonic()
    failed = run_all(plan, ids or [str(number) for number in range(max(options.gpus))])
    logger.info("all in %.0f s", time.monotonic() - began)
    print(*failed, sep="\n", file=sys.stderr, end="\n" if failed else "")
    print(write_scaling(bench.output, all_entries(bench.output)))
    return 1 if failed else 0


def all_entries(folder: Path) -> dict[str, Any]:
    """Those of all records in a folder."""
    return {key: entry for name in BENCHMARKS for key, entry in read_entries(folder, name).items()}


def write_scaling(folder: Path, entries: Mapping[str, Any]) -> str:
    """`scaling.md` of the entries of all records, and its table."""

    def rows(key: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
        name, n = split_key(key)
        of_one = name.removesuffix("-split").removesuffix(SHARDED)
        keys = [f"{alone} on {entry['device']['name']}" for alone in (of_one, f"{of_one}-x1")]
        alone: dict[str, Any] = next((entries[each] for each in keys if each in entries), {})
        return [
            {"measured": name, "GPUs": str(entry.get("processes", n)), **cells}
            for cells in _cells(name, n, entry, alone)
        ]

    return write_table(folder, "scaling", entries, rows, NOTE)


def _cells(
    name: str, n: int, entry: Mapping[str, Any], alone: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    """The rest of each row of an entry. alone: the entry of one GPU; empty where there is none."""
    if "losses" in entry:
        yield _row(f"{entry['training_seconds']:.1f} s", notes=_losses_note(entry, alone))
    elif "runs" in entry:
        speed = alone["seconds"] / entry["seconds"] if alone else None
        what = f"{entry['seconds']:.0f} s for {entry['runs']} runs"
        yield _row(what, speed, n, GOALS["grid"])
    elif "systems" in entry:
        for system, x in entry["systems"].items():
            one = alone.get("systems", {}).get(system, {}).get("tokens_per_second")
            if (mine := x.get("tokens_per_second")) is None:
                yield _row("", notes=x["error"].partition(".")[0])
                continue
            gib = x.get("peak_gib")
            yield _row(
                f"{mine:,.0f} tokens/s", mine / one if one else None, n, GOALS.get(name), gib
            )
    else:
        mine, one = entry["answers_per_second"], alone.get("answers_per_second")
        what = f"{entry['seconds']:.1f} s, {mine:,.1f} answers/s"
        note = _sweep_note(entry, alone)
        yield _row(what, mine / one if one else None, n, GOALS["sweep"], entry["peak_gib"], note)


def _row(
    speed: str,
    times_one: float | None = None,
    n: int = 1,
    goal: float | None = None,
    gib: float | None = None,
    notes: str = "",
) -> dict[str, str]:
    return {
        "figure": speed,
        "x one": f"{times_one:.2f}" if times_one else "",
        "efficiency": f"{times_one / n:.3f}" if times_one else "",
        "goal": f"{goal}" if goal and n > 1 and times_one else "",
        "peak GiB a GPU": f"{gib:.1f}" if gib else "",
        "notes": notes,
    }


def _losses_note(entry: Mapping[str, Any], alone: Mapping[str, Any]) -> str:
    found = []
    if alone and len(alone["losses"]) == len(entry["losses"]) and alone is not entry:
        pairs = zip(entry["losses"], alone["losses"], strict=True)
        found.append(f"losses differ by {max(abs(a - b) / b for a, b in pairs):.1e} at most")
    if (same := entry["same_on_all_processes"]) is not None:
        found.append(f"adapter {'equal' if same else 'NOT EQUAL'} on all processes")
    return "; ".join(found)


def _sweep_note(entry: Mapping[str, Any], alone: Mapping[str, Any]) -> str:
    """How far the answers, or the values of the rows, are those of one GPU."""
    if not alone or alone is entry:
        return ""
    if "values" not in entry:
        same = entry.get("answers_sha") == alone.get("answers_sha")
        return "all answers equal" if same else "some answers differ"
    mine, others = entry["values"], alone.get("values", {})
    if mine.keys() != others.keys():
        return "other rows"
    apart = max(abs(value - others[key]) for key, value in mine.items() if value is not None)
    return f"{len(mine)} rows differ by {apart:.1e} at most" if apart else f"{len(mine)} rows equal"


if __name__ == "__main__":
    run_script(main, __doc__, Options)
