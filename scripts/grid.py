"""The runs of a table: the grid of configs/experiment, composed as `train.py` would compose it.

The grid is the `hydra.sweeper.params` of <table>_<model>.yaml, or of <table>.yaml for a model
without its own.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import search
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from reproduce_options import AXES, CONFIGS, Options

from matryoshka_lora.cli import text_of
from matryoshka_lora.config import (
    Config,
    known_rate,
    quote_texts,
    read_config,
    run_hash,
    typed_config,
    validate,
    wanted_points,
)
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import RULES
from matryoshka_lora.evaluation.own_tasks import fingerprints_of, load_own_and_harness_tasks
from matryoshka_lora.inputs import Inputs, prepare
from matryoshka_lora.runs.earlier import find_run, may_be
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.progress import finished_record, has_points
from matryoshka_lora.runs.record import Record, read_record

ConfigStore.instance().store(name="schema", node=Config)


@dataclass
class Run:
    """One planned training: its Hydra overrides (key -> text) and what they compose into.

    inputs: None where a dry plan could not read data or model from the hub. published: the record
    of the run that stands behind a table already, whatever became of its folder.
    """

    settings: dict[str, str]
    config: Config
    inputs: Inputs | None
    published: Record | None = None
    _record: Record | None = None

    @property
    def name(self) -> str:
        assert self.inputs is not None
        return str(self.inputs.folder.relative_to(Path(self.config.output_dir) / "runs"))

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(f"{key}={text}" for key, text in self.settings.items())

    def may_be_of(self, record: Record) -> bool:
        """Whether nothing that the record holds speaks against its being of this run."""
        inputs = self.inputs
        return inputs is not None and may_be(
            record, self.config, inputs.model, inputs.data["fingerprint"]
        )

    def finished(self) -> Record | None:
        """The record, if nothing of the run is missing. Raises UserError if it is corrupt."""
        if self._record is None and self.inputs is not None and not self.config.force:
            folder = RunFolder(self.inputs.folder)
            if folder.record.exists() or self.published is not None:
                fingerprints = self.inputs.fingerprints | _task_fingerprints(self.config)
                wanted = wanted_points(self.config, fingerprints)
                self._record = finished_record(folder, wanted)
                old = self.published
                if self._record is None and old is not None and old.status == "finished":
                    self._record = old if has_points(old, wanted) else None
        return self._record

    def ended(self) -> Record | None:
        """The record of a run that is finished, or has failed in a way that it would again."""
        return self.finished() or (self._latest() if self.diverged() else None)

    def failure(self) -> str | None:
        """What the run's record says that it failed of."""
        record = self._latest()
        return None if record is None else record.error

    def _latest(self) -> Record | None:
        if self.inputs is None or not (path := RunFolder(self.inputs.folder).record).exists():
            return self.published
        return read_record(path)

    def diverged(self) -> bool:
        """Whether training ended in a loss that is no number, which it would do again."""
        return (self.failure() or "").startswith("FloatingPointError")

    def held_out_loss(self, rule: str, ranks: Sequence[int]) -> float | None:
        """What the search compares; inf for a training that diverged, None for one not finished."""
        record = self.finished()
        if record is None:
            return math.inf if self.diverged() else None
        assert self.inputs is not None
        return search.held_out_loss(record, rule, ranks, RunFolder(self.inputs.folder).record)

    def is_pending(self) -> bool:
        """Whether the run is to be started: it is not finished, its learning rate is chosen."""
        if math.isnan(self.config.trainer.rate) or self.finished() is not None:
            return False
        return not (self.config.dataset.validation and self.diverged())


@dataclass
class Rates:
    """The learning rates of a training; rows that differ only in how they read share them."""

    tried: list[float]
    at: Callable[[float], Run]
    """The candidate of a row at a rate."""

    def add(self, *rates: float) -> bool:
        """Try these, too; whether any is new."""
        new = {*rates} - {*self.tried}
        self.tried[:] = sorted({*self.tried, *new})
        return bool(new)


@dataclass
class Group:
    """One row's trainings: the candidates of its search, then its seeds."""

    label: str
    seeds: list[int]
    trainings: list[Rates]
    """What is searched, over the rates of each, the longest first; without a search none."""
    final_at: Callable[[int, float | None], list[Run]]
    """The seeds of a training, by its index, at a learning rate; None is not chosen yet."""
    also_at: Callable[[int, float | None], list[Run]] = lambda training, lr: []
    """Of these seeds those that are to be evaluated on more tasks, with all their tasks."""
    rule: str = ""
    ranks: list[int] = field(default_factory=list)
    """What the held-out loss is read by, the mean over ranks."""
    lr: float | None = None
    training: int = 0
    """The index of what was chosen."""
    extends: bool = False
    """Whether the search goes on while the best rate is at an end of those tried."""

    @property
    def search(self) -> list[Run]:
        return [of.at(lr) for of in self.trainings for lr in of.tried]

    @property
    def final(self) -> list[Run]:
        return self.final_at(self.training, self.lr)

    @property
    def also(self) -> list[Run]:
        return self.also_at(self.training, self.lr)

    def _best(self, trainings: Iterable[int]) -> tuple[int, float] | None:
        """(training, rate) of the lowest held-out loss among all of these trainings."""
        return search.best(
            {
                (index, lr): self.trainings[index].at(lr).held_out_loss(self.rule, self.ranks)
                for index in trainings
                for lr in self.trainings[index].tried
            }
        )

    def extend(self) -> bool:
        """Add the rates that the candidates so far, once they have ended, ask for; whether any.

        To the longest training one beyond its best rate while that is at an end. Then every shorter
        one begins with that rate and the next above, and goes on upwards: it wants no lower rate.
        """
        if not self.extends or (best := self._best([0])) is None:
            return False
        longest = self.trainings[0]
        if (rate := search.beyond(longest.tried, best[1])) is not None and longest.add(rate):
            return True
        begins = [rate for rate in longest.tried if rate >= best[1]][:2]
        added = [shorter.add(*begins) for shorter in self.trainings[1:]]
        for index, shorter in enumerate(self.trainings[1:], start=1):
            if (own := self._best([index])) is not None:
                rate = search.beyond(shorter.tried, own[1])
                added.append(rate is not None and rate > own[1] and shorter.add(rate))
        return any(added)

    def choose(self) -> None:
        """Take the candidate of the lowest held-out loss, if every candidate has ended."""
        every = range(len(self.trainings))
        if self.trainings and (best := self._best(every)) is not None:
            self.training, self.lr = best


@dataclass
class Table:
    """All groups of one model, and whether a record belongs to them."""

    name: str
    groups: list[Group]
    holds: Callable[[Record], bool]
    """Whether the grid, at the record's own values of the axes, gives just its run."""
    search_alone: bool = False
    """Whether the table is its search, without final runs: each row a training of its own."""

    def settle(self) -> None:
        """Extend every search that has ended at an end of its rates, and choose what can be."""
        while any([group.extend() for group in self.groups]):
            pass
        for group in self.groups:
            group.choose()

    @property
    def search(self) -> list[Run]:
        return merged(run for group in self.groups for run in group.search)

    @property
    def search_name(self) -> str:
        """Of the folder and the report of the search."""
        return self.name if self.search_alone else f"{self.name}-search"

    @property
    def row_names(self) -> dict[str, str]:
        """By run hash, of a table that is its search; empty for others, whose rows share runs."""
        groups = self.groups if self.search_alone else []
        return {
            run.inputs.run_hash: group.label
            for group in groups
            for run in group.search
            if run.inputs is not None
        }

    @property
    def final(self) -> list[Run]:
        return merged(run for group in self.groups for run in group.final)

    @property
    def also(self) -> list[Run]:
        """Runs of `final` that are evaluated on more tasks, after all else."""
        return merged(run for group in self.groups for run in group.also)

    @property
    def runs(self) -> list[Run]:
        """Every search and all seeds."""
        return [*self.search, *self.final]


def merged(runs: Iterable[Run]) -> list[Run]:
    """Each training once, evaluated under all rules, at all ranks and on all tasks that are asked.

    Two processes must not work in one folder.
    """
    found: dict[str, Run] = {}
    for run in runs:
        key = json.dumps(
            run.settings
            | {"eval.rules": "", "eval.ranks": "", "eval.tasks": ""}
            | {"lr": run.config.trainer.rate}
        )
        if run.inputs is not None:
            key = run.inputs.run_hash
        if (other := found.setdefault(key, run)) is run:
            continue
        mine, theirs = run.config, other.config
        asked = [mine.eval.rules, theirs.eval.rules]
        rules = None  # all that the method allows
        if None not in asked:
            rules = [rule for rule in RULES if any(rule in (given or ()) for given in asked)]
        ranks = sorted({*mine.eval_ranks, *theirs.eval_ranks})
        tasks = list(dict.fromkeys([*theirs.eval.tasks, *mine.eval.tasks]))
        if (rules, ranks, tasks) != (theirs.eval.rules, theirs.eval_ranks, theirs.eval.tasks):
            evaluation = dataclasses.replace(theirs.eval, rules=rules, ranks=ranks, tasks=tasks)
            texts = {"eval.rules": text_of(rules), "eval.ranks": text_of(ranks)}
            if tasks != theirs.eval.tasks:
                texts["eval.tasks"] = text_of(tasks)
            found[key] = dataclasses.replace(
                other,
                settings=other.settings | texts,
                config=dataclasses.replace(theirs, eval=evaluation),
                _record=None,
            )
    return list(found.values())


class Planner:
    """Composes the runs that are asked for; keeps what many of them share."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.unreachable: str | None = None
        """Why, in a dry plan, data or model could not be read from the hub."""
        self._configs: dict[tuple[str, ...], Config] = {}
        self._inputs: dict[str, Inputs] = {}

    def tables(self) -> list[Table]:
        """A table for each model. Raises UserError if nothing is planned."""
        options = self.options
        models = options.model
        if models is None:
            models = values("model", self._grid(options.table)["model"], str)
        if len(models) > 1:
            given = {*options.overrides, *(["name"] if options.name else [])}
            for key in ("name", "model.path", "model.name"):
                if key in given:
                    raise UserError(f"{key}= is for one model; choose from {', '.join(models)}")
        tables = [self._table(model) for model in models]
        if not any(table.groups for table in tables):
            raise UserError("nothing is planned: no method is left of the grid")
        return [table for table in tables if table.groups]

    def _table(self, model: str) -> Table:
        options = self.options
        experiment = f"{options.table}_{model}"
        if not (CONFIGS / "experiment" / f"{experiment}.yaml").is_file():
            experiment = options.table
        grid = self._grid(experiment)
        axes = {key: values(key, grid[key], kind) for key, (_, kind) in AXES.items() if key in grid}
        axes |= options.axes
        groups = [
            self._group(
                {"experiment": experiment, "model": model, "method": method},
                {"adapter.rank": rank, "adapter.scaling": scaling},
                axes["seed"],
                axes.get("trainer.lr", []),
            )
            for method, rank, scaling in itertools.product(
                axes["method"], axes["adapter.rank"], axes["adapter.scaling"]
            )
        ]
        holds = functools.partial(self._holds, experiment, model)
        return Table(table_name(options, f"{options.table}-{model}"), groups, holds)

    def _group(
        self, chosen: dict[str, str], point: dict[str, Any], seeds: list[int], lrs: list[float]
    ) -> Group:
        fixed = self.fixed(chosen)
        if not lrs:
            config = self.composed(fixed)
            lrs = [known_rate(config) if config.trainer.lr is None else config.trainer.lr]

        @functools.cache
        def final(training: int, lr: float | None) -> list[Run]:
            return [self.run(fixed, point | {"trainer.lr": lr, "seed": s}) for s in seeds]

        label = f"{chosen['method']} R={point['adapter.rank']} {point['adapter.scaling']}"
        group = Group(label, seeds, [], final)
        if len(lrs) == 1:
            group.lr = lrs[0]
            return group
        first = self.run(fixed, point | {"trainer.lr": lrs[0], "seed": seeds[0]})
        of_search = point | search.search_settings(first.config) | {"seed": seeds[0]}
        candidates = {lr: self.run(fixed, of_search | {"trainer.lr": lr}) for lr in lrs}
        group.trainings = [Rates(lrs, candidates.__getitem__)]
        (group.rule,), group.ranks = of_search["eval.rules"], of_search["eval.ranks"]
        return group

    def _holds(self, experiment: str, model: str, record: Record) -> bool:
        try:
            config = read_config(record.config, record.name)
        except UserError:  # of another version
            return False
        method = config.method.name
        point = {"adapter.rank": config.adapter.rank, "adapter.scaling": config.adapter.scaling}
        point |= {"trainer.lr": config.trainer.lr, "seed": config.seed}
        try:
            fixed = self.fixed({"experiment": experiment, "model": model, "method": method})
            planned = self.run(fixed, point)
            if config.dataset.validation == search.HELD_OUT:
                planned = self.run(fixed, point | search.search_settings(planned.config))
        except (UserError, HydraException):  # the grid cannot have such a method or rank
            return False
        return planned.may_be_of(record)

    def fixed(self, chosen: Mapping[str, str]) -> dict[str, str]:
        """The overrides, key -> text, of all runs of a row: those chosen by it and those given."""
        fixed = dict(chosen) | self.options.overrides
        if self.options.limit is not None:
            fixed["eval.limit"] = str(self.options.limit)
        return fixed

    def _grid(self, experiment: str) -> Mapping[str, Any]:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            node = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
        return dict(node.hydra.sweeper.params)

    def composed(self, fixed: Mapping[str, str]) -> Config:
        """What `train.py` would compose, not checked yet: the axes are still to be set."""
        overrides = tuple(f"{key}={text}" for key, text in fixed.items())
        if overrides not in self._configs:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                node = compose("train", quote_texts(overrides))
            self._configs[overrides] = typed_config(node)
        return copy.deepcopy(self._configs[overrides])

    def run(self, fixed: dict[str, str], point: dict[str, Any]) -> Run:
        config = self.composed(fixed)
        undecided = point["trainer.lr"] is None
        settings = {k: value for k, value in point.items() if not undecided or k != "trainer.lr"}
        for key, value in settings.items():
            section, _, name = key.rpartition(".")
            setattr(getattr(config, section) if section else config, name, value)
        if undecided:
            config.trainer.lr = 1.0
        validate(config)
        if undecided:
            config.trainer.lr = math.nan  # stands in the table's hole; never run
        texts = {key: text_of(value) for key, value in settings.items()}
        return Run(fixed | texts, config, self._read(config))

    def _read(self, config: Config) -> Inputs | None:
        """`pipeline.prepare`, reading data and model once for all runs that share them."""
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
        place = find_run(config, inputs.model, inputs.data["fingerprint"])
        return dataclasses.replace(inputs, run_hash=hash8, place=place)


_FINGERPRINTS: dict[str, dict[str, str]] = {}


def _task_fingerprints(config: Config) -> dict[str, str]:
    """`fingerprints_of` the tasks of a config, loaded once for all runs that share them."""
    key = json.dumps([dataclasses.asdict(config.model), dataclasses.asdict(config.eval)])
    key += config.output_dir
    if key not in _FINGERPRINTS:
        _FINGERPRINTS[key] = fingerprints_of(load_own_and_harness_tasks(config))
    return _FINGERPRINTS[key]


def table_name(options: Options, default: str) -> str:
    return options.name or default + (f"-limit{options.limit}" if options.limit else "")


def values(key: str, given: Any, kind: type) -> list[Any]:
    """The values `1,2` of a grid's axis as a list."""
    return [kind(part.strip()) for part in str(given).split(",")]


def hash_today(record: Record) -> str:
    """The hash that this version gives the run of a record.

    Raises UserError for a config of another version.
    """
    config = read_config(record.config, record.name)
    return run_hash(config, record.model, record.data.get("fingerprint", ""))
