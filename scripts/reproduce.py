"""Run the grid of a table, go on where it was stopped, and write the table and its figure.

    python scripts/reproduce.py table2 model=tiny
    python scripts/reproduce.py table2 model=llama3_1b gpus=8 dry=1
    python scripts/reproduce.py table3 model=llama3_8b launcher=submitit_slurm \\
        hydra.launcher.partition=gpu

The grids are the `hydra.sweeper.params` of configs/experiment/<table>_<model>.yaml, or of
<table>.yaml for a model without its own; <...>_dedicated.yaml adds LoRAs of smaller ranks.

Options, all key=value: model, methods, ranks, scalings, seeds, lrs (comma-separated; lrs=paper is
the paper's grid), limit (documents of each task), gpus (one job a GPU at a time), launcher (local,
gpu_queue or submitit_slurm), dry (1: only say what would run), name (of the table). Any other
key=value is a Hydra override of every run.

With several learning rates each (method, R, scaling) first trains with each of them on the first
seed, 5 % of the training records held out, and the lowest held-out loss wins: the mean over the
ranks that the method trains (LoRA: R alone) under the rule `trained`, or under `prefix` where the
table reads that and not `trained`. A training that diverges has lost. Then all seeds train on all
records.
"""

import copy
import dataclasses
import functools
import itertools
import json
import logging
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from hydra_plugins.gpu_queue.jobs import Job, Outcome, Slot, find_slots, run_jobs
from matryoshka_lora.cli import exit_with_one_line
from matryoshka_lora.config import Config, run_folder, run_hash, validate
from matryoshka_lora.core.errors import nearest
from matryoshka_lora.inputs import Inputs, prepare
from matryoshka_lora.reporting import write_report
from matryoshka_lora.runs.folder import RECORD, RunFolder
from matryoshka_lora.runs.progress import finished_record
from matryoshka_lora.runs.provenance import environment
from matryoshka_lora.runs.record import Record, find_records, read_record, write_record
from matryoshka_lora.training.plan import total_steps

ConfigStore.instance().store(name="schema", node=Config)
logger = logging.getLogger("reproduce")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
TABLES = ("table2", "table3")
LAUNCHERS = ("local", "gpu_queue", "submitit_slurm")
# 5e-6 ... 1e-3 with one digit each; the paper's script leaves out 7e-4.
PAPER_LRS = [float(f"{digit}e-6") for digit in range(5, 10)]
PAPER_LRS += [float(f"{digit}e-{power}") for power in (5, 4) for digit in range(1, 10)] + [1e-3]
PAPER_LRS.remove(7e-4)
HELD_OUT = 0.05
# Axis of a grid -> the option that replaces it, and how its values are read.
AXES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "method": ("methods", str),
    "adapter.rank": ("ranks", int),
    "adapter.scaling": ("scalings", str),
    "trainer.lr": ("lrs", float),
    "seed": ("seeds", int),
}
OPTIONS = ["model", *(option for option, _ in AXES.values())]
OPTIONS += ["limit", "gpus", "launcher", "dry", "name"]
# Overrides that would undo the plan, and what to do instead.
REFUSED = {key: f"give {option}=" for key, (option, _) in AXES.items()} | {
    "experiment": "the table and the model choose it",
    "force": "move the run's folder away to train it again",
    "trainer.dry_run": "give dry=1",
    "eval.limit": "give limit=",
    "dataset.validation": "the search holds out 5 %, the final runs nothing",
}
# A day, because Hydra's default of one hour ends most trainings; one GPU a job.
SLURM = {"hydra.launcher.timeout_min": "1440", "hydra.launcher.gpus_per_node": "1"}


@dataclass(frozen=True)
class Options:
    """The command line. `axes`: by key of AXES, the values that replace a grid's own."""

    table: str
    models: list[str] | None
    axes: dict[str, list[Any]]
    limit: int | None
    gpus: int | None
    launcher: str
    dry: bool
    name: str | None
    overrides: dict[str, str]
    launcher_overrides: dict[str, str]


@dataclass
class Run:
    """One planned training: its Hydra overrides (key -> text) and what they compose into.

    inputs: None where a dry plan could not read data or model from the hub.
    """

    settings: dict[str, str]
    config: Config
    inputs: Inputs | None
    _record: Record | None = None

    @property
    def name(self) -> str:
        assert self.inputs is not None
        return str(self.inputs.folder.relative_to(Path(self.config.output_dir) / "runs"))

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(f"{key}={text}" for key, text in self.settings.items())

    def finished(self) -> Record | None:
        """The record, if nothing of the run is missing. ValueError if it is corrupt."""
        if self._record is None and self.inputs is not None:
            self._record = finished_record(self.config, RunFolder(self.inputs.folder))
        return self._record

    def failure(self) -> str | None:
        """What the run's record says that it failed of."""
        if self.inputs is None or not (path := self.inputs.folder / RECORD).exists():
            return None
        return read_record(path).error

    def diverged(self) -> bool:
        """Whether training ended in a loss that is no number, which it would do again."""
        return (self.failure() or "").startswith("FloatingPointError")


@dataclass
class Group:
    """One (table, model, method, R, scaling): the candidates of its search, then its seeds."""

    table: str
    label: str
    seeds: list[int]
    search: list[Run]
    final_at: Callable[[float | None], list[Run]]
    """The seeds at a learning rate; None is one that is not chosen yet."""
    lr: float | None = None

    @property
    def final(self) -> list[Run]:
        return self.final_at(self.lr)

    def choose(self) -> None:
        """Take the candidate of the lowest held-out loss, if every candidate has ended."""
        losses = {run.config.trainer.lr: held_out_loss(run) for run in self.search}
        if self.lr is None and None not in losses.values():
            lr, loss = min(losses.items(), key=lambda item: item[1] or 0.0)
            self.lr = lr if math.isfinite(loss or 0.0) else None


def main(arguments: Sequence[str], script: Path = ROOT / "train.py") -> int:
    """Plan, run, report. Returns 1 where a run failed, else 0."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    options = parse(arguments)
    planner = Planner(options)
    groups = planner.groups()
    for group in groups:
        group.choose()
    output = Path(groups[0].final[0].config.output_dir)
    slots = [Slot("this machine", {})]
    if options.launcher == "gpu_queue":
        slots = find_slots(options.gpus)
    show_plan(groups, options, slots, output, planner.unreachable)
    if options.dry:
        return 0
    outcomes: list[Outcome] = []
    for stage in ("search", "final"):
        todo = [run for group in groups for run in getattr(group, stage) if is_pending(run)]
        logs = output / "logs" / options.table
        if todo and options.launcher == "submitit_slurm":
            jobs = slurm_jobs(todo, options)
            outcomes += run_jobs(jobs, [Slot("Slurm", {})] * len(jobs), script, logs)
        elif todo:
            show = options.launcher == "local"
            jobs = [Job(run.name, run.overrides) for run in todo]
            outcomes += run_jobs(jobs, slots, script, logs, show=show)
        for group in groups:
            group.choose()
    for table in dict.fromkeys(group.table for group in groups):
        of_table = [group for group in groups if group.table == table]
        searches = [run for group in of_table for run in group.search]
        if searches:
            publish(f"{table}-search", searches, output)
        publish(table, [run for group in of_table for run in group.final], output)
    return report_failures(groups, outcomes)


def parse(arguments: Sequence[str]) -> Options:
    """The command line as checked options. Raises ValueError for the first mistake."""
    table, *rest = arguments
    if table not in TABLES:
        raise ValueError(
            f"table {table!r} is unknown; allowed: {', '.join(TABLES)}{nearest(table, TABLES)}"
        )
    given: dict[str, str] = {}
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"{argument!r} is not key=value; options: {', '.join(OPTIONS)}")
        if key in REFUSED:
            raise ValueError(f"{argument} would undo the plan: {REFUSED[key]}")
        if key in given:
            raise ValueError(f"{key} is given twice: {given[key]} and {value}")
        if "." not in key and "/" not in key and key not in OPTIONS and not is_config_key(key):
            hint = nearest(key, OPTIONS)
            raise ValueError(f"option {key!r} is unknown; options: {', '.join(OPTIONS)}{hint}")
        given[key] = value
    own = {key: given.pop(key) for key in OPTIONS if key in given}
    axes: dict[str, list[Any]] = {}
    for key, (option, read) in AXES.items():
        if option == "lrs" and own.get(option) == "paper":
            axes[key] = PAPER_LRS
        elif option in own:
            axes[key] = values(option, own[option], read)
    launcher = own.get("launcher") or ("gpu_queue" if own.get("gpus", "1") != "1" else "local")
    if launcher not in LAUNCHERS:
        raise ValueError(
            f"launcher={launcher} is unknown; allowed: {', '.join(LAUNCHERS)}"
            f"{nearest(launcher, LAUNCHERS)}"
        )
    of_launcher = {key: given.pop(key) for key in list(given) if key.startswith("hydra.launcher.")}
    if of_launcher and launcher != "submitit_slurm":
        raise ValueError(f"{next(iter(of_launcher))} needs launcher=submitit_slurm")
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if launcher == "submitit_slurm" and missing:
        raise ValueError(
            f"launcher=submitit_slurm: no {' or '.join(missing)} here; start it on a login node "
            "of the cluster"
        )
    models = values("model", own["model"], str) if "model" in own else None
    known = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
    for model in models or ():
        if model not in known:
            raise ValueError(
                f"model={model} is unknown; allowed: {', '.join(known)}{nearest(model, known)}"
            )
    if own.get("dry", "0") not in ("0", "1", "true", "false"):
        raise ValueError(f"dry={own['dry']} must be 0 or 1")
    return Options(
        table=table,
        models=models,
        axes=axes,
        limit=count("limit", own.get("limit")),
        gpus=count("gpus", own.get("gpus")),
        launcher=launcher,
        dry=own.get("dry") in ("1", "true"),
        name=own.get("name"),
        overrides=given,
        launcher_overrides=of_launcher,
    )


def values(option: str, text: str, read: Callable[[str], Any]) -> list[Any]:
    """`42,666` as a list. Raises ValueError for an empty, repeated or unreadable value."""
    found = []
    for part in text.split(","):
        try:
            found.append(read(part.strip()))
        except ValueError:
            kind = {int: "an integer", float: "a number"}[read]  # type: ignore[index]
            raise ValueError(f"{option}={text}: {part!r} is not {kind}") from None
    if "" in found or len(set(found)) < len(found):
        raise ValueError(f"{option}={text} must name values, each once, separated by commas")
    return found


def count(option: str, text: str | None) -> int | None:
    """A positive integer, or None. Raises ValueError."""
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{option}={text} must be a positive integer")
    return int(text)


def is_config_key(key: str) -> bool:
    """Whether Hydra knows the key at the top of the config, as a group or a setting."""
    return (CONFIGS / key).is_dir() or key in {f.name for f in dataclasses.fields(Config)}


class Planner:
    """Composes the runs of a command line; keeps what many of them share."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.unreachable: str | None = None
        """Why, in a dry plan, data or model could not be read from the hub."""
        self._configs: dict[tuple[str, ...], Config] = {}
        self._inputs: dict[str, Inputs] = {}

    def groups(self) -> list[Group]:
        """Every group of every model. Raises ValueError if nothing is planned."""
        options = self.options
        models = options.models
        if models is None:
            models = values("model", str(self._grid(options.table)["model"]), str)
        if len(models) > 1:
            given = {*options.overrides, *(["name"] if options.name else [])}
            for key in ("name", "model.path", "model.name"):
                if key in given:
                    raise ValueError(f"{key}= is for one model; choose from {', '.join(models)}")
        planned = []
        for model in models:
            experiment = f"{options.table}_{model}"
            if not (CONFIGS / "experiment" / f"{experiment}.yaml").is_file():
                experiment = options.table
            planned += self._groups(model, experiment)
            if (CONFIGS / "experiment" / f"{experiment}_dedicated.yaml").is_file():
                planned += self._groups(model, f"{experiment}_dedicated")
        if not planned:
            raise ValueError("nothing is planned: no method is left of the grid")
        return planned

    def _groups(self, model: str, experiment: str) -> list[Group]:
        options, dedicated = self.options, experiment.endswith("_dedicated")
        grid = self._grid(experiment)
        axes = {
            key: values(key, str(grid[key]), read) for key, (_, read) in AXES.items() if key in grid
        }
        for key, replacing in options.axes.items():
            if dedicated and key == "method":
                axes[key] = [method for method in axes[key] if method in replacing]
            elif not dedicated or key != "adapter.rank":
                axes[key] = replacing
        table = options.name or f"{options.table}-{model}" + (
            f"-limit{options.limit}" if options.limit else ""
        )
        return [
            self._group(table, model, experiment, method, rank, scaling, axes, dedicated)
            for method, rank, scaling in itertools.product(
                axes["method"], axes["adapter.rank"], axes["adapter.scaling"]
            )
        ]

    def _group(
        self,
        table: str,
        model: str,
        experiment: str,
        method: str,
        rank: int,
        scaling: str,
        axes: Mapping[str, list[Any]],
        dedicated: bool,
    ) -> Group:
        fixed = {"experiment": experiment, "model": model, "method": method}
        fixed |= self.options.overrides
        if self.options.limit is not None:
            fixed["eval.limit"] = str(self.options.limit)
        point: dict[str, Any] = {"adapter.rank": rank, "adapter.scaling": scaling}
        if dedicated:  # whatever S and ranks the others have
            point |= {"adapter.train_ranks": None, "eval.ranks": [rank]}
        seeds, lrs = axes["seed"], axes.get("trainer.lr", [])
        if not lrs:
            lrs = [self._composed(fixed).trainer.lr]

        @functools.cache
        def final(lr: float | None) -> list[Run]:
            return [self._run(fixed, point | {"trainer.lr": lr, "seed": s}) for s in seeds]

        group = Group(table, f"{method} R={rank} {scaling}", seeds, [], final)
        if len(lrs) == 1:
            group.lr = lrs[0]
            return group
        first = self._run(fixed, point | {"trainer.lr": lrs[0], "seed": seeds[0]})
        reads = first.config.eval.rules
        search = point | {
            "dataset.validation": HELD_OUT,
            "eval.tasks": [],
            "eval.rules": ["prefix" if "trained" not in reads and "prefix" in reads else "trained"],
            "eval.ranks": [rank] if method == "lora" else first.config.train_ranks,
            "seed": seeds[0],
        }
        group.search = [self._run(fixed, search | {"trainer.lr": lr}) for lr in lrs]
        return group

    def _grid(self, experiment: str) -> Mapping[str, Any]:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            node = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
        return dict(node.hydra.sweeper.params)

    def _composed(self, fixed: Mapping[str, str]) -> Config:
        """What `train.py` would compose, not checked yet: the axes are still to be set."""
        overrides = tuple(f"{key}={text}" for key, text in fixed.items())
        if overrides not in self._configs:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                node = OmegaConf.merge(OmegaConf.structured(Config), compose("train", [*overrides]))
            config = OmegaConf.to_object(node)
            assert isinstance(config, Config)
            self._configs[overrides] = config
        return copy.deepcopy(self._configs[overrides])

    def _run(self, fixed: dict[str, str], point: dict[str, Any]) -> Run:
        config = self._composed(fixed)
        undecided = point["trainer.lr"] is None
        settings = {k: value for k, value in point.items() if not undecided or k != "trainer.lr"}
        for key, value in settings.items():
            section, _, name = key.rpartition(".")
            setattr(getattr(config, section) if section else config, name, value)
        validate(config)
        if undecided:
            config.trainer.lr = math.nan  # stands in the table's hole; never run
        texts = {key: text_of(value) for key, value in settings.items()}
        return Run(fixed | texts, config, self._read(config))

    def _read(self, config: Config) -> Inputs | None:
        """`inputs.prepare`, reading data and model once for all runs that share them."""
        if self.unreachable is not None:  # asking the hub again takes long and changes nothing
            return None
        shared = json.dumps([dataclasses.asdict(config.dataset), dataclasses.asdict(config.model)])
        if shared not in self._inputs:
            try:
                self._inputs[shared] = prepare(config)
            except ValueError as error:
                from_hub = (config.dataset.hub and config.dataset.path is None) or (
                    config.model.path is None and config.model.name != "tiny"
                )
                if not (self.options.dry and from_hub):
                    raise
                self.unreachable = str(error)
                return None
        inputs = self._inputs[shared]
        hash8 = run_hash(config, inputs.model, inputs.data["fingerprint"])
        return dataclasses.replace(inputs, run_hash=hash8, folder=run_folder(config, hash8))


def text_of(value: Any) -> str:
    """A value as Hydra reads it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)


def is_pending(run: Run) -> bool:
    """Whether the run is to be started: it is not finished, its learning rate is chosen."""
    if math.isnan(run.config.trainer.lr) or run.finished() is not None:
        return False
    return not (run.config.dataset.validation and run.diverged())


def held_out_loss(run: Run) -> float | None:
    """What the search compares; inf for a training that diverged, None for one not finished."""
    record = run.finished()
    if record is None:
        return math.inf if run.diverged() else None
    (rule,), ranks = run.config.eval.rules, run.config.eval_ranks
    found = {
        row.rank: row.value
        for row in record.rows
        if (row.task, row.metric, row.rule) == ("validation", "loss", rule)
    }
    if any(found.get(rank) is None for rank in ranks):
        assert run.inputs is not None
        raise ValueError(
            f"{run.inputs.folder / RECORD} is finished, but lacks the held-out loss under rule "
            f"{rule} at ranks {ranks}; move the folder away to run it again"
        )
    return statistics.fmean(found[rank] or 0.0 for rank in ranks)


def show_plan(
    groups: Sequence[Group],
    options: Options,
    slots: Sequence[Slot],
    output: Path,
    unreachable: str | None,
) -> None:
    """Print what will run, what of it is finished, and how long the rest is estimated to take."""
    for table in dict.fromkeys(group.table for group in groups):
        print(f"{table}:")
        for group in groups:
            if group.table != table:
                continue
            seeds = ", ".join(map(str, group.seeds))
            rate = "the best lr" if group.lr is None else f"lr {group.lr:g}"
            parts = [f"{rate}, seeds {seeds}: {_finished(group.final)}"]
            if group.search:
                lrs = ", ".join(f"{run.config.trainer.lr:g}" for run in group.search)
                on = f"on seed {group.seeds[0]}: {_finished(group.search)}"
                parts.insert(0, f"search lr {lrs} {on}")
            print(f"  {group.label:<28} {'; then '.join(parts)}")
    every = [run for group in groups for run in (*group.search, *group.final)]
    todo = [run for run in every if run.finished() is None]
    if options.launcher == "submitit_slurm":
        where = "Slurm"
    elif options.launcher == "local":
        where = "this machine, one after the other"
    else:
        where = ", ".join(slot.name for slot in slots)
    if unreachable is not None:
        print(f"what is finished is unknown, because {unreachable}")
    print(f"{len(every)} runs, {len(every) - len(todo)} finished, {len(todo)} to do on {where}")
    if todo:
        print(f"estimated time: {_duration(estimate(todo, output, len(slots)))}")
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
        if record.training and all(record.device.get(k) == here[k] for k in ("kind", "name")):
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
        trainer = run.config.trainer
        steps = total_steps(
            len(run.inputs.train), trainer.effective_batch, trainer.epochs, trainer.max_steps
        )
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


def publish(table: str, runs: Sequence[Run], output: Path) -> None:
    """Copy the finished records to records/<table>/, write the report on them and show the table.

    What else is in that folder is removed, with a warning; runs that are not finished are holes.
    """
    records = [record for run in runs if (record := run.finished()) is not None]
    holes = [dataclasses.asdict(run.config) for run in runs if run.finished() is None]
    if not records:
        logger.warning("%s: no run is finished, so the table is not written", table)
        return
    folder = output / "records" / table
    mine = {folder / f"{record.name.replace('/', '-')}.json": record for record in records}
    others = [path for path in find_records(folder, "*.json") if path not in mine]
    for path, record in mine.items():
        old = {row.key for row in read_record(path).rows} if path.exists() else set()
        if lost := old - {row.key for row in record.rows}:
            logger.warning("%s: %d rows of the old record are not in the new", path, len(lost))
        write_record(path, record)
    if others:
        logger.warning(
            "%s: removed %d records that are not of this grid (git brings committed ones back): %s",
            *(folder, len(others), ", ".join(path.name for path in others)),
        )
        for path in others:
            path.unlink()
    if holes:
        logger.warning("%s: %d of %d runs are missing", table, len(holes), len(runs))
    paths = write_report(table, records, output, holes)
    print(f"\n{next(p for p in paths if p.suffix == '.md').read_text()}")
    print("wrote", f"{folder}/ ({len(records)} records)", *map(str, paths), sep="\n  ", flush=True)


def report_failures(groups: Sequence[Group], outcomes: Sequence[Outcome]) -> int:
    """Name every run that should be finished and is not; 1 if there are any."""
    of_job = {outcome.job.name: outcome for outcome in outcomes}
    lines = []
    for group in groups:
        for run in group.search:
            if run.diverged():
                logger.warning("%s, %s: %s", group.table, run.name, run.failure())
        if group.lr is None:
            lines.append(f"{group.table}, {group.label}: no learning rate could be chosen")
        for run in (*group.search, *group.final):
            if is_pending(run):
                outcome = of_job.get(run.name)
                error = run.failure() or (outcome and outcome.error) or "not finished"
                log = f" (see {outcome.log})" if outcome else ""
                lines.append(f"{group.table}, {run.name}: {error}{log}")
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
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    for name in ("reproduce", "hydra_plugins"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    with exit_with_one_line():
        sys.exit(main(sys.argv[1:]))
