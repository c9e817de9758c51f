"""The runs of a table: the grid of configs/experiment, composed as `train.py` would compose it.

The grid is the `hydra.sweeper.params` of <table>_<model>.yaml, or of <table>.yaml for a model
without its own; <...>_dedicated.yaml adds baselines trained for smaller ranks.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import search
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from reproduce_options import AXES, CONFIGS, Options

from matryoshka_lora.cli import text_of
from matryoshka_lora.config import Config, read_config, run_hash, validate
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.inputs import Inputs, prepare
from matryoshka_lora.runs.folder import RunFolder, run_path
from matryoshka_lora.runs.progress import finished_record
from matryoshka_lora.runs.record import Record, read_record

ConfigStore.instance().store(name="schema", node=Config)


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
        """The record, if nothing of the run is missing. Raises UserError if it is corrupt."""
        if self._record is None and self.inputs is not None:
            self._record = finished_record(self.config, RunFolder(self.inputs.folder))
        return self._record

    def failure(self) -> str | None:
        """What the run's record says that it failed of."""
        if self.inputs is None or not (path := RunFolder(self.inputs.folder).record).exists():
            return None
        return read_record(path).error

    def diverged(self) -> bool:
        """Whether training ended in a loss that is no number, which it would do again."""
        return (self.failure() or "").startswith("FloatingPointError")

    def held_out_loss(self) -> float | None:
        """What the search compares; inf for a training that diverged, None for one not finished."""
        record = self.finished()
        if record is None:
            return math.inf if self.diverged() else None
        assert self.inputs is not None
        return search.held_out_loss(record, self.config, RunFolder(self.inputs.folder).record)

    def is_pending(self) -> bool:
        """Whether the run is to be started: it is not finished, its learning rate is chosen."""
        if math.isnan(self.config.trainer.lr) or self.finished() is not None:
            return False
        return not (self.config.dataset.validation and self.diverged())


@dataclass
class Group:
    """One (model, method, R, scaling): the candidates of its search, then its seeds."""

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
        if self.lr is None:
            losses = {run.config.trainer.lr: run.held_out_loss() for run in self.search}
            self.lr = search.best(losses)


@dataclass
class Table:
    """All groups of one model, and whether a record belongs to them."""

    name: str
    groups: list[Group]
    holds: Callable[[Record], bool]
    """Whether the grid, at the record's own values of the axes, gives just its run."""

    @property
    def search(self) -> list[Run]:
        return [run for group in self.groups for run in group.search]

    @property
    def final(self) -> list[Run]:
        return [run for group in self.groups for run in group.final]

    @property
    def runs(self) -> Iterator[Run]:
        """Each group's search and then its seeds, group by group."""
        return (run for group in self.groups for run in (*group.search, *group.final))


@dataclass(frozen=True)
class Part:
    """An experiment of configs/experiment for a model; `dedicated` holds baselines of smaller R."""

    model: str
    experiment: str
    dedicated: bool = False

    def point(self, rank: int, scaling: str) -> dict[str, Any]:
        """What the settings, by key, of a run of this R and scaling have of their own."""
        point: dict[str, Any] = {"adapter.rank": rank, "adapter.scaling": scaling}
        if self.dedicated:  # whatever S and ranks the others have
            point |= {"adapter.train_ranks": None, "eval.ranks": [rank]}
        return point


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
        parts = [Part(model, experiment)]
        if (CONFIGS / "experiment" / f"{experiment}_dedicated.yaml").is_file():
            parts.append(Part(model, f"{experiment}_dedicated", dedicated=True))
        name = options.name or f"{options.table}-{model}" + (
            f"-limit{options.limit}" if options.limit else ""
        )
        groups = [group for part in parts for group in self._groups(part)]
        return Table(name, groups, functools.partial(self._holds, parts))

    def _groups(self, part: Part) -> list[Group]:
        grid, options = self._grid(part.experiment), self.options
        axes = {key: values(key, grid[key], kind) for key, (_, kind) in AXES.items() if key in grid}
        for key, replacing in options.axes.items():
            if part.dedicated and key == "method":
                axes[key] = [method for method in axes[key] if method in replacing]
            elif not part.dedicated or key != "adapter.rank":
                axes[key] = replacing
        return [
            self._group(part, method, rank, scaling, axes["seed"], axes.get("trainer.lr", []))
            for method, rank, scaling in itertools.product(
                axes["method"], axes["adapter.rank"], axes["adapter.scaling"]
            )
        ]

    def _group(
        self,
        part: Part,
        method: str,
        rank: int,
        scaling: str,
        seeds: list[int],
        lrs: list[float],
    ) -> Group:
        fixed, point = self._fixed(part, method), part.point(rank, scaling)
        if not lrs:
            lrs = [self._composed(fixed).trainer.lr]

        @functools.cache
        def final(lr: float | None) -> list[Run]:
            return [self._run(fixed, point | {"trainer.lr": lr, "seed": s}) for s in seeds]

        group = Group(f"{method} R={rank} {scaling}", seeds, [], final)
        if len(lrs) == 1:
            group.lr = lrs[0]
            return group
        first = self._run(fixed, point | {"trainer.lr": lrs[0], "seed": seeds[0]})
        of_search = point | search.search_settings(first.config) | {"seed": seeds[0]}
        group.search = [self._run(fixed, of_search | {"trainer.lr": lr}) for lr in lrs]
        return group

    def _holds(self, parts: list[Part], record: Record) -> bool:
        try:
            config = read_config(record.config, record.name)
            hash8 = hash_today(record)
        except UserError:  # of another version
            return False
        for part in parts:
            point = part.point(config.adapter.rank, config.adapter.scaling)
            point |= {"trainer.lr": config.trainer.lr, "seed": config.seed}
            try:
                fixed = self._fixed(part, config.method.name)
                planned = self._run(fixed, point)
                if config.dataset.validation == search.HELD_OUT:
                    planned = self._run(fixed, point | search.search_settings(planned.config))
            except (UserError, HydraException):  # the grid cannot have such a method or rank
                continue
            if planned.inputs is not None and planned.inputs.run_hash == hash8:
                return True
        return False

    def _fixed(self, part: Part, method: str) -> dict[str, str]:
        """The overrides, key -> text, of all runs of a method."""
        fixed = {"experiment": part.experiment, "model": part.model, "method": method}
        fixed |= self.options.overrides
        if self.options.limit is not None:
            fixed["eval.limit"] = str(self.options.limit)
        return fixed

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
        return dataclasses.replace(inputs, run_hash=hash8, folder=run_path(config, hash8))


def values(key: str, given: Any, kind: type) -> list[Any]:
    """The values `1,2` of a grid's axis as a list."""
    return [kind(part.strip()) for part in str(given).split(",")]


def hash_today(record: Record) -> str:
    """The hash that this version gives the run of a record.

    Raises UserError for a config of another version.
    """
    config = read_config(record.config, record.name)
    return run_hash(config, record.model, record.data.get("fingerprint", ""))
