"""The folder of a run: where it lies and the name of every file in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matryoshka_lora.config import Config

RECORD = "record.json"


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's files; none of them needs to exist."""

    path: Path

    @property
    def record(self) -> Path:
        """Everything known about the run, see `runs.record`; it alone says what is finished."""
        return self.path / RECORD

    @property
    def adapter(self) -> Path:
        """The factors in float32, written once training has ended."""
        return self.path / "adapter.safetensors"

    @property
    def config(self) -> Path:
        """The resolved config as YAML, for people: the record holds it too."""
        return self.path / "config.yaml"

    @property
    def train_log(self) -> Path:
        """A line for each optimizer step: loss, learning rate, gradient norms, drawn ranks.

        Where held-out records are read after the step, their loss and the seconds it took, too.
        """
        return self.path / "train.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of what a training needs to go on; removed once the adapter is written."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder with a file for each task: a line for each document, rank and rule."""
        return self.path / "samples"

    @property
    def lock(self) -> Path:
        """Held by the process that works on the run; beside the folder, which may be replaced."""
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def replaced(self) -> Path:
        """The folder of an older run, until the one that replaces it has begun to train."""
        return self.path.with_name(f".{self.path.name}.replaced")

    @property
    def table(self) -> Path:
        """The rank-accuracy table, without the suffix of its format."""
        return self.path / "table"

    @property
    def plot(self) -> Path:
        """The rank-accuracy plot, without the suffix of its format."""
        return self.path / "plot"


def runs_root(config: "Config") -> Path:
    """The folder that all runs of `output_dir` lie below."""
    return Path(config.output_dir) / "runs"


def run_path(config: "Config", hash8: str) -> Path:
    """`<output_dir>/runs/<dataset>/<model>/<method>-r<R>-<scaling>/lr<lr>-seed<seed>-<hash>`."""
    return _parent(config) / f"lr{config.trainer.rate:g}-seed{config.seed}-{hash8}"


def imported_path(config: "Config", hash8: str) -> Path:
    """As `run_path`, of an adapter that was trained elsewhere: `.../<hash>`."""
    return _parent(config) / hash8


def _parent(config: "Config") -> Path:
    from matryoshka_lora.config import short_name  # here, because reading records needs no torch

    adapter = config.adapter
    return (
        runs_root(config)
        / config.dataset.name
        / short_name(config.model.name)
        / f"{config.method.name}-r{adapter.rank}-{adapter.scaling}"
    )
