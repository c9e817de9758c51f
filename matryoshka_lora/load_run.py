"""A finished run as a model: the base it was trained on, with its adapter, ready for `at_rank`.

    loaded = load_run("results/runs/.../lr0.001-seed42-0123abcd")
    with at_rank(loaded.model, 4, "prefix"):
        loaded.model.generate(...)

This file alone decides that a folder holds a trained run, that the adapter is that run's and that
the base model is the one it was trained on.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.config import Config
from matryoshka_lora.core.adapter import (
    AdapterSpec,
    adapter_parameters,
    add_adapters,
    load_adapter,
)
from matryoshka_lora.methods import adapter_spec_of
from matryoshka_lora.models import DTYPES, load_model, load_tokenizer, model_identity
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.progress import is_trained
from matryoshka_lora.runs.record import Record, read_record

logger = logging.getLogger(__name__)

# The axis of the rank, by the role of a parameter: the last segment of its name.
RANK_AXIS = {"lora_A": 0, "lora_B": 1}


@dataclass(frozen=True)
class TrainedRun:
    """A folder whose training has ended, with the record and the config in it."""

    folder: RunFolder
    record: Record
    config: Config
    """The recorded one, except for `model.path` where the base model lies elsewhere."""

    @property
    def spec(self) -> AdapterSpec:
        """What reading the adapter at a sub-rank needs to know."""
        return adapter_spec_of(self.config)


@dataclass(frozen=True)
class LoadedRun:
    """A trained run in memory; `model` carries the run's adapter."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: AdapterSpec
    record: Record


def load_run(
    folder: str | Path, *, device: str | torch.device = "cpu", model_path: str | None = None
) -> LoadedRun:
    """Load a finished run: its base model on `device` with its adapter, and the tokenizer.

    model_path: the base model's folder, where it is not where the run found it.
    Raises ValueError if the folder holds no trained run, or the adapter or the base is not the
    run's own.
    """
    run = read_run(folder, model_path)
    check_base(run)
    model = build_model(run.config, torch.device(device))
    load_factors(run, model)
    return LoadedRun(model, load_tokenizer(run.config.model), run.spec, run.record)


def read_run(folder: str | Path, model_path: str | None = None) -> TrainedRun:
    """The record and config of a folder. Raises ValueError unless it holds a trained run.

    The adapter's header is checked against the record; its tensors are not read.
    """
    files = RunFolder(Path(folder))
    if not files.record.is_file():
        raise ValueError(f"run={folder} holds no {files.record.name}, so it is no folder of a run")
    record = read_record(files.record)
    if not is_trained(files, record):
        there = "there" if files.adapter.is_file() else "missing"
        raise ValueError(
            f"run={folder} has not finished training (status {record.status}, "
            f"{files.adapter.name} {there}); run its command again first"
        )
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), record.config))
    assert isinstance(config, Config)
    if model_path is not None:
        config.model.path = model_path
    run = TrainedRun(files, record, config)
    _check_header(run)
    return run


def adapter_metadata(config: Config, model: dict[str, Any], run_hash: str) -> dict[str, str]:
    """What the header of a run's adapter file says; model: the base model's identity."""
    spec = adapter_spec_of(config)
    return {
        "method": config.method.name,
        "rank": str(spec.rank),
        "train_ranks": json.dumps(config.train_ranks),
        "scaling": spec.scaling,
        "p_full": json.dumps(spec.p_full),
        "base_model": json.dumps(model),
        "run_hash": run_hash,
    }


def check_base(run: TrainedRun) -> None:
    """Raise ValueError if the base model of `run.config` is not the one the run was trained on.

    A model of the hub is read at the recorded revision. A local folder in place of a model of the
    hub cannot be compared with it; a warning says so.
    """
    recorded, model = run.record.model, run.config.model
    if recorded["revision"] is not None:
        if model.path is None:
            model.revision = recorded["revision"]  # what the hub's branch was at training
        else:
            logger.warning("taking %s for a copy of %s", model.path, recorded)
        return
    now = model_identity(model)
    for key in recorded:
        if recorded[key] != now.get(key):
            raise ValueError(
                f"the base model {model.path or model.name} is not the one that "
                f"run={run.folder.path} was trained on: {key} is {now.get(key)}, the record says "
                f"{recorded[key]}; give the right one with model_path=FOLDER (scripts/evaluate.py: "
                "model.path=FOLDER)"
            )


def build_model(config: Config, device: torch.device) -> PreTrainedModel:
    """The base model with fresh adapters on `device`; without weights on the meta device."""
    model = load_model(config.model, device)
    add_adapters(
        model,
        adapter_spec_of(config),
        config.adapter.targets,
        init=config.adapter.init,
        dtype=DTYPES[config.adapter.dtype],
        seed=config.seed,
    )
    return model


def load_factors(run: TrainedRun, model: PreTrainedModel) -> None:
    """Load the run's factors into its adapted model. Raises ValueError where they do not fit."""
    load_adapter(run.folder.adapter, model)
    _check_finite(run, {name: p.detach() for name, p in adapter_parameters(model).items()})


def read_factors(run: TrainedRun) -> dict[str, Tensor]:
    """The run's factors on the CPU: `<layer>.lora_A` (R, in) and `<layer>.lora_B` (out, R).

    Raises ValueError for other names, another R, NaN and infinity.
    """
    path = run.folder.adapter
    with safe_open(path, framework="pt") as file:
        factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layers = {name.rpartition(".")[0] for name in factors}
    expected = {f"{layer}.{role}" for layer in layers for role in RANK_AXIS}
    if not factors or factors.keys() != expected:
        odd = sorted(factors.keys() ^ expected)
        raise ValueError(
            f"{path} does not hold {' and '.join(RANK_AXIS)} of each of its layers: "
            f"{len(odd)} missing or unknown {odd[:3]}"
        )
    for name, factor in factors.items():
        rank = factor.shape[RANK_AXIS[name.rpartition(".")[2]]]
        if rank != run.spec.rank:
            raise ValueError(f"{path}: {name} has rank {rank}, the record says {run.spec.rank}")
    _check_finite(run, factors)
    return factors


def _check_header(run: TrainedRun) -> None:
    path = run.folder.adapter
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an adapter: {error}") from error
    expected = adapter_metadata(run.config, run.record.model, run.record.run_hash)
    for name in ("run_hash", "method", "rank", "train_ranks", "scaling", "p_full"):
        if metadata.get(name) != expected[name]:
            raise ValueError(
                f"{path} is not the adapter of its {run.folder.record.name}: {name} is "
                f"{metadata.get(name, 'not given')} in the adapter and {expected[name]} in the "
                "record; restore the two files of one run"
            )


def _check_finite(run: TrainedRun, factors: dict[str, Tensor]) -> None:
    for name, factor in factors.items():
        if not factor.isfinite().all():
            raise ValueError(
                f"{run.folder.adapter}: {name} holds NaN or infinity; train the run again with "
                "force=true and a lower trainer.lr"
            )
