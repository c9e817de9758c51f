"""The command line of reproduce.py."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from matryoshka_lora.cli import option, other_keys
from matryoshka_lora.config import Config
from matryoshka_lora.core.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Those with a grid in configs/experiment, and those with rows for one model in configs/evidence.
GRIDS = ("table2", "table3")
ROWS = sorted(path.stem for path in (CONFIGS / "evidence").glob("*.yaml"))
TABLES = (*GRIDS, *(name for name in ROWS if not name.startswith(GRIDS)))
STAGES = ("search", "final", "also")
MODELS = tuple(sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))
LAUNCHERS = ("local", "gpu_queue", "submitit_slurm")
# 5e-6 ... 1e-3 with one digit each; the paper's script leaves out 7e-4.
PAPER_LRS = [float(f"{digit}e-6") for digit in range(5, 10)]
PAPER_LRS += [float(f"{digit}e-{power}") for power in (5, 4) for digit in range(1, 10)] + [1e-3]
PAPER_LRS.remove(7e-4)
# Axis of a grid -> the option that replaces it, and the type of its values.
AXES: dict[str, tuple[str, type]] = {
    "method": ("methods", str),
    "adapter.rank": ("ranks", int),
    "adapter.scaling": ("scalings", str),
    "trainer.lr": ("lrs", float),
    "seed": ("seeds", int),
}
# Overrides that would undo the plan, and what to do instead.
REFUSED = {key: f"give {name}=" for key, (name, _) in AXES.items()} | {
    "experiment": "the table and the model choose it",
    "force": "move the run's folder away to train it again",
    "trainer.dry_run": "give dry=1",
    "eval.limit": "give limit=",
    "dataset.validation": "the search holds out 5 %, the final runs nothing",
}
OF_LAUNCHER = "hydra.launcher."


def is_override(key: str) -> bool:
    """Whether the key is one of Hydra's or of a config group, or a setting of the config."""
    settings = {field.name for field in dataclasses.fields(Config)}
    return "." in key or "/" in key or (CONFIGS / key).is_dir() or key in settings


@dataclass
class Options:
    """What to reproduce, and how."""

    table: str = option(MISSING, "whose grid to run", choices=TABLES, positional=True)
    model: list[str] | None = option(None, "null: those of the grid", choices=MODELS)
    methods: list[str] | None = option(None, "null: those of the grid, as below")
    ranks: list[int] | None = option(None, "R of the adapters")
    scalings: list[str] | None = option(None, "s_r: none, sqrt or rank")
    seeds: list[int] | None = option(None, "the first is that of the search")
    lrs: list[float] | None = option(
        None,
        "learning rates; several are searched; lrs=paper: the paper's 23",
        words={"paper": PAPER_LRS},
    )
    limit: int | None = option(None, "only the first n documents of each task")
    rows: list[str] | None = option(None, "of configs/evidence/<table>.yaml; null: all")
    only: str | None = option(None, "search, final or also; null: all", choices=STAGES)
    gpus: int | None = option(None, "GPUs, one job each; without any as many slots of the CPU")
    workers_per_gpu: int = option(1, "jobs that share a GPU")
    slots: int | None = option(None, "run on so many threads of the CPU, one job each")
    launcher: str | None = option(
        None, "null: gpu_queue for several gpus, else local", choices=LAUNCHERS
    )
    dry: bool = option(False, "only say what would run, what is finished and how long it takes")
    name: str | None = option(None, "of the table; null: <table>-<model>[-limit<limit>]")
    prune: bool = option(
        False, "remove records of other grids from results/records/<name>; else they stay"
    )
    others: dict[str, str] = other_keys(
        "a Hydra override of every run; hydra.launcher.*=: of the jobs on Slurm", is_override
    )

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be planned. `launcher` is resolved."""
        for key, text in self.others.items():
            if key in REFUSED:
                raise UserError(f"{key}={text} would undo the plan: {REFUSED[key]}")
        for key in ("limit", "gpus", "workers_per_gpu", "slots"):
            given = getattr(self, key)
            if given is not None and given < 1:
                raise UserError(f"{key}={given} must be a positive integer")
        for name, _ in AXES.values():
            if getattr(self, name) == []:
                raise UserError(f"{name}=[] must name at least one value")
        if self.name is not None and (Path(self.name).name != self.name or self.name[0] == "."):
            raise UserError(
                f"name={self.name} must be the name of a folder, without / or leading ."
            )
        several = self.gpus not in (None, 1) or self.slots is not None or self.workers_per_gpu > 1
        self.launcher = self.launcher or ("gpu_queue" if several else "local")
        if self.launcher != "submitit_slurm" and self.launcher_overrides:
            raise UserError(f"{next(iter(self.launcher_overrides))} needs launcher=submitit_slurm")
        missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
        if self.launcher == "submitit_slurm" and missing:
            raise UserError(
                f"launcher=submitit_slurm: no {' or '.join(missing)} here; start it on a login "
                "node of the cluster"
            )

    @property
    def axes(self) -> dict[str, list[Any]]:
        """By key of AXES, the values that replace a grid's own."""
        given = {key: getattr(self, name) for key, (name, _) in AXES.items()}
        return {key: values for key, values in given.items() if values is not None}

    @property
    def overrides(self) -> dict[str, str]:
        """Hydra's overrides, key -> text, of every run."""
        return {k: text for k, text in self.others.items() if not k.startswith(OF_LAUNCHER)}

    @property
    def launcher_overrides(self) -> dict[str, str]:
        """Those that say how Slurm is to run a job."""
        return {k: text for k, text in self.others.items() if k.startswith(OF_LAUNCHER)}
