"""A table of rows, each at its own learning rate: configs/evidence/<table>.yaml as groups of runs.

A row is a training (method, its settings, scaling, init, R, epochs) and the rule that it is read
by. The search trains with every rate on the first seed, HELD_OUT of the records held out; a row
takes the rate, and the number of epochs, of the lowest mean held-out loss under its own rule over
the ranks that it is read at. While the best rate is at an end of those tried, one more is tried.
Every rate is tried at the most epochs of the row; at fewer epochs, which want a rate at least as
high, only the best of those and the next above it, and more upwards while the highest is best.
Then its seeds train on all records, and the first of them may be evaluated on more tasks.

A table whose file says `final: false` compares trainings, a row each: it ends with the search,
whose records are read by all rules of their row and are reported under the row's name.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import search
from grid import Group, Planner, Rates, Run, Table, hash_today, table_name
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from reproduce_options import CONFIGS, Options

from matryoshka_lora.cli import text_of
from matryoshka_lora.config import read_config
from matryoshka_lora.core.errors import UserError, nearest
from matryoshka_lora.runs.record import Record, find_records, read_record

FEWEST = 3
"""Seeds of a row that does not say."""


@dataclass
class Row:
    """rules: the first decides the rate, the final runs are read by all. rates: to begin with.

    seeds: how many of the table's; null: 3, or all if there are fewer. ranks: read at; null: the
    trained sub-ranks. also: tasks that the first seed is evaluated on besides, when all else is
    done. settings: Hydra's overrides, key -> value, that make the row.
    """

    name: str = MISSING
    rules: list[str] = MISSING
    rates: list[float] = MISSING
    seeds: int | None = None
    epochs: list[float] | None = None
    ranks: list[int] | None = None
    also: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evidence:
    """A file of configs/evidence. settings: overrides of every run. epochs: of rows without own.

    final: whether there are final runs; false: the search is the table.
    """

    model: str = MISSING
    seeds: list[int] = MISSING
    epochs: list[float] = field(default_factory=lambda: [3.0])
    final: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def evidence_file(options: Options) -> Path | None:
    """The file of the table that is asked for; None where it is a grid of configs/experiment."""
    folder = CONFIGS / "evidence"
    names = [f"{options.table}_{model}" for model in options.model or ()]
    for name in (*names, options.table):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    return None


def read_evidence(path: Path) -> Evidence:
    """Raises UserError naming the file for an unknown key, a wrong type or a repeated name."""
    try:
        node = OmegaConf.merge(OmegaConf.structured(Evidence), OmegaConf.load(path))
        found = OmegaConf.to_object(node)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    assert isinstance(found, Evidence)
    names = [row.name for row in found.rows]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two rows have the same name")
    for row in found.rows:
        row.seeds = min(FEWEST, len(found.seeds)) if row.seeds is None else row.seeds
    if short := [row.name for row in found.rows if not 1 <= (row.seeds or 0) <= len(found.seeds)]:
        raise UserError(f"{path}: {short[0]} must have 1 to {len(found.seeds)} seeds")
    return found


def evidence_table(path: Path, options: Options, planner: Planner) -> Table:
    """The rows of the file, those of `options.rows` or all. Raises UserError for unknown ones."""
    given = read_evidence(path)
    _refuse(path, given, options)
    names = [row.name for row in given.rows]
    for name in options.rows or ():
        if name not in names:
            raise UserError(
                f"rows={name} is unknown; {path} has {', '.join(names)}{nearest(name, names)}"
            )
    name = table_name(options, folder_name(path))
    seeds = options.seeds or given.seeds
    output = Path(options.overrides.get("output_dir", "results"))
    published = published_runs(path.parent, given.model, name, output)
    rates: dict[Any, list[float]] = {}
    makers = {
        row.name: _Maker(row, given, seeds[: row.seeds], planner, published)
        for row in given.rows
        if options.rows is None or row.name in options.rows
    }
    groups = {name: maker.group(rates) for name, maker in makers.items()}

    def holds(record: Record) -> bool:
        """Of any row of the file, in a final run at the rate that its row has chosen."""
        for row in given.rows:
            maker = makers.get(row.name) or _Maker(row, given, seeds, planner, {})
            group = groups.get(row.name)
            try:
                if maker.makes(record, group):
                    return True
            except (UserError, HydraException):  # a method that this version does not know, say
                continue
        return False

    return Table(name, list(groups.values()), holds, search_alone=not given.final)


def folder_name(path: Path) -> str:
    """Of the records of a file's table."""
    return path.stem.replace("_", "-")


def published_runs(folder: Path, model: str, name: str, output: Path) -> dict[str, Record]:
    """By run hash, the records of the table `name` and of all tables in `folder` of the model."""
    paths = [path for path in sorted(folder.glob("*.yaml")) if read_evidence(path).model == model]
    tables = dict.fromkeys([*map(folder_name, paths), name])
    return {
        hash_of(record): record
        for table in tables
        for part in (table, f"{table}-search")
        for record in map(read_record, find_records(output / "records" / part, "*.json"))
    }


def hash_of(record: Record) -> str:
    try:
        return hash_today(record)
    except UserError:  # of another version
        return record.run_hash


def _refuse(path: Path, given: Evidence, options: Options) -> None:
    if options.model not in (None, [given.model]):
        raise UserError(f"model={','.join(options.model or [])}: {path} is for {given.model}")
    for key in ("methods", "ranks", "scalings", "lrs"):
        if getattr(options, key) is not None:
            raise UserError(f"{key}= is of a grid; give rows=, or edit {path}")


class _Maker:
    """Makes the runs of a row."""

    def __init__(
        self,
        row: Row,
        given: Evidence,
        seeds: list[int],
        planner: Planner,
        published: Mapping[str, Record],
    ) -> None:
        self.row, self.seeds, self.planner, self.published = row, seeds, planner, published
        self.epochs = sorted(row.epochs or given.epochs, reverse=True)
        self.final_too = given.final
        chosen = {"model": given.model} | given.settings | row.settings
        self.fixed = planner.fixed({key: text_of(value) for key, value in chosen.items()})
        if not row.rules or not row.rates or not self.epochs:
            raise UserError(f"row {row.name} must have a rule, a rate and a number of epochs")

    @functools.cached_property
    def ranks(self) -> list[int]:
        return self.row.ranks or self.planner.composed(self.fixed).train_ranks

    @functools.cache  # noqa: B019  (lives as long as the plan)
    def candidate(self, epochs: float, lr: float, seed: int) -> Run:
        return self._run(
            {
                "trainer.lr": lr,
                "trainer.epochs": epochs,
                "seed": seed,
                "dataset.validation": search.HELD_OUT,
                "eval.tasks": [],
                "eval.rules": self.row.rules[:1] if self.final_too else self.row.rules,
                "eval.ranks": self.ranks,
            }
        )

    @functools.cache  # noqa: B019
    def final(self, epochs: float, lr: float | None, seed: int, also: bool = False) -> Run:
        point = {
            "trainer.lr": lr,
            "trainer.epochs": epochs,
            "seed": seed,
            "eval.rules": self.row.rules,
            "eval.ranks": self.ranks,
        }
        if also:
            tasks = self.planner.composed(self.fixed).eval.tasks
            point["eval.tasks"] = list(dict.fromkeys([*tasks, *self.row.also]))
        return self._run(point)

    def _run(self, point: dict[str, Any]) -> Run:
        run = self.planner.run(self.fixed, point)
        if run.inputs is not None:
            run.published = self.published.get(run.inputs.run_hash)
        return run

    def group(self, rates: dict[Any, list[float]]) -> Group:
        """rates: of the trainings so far, which rows of the same settings share."""
        trainings = []
        for epochs in self.epochs:
            key = (tuple(sorted(self.fixed.items())), epochs)
            trainings.append(Rates(rates.setdefault(key, []), functools.partial(self._at, epochs)))
        trainings[0].add(*self.row.rates)
        seeds = self.seeds if self.final_too else []
        more = seeds[: 1 if self.row.also else 0]
        return Group(
            self.row.name,
            self.seeds,
            trainings,
            lambda training, lr: [self.final(self.epochs[training], lr, s) for s in seeds],
            lambda training, lr: [self.final(self.epochs[training], lr, s, True) for s in more],
            rule=self.row.rules[0],
            ranks=self.ranks,
            extends=True,
        )

    def _at(self, epochs: float, lr: float) -> Run:
        return self.candidate(epochs, lr, self.seeds[0])

    def makes(self, record: Record, group: Group | None) -> bool:
        """Whether the record is one of the row, at its own rate, epochs and seed."""
        config = read_config(record.config, record.name)
        epochs, lr, seed = config.trainer.epochs, config.trainer.rate, config.seed
        if epochs not in self.epochs:
            return False
        if config.dataset.validation == search.HELD_OUT:
            run = self.candidate(epochs, lr, seed)
        elif self.final_too and (group is None or group.lr in (None, lr)):
            run = self.final(epochs, lr, seed)
        else:
            return False
        return run.may_be_of(record)
