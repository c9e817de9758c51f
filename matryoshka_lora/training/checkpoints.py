"""Checkpoints: the state of a training by the names of its parameters; the last two are kept."""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import naming
from matryoshka_lora.methods import Hooks

logger = logging.getLogger(__name__)

KEPT = 2
# What AdamW keeps for each parameter: a scalar, and two tensors of the parameter's shape.
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
# Without a fixed number of steps between two checkpoints: the seconds, and the share of the time
# that saving may take, so that a large adapter on a slow disk is saved less often.
SAVE_SECONDS, SAVING_SHARE = 30.0, 0.02
UNREADABLE = ".unreadable"


@dataclass(frozen=True)
class TrainingState:
    """All that a training changes and a checkpoint holds. parameters: by name."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    hooks: Hooks

    def content(self, step: int, seconds: float) -> dict[str, Any]:
        """The content of a checkpoint. step: steps done; seconds: of training so far."""
        states = self.optimizer.state
        return {
            "step": step,
            "seconds": seconds,
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": {name: dict(states.get(p, {})) for name, p in self.parameters.items()},
            "hooks": self.hooks.state_dict(),
        }

    def restore(self, path: Path, content: Any) -> tuple[int, float]:
        """Put the content of a checkpoint in place; returns its step and seconds.

        Raises UserError naming file and parameter, before anything is changed, unless the names,
        shapes and dtypes are those of the parameters.
        """
        _check(path, content, self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(content["parameters"][name])
        # An optimizer's own state dict numbers the parameters in the order of its param_groups.
        groups = self.optimizer.param_groups
        ordered = [parameter for group in groups for parameter in group["params"]]
        numbers = {id(parameter): number for number, parameter in enumerate(ordered)}
        state = {
            numbers[id(parameter)]: content["optimizer"][name]
            for name, parameter in self.parameters.items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.hooks.load_state_dict(content["hooks"])
        return content["step"], content["seconds"]


class Checkpoints:
    """The checkpoints of one training, and when the next one is due."""

    def __init__(self, folder: Path, save_every: int | None, writes: bool) -> None:
        """save_every: steps between two checkpoints; None: by the clock.

        writes: whether this process writes them; all processes read them.
        """
        self.folder = folder
        self.save_every = save_every
        self.writes = writes
        self._saved = time.monotonic()
        self._saving = 0.0

    def resume(self, state: TrainingState) -> tuple[int, float]:
        """Restore the newest checkpoint that can be read; returns the steps done and seconds spent.

        (0, 0.0) if there is none. Raises UserError if it is not a checkpoint of this training.
        """
        found = newest_checkpoint(self.folder, set_aside=self.writes)
        self._saved = time.monotonic()
        return (0, 0.0) if found is None else state.restore(*found)

    def due(self, done: int) -> bool:
        """Whether to save now that `done` steps are done."""
        if self.save_every is not None:
            return done % self.save_every == 0
        wait = max(SAVE_SECONDS, self._saving / SAVING_SHARE)
        return time.monotonic() - self._saved > wait

    def save(self, state: TrainingState, done: int, seconds: float) -> None:
        """Save after `done` steps, which took `seconds`. Raises OSError."""
        self._saved = time.monotonic()
        if self.writes:
            save_checkpoint(self.folder, done, state.content(done, seconds))
        self._saving = time.monotonic() - self._saved


def _check(path: Path, state: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    remedy = "set force=true to train again"
    if isinstance(state, dict) and isinstance(state.get("parameters"), list):
        raise UserError(
            f"checkpoint {path} is of an earlier version, which did not store the names of "
            f"parameters; finish this training with that version, or {remedy}"
        )
    for part in ("step", "seconds", "parameters", "optimizer", "hooks"):
        if not isinstance(state, dict) or part not in state:
            raise UserError(f"checkpoint {path} lacks {part!r}; {remedy}")
    for part in ("parameters", "optimizer"):
        names = state[part].keys()
        if missing := [name for name in parameters if name not in names]:
            raise UserError(
                f"checkpoint {path} lacks {missing[0]} in {part!r} (and {len(missing) - 1} more "
                f"that the model has); {remedy}"
            )
        if unknown := [name for name in names if name not in parameters]:
            raise UserError(
                f"checkpoint {path} has {unknown[0]} in {part!r} (and {len(unknown) - 1} more), "
                f"which the model has not; {remedy}"
            )
    for name, parameter in parameters.items():
        entries = state["optimizer"][name]
        if missing := [key for key in OPTIMIZER_STATE if key not in entries]:
            raise UserError(
                f"checkpoint {path} lacks the optimizer's {missing[0]} of {name}; {remedy}"
            )
        moments = {f"{key} of {name}": entries[key] for key in OPTIMIZER_STATE if key != "step"}
        for what, tensor in {name: state["parameters"][name], **moments}.items():
            if _kind(tensor) != _kind(parameter):
                raise UserError(
                    f"checkpoint {path}: {what} is {_kind(tensor)}, the model needs "
                    f"{_kind(parameter)}; {remedy}"
                )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `step-<step>.pt` atomically, then remove all checkpoints but the last two.

    Those that `newest_checkpoint` set aside are removed, too: this one takes their place. Raises
    OSError, and leaves the earlier checkpoints as they are, if it cannot be written (a full disk).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    kept = "the last good one is kept: mend that and run the same command again"
    # torch reports a failed write as RuntimeError.
    with naming(path, kept, RuntimeError):
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    left = [*folder.glob(f"*{UNREADABLE}"), *folder.glob("*.tmp")]  # .tmp: of a killed process
    for old in [*_checkpoints(folder)[:-KEPT], *left]:
        old.unlink()


def newest_checkpoint(folder: Path, set_aside: bool) -> tuple[Path, Any] | None:
    """(file, content on the CPU) of the newest checkpoint that can be read, or None.

    A newer one that cannot be read is named in the log. set_aside: rename it too, so that it never
    counts as one of those that `save_checkpoint` keeps; for one process alone. Running out of
    memory says nothing about a file and is raised as it is.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds on a damaged file
            if _out_of_memory(error):
                raise
            logger.warning("checkpoint %s cannot be read (%s); trying the one before", path, error)
        if set_aside:
            path.rename(path.with_name(path.name + UNREADABLE))
    return None


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # What torch raises where the CPU's memory runs out has no type of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))
