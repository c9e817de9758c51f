"""Checkpoints of a training: factors, optimizer state, step; the last two are kept."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `step-<step>.pt` atomically, then remove all but the last two.

    A full disk leaves the earlier checkpoints as they were and is raised as OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"checkpoint {path} could not be written ({error}); the last good one is kept: free "
            "some space and run the same command again"
        ) from error
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None. One that cannot is named and passed over."""
    for path in reversed(_checkpoints(folder)):
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch.load raises many kinds on a damaged file
            logger.warning("checkpoint %s cannot be read (%s); trying the one before", path, error)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))
