"""A finished run as a model: the base it was trained on, with its adapter, ready for `at_rank`.

    loaded = load_run("results/runs/.../lr0.001-seed42-0123abcd")
    with loaded.at_rank(4):  # by the rule that the record shows best at this rank
        loaded.model.generate(...)

This file alone decides that a folder holds a trained run, that the adapter is that run's and that
the base model is the one it was trained on.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.config import Config, adapter_spec_of, build_method, read_config
from matryoshka_lora.core.adapter import (
    adapter_layers,
    adapter_parameters,
    adapter_spec,
    add_adapters,
    at_rank,
)
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import BASE
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.core.storage import AdapterFile, check_layers, load_adapter, read_adapter
from matryoshka_lora.identity import model_identity
from matryoshka_lora.models import DTYPES, load_model, load_tokenizer, other_modalities
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.progress import is_trained
from matryoshka_lora.runs.record import Record, read_record

logger = logging.getLogger(__name__)


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
    _rules: dict[tuple[int, str | None], str] = field(default_factory=dict, init=False, repr=False)
    """What `at_rank` found by the record, which takes as long as several forwards."""

    @contextmanager
    def at_rank(self, rank: int, rule: str | None = None) -> Iterator[None]:
        """`core.adapter.at_rank` of the model, by the rule that the record shows best there.

        A given rule is taken, with a warning, once, where it is significantly worse.
        """
        key = rank, rule
        if rank != 0 and key not in self._rules:
            # Here, because pandas and matplotlib, half a second of imports, come with it.
            from matryoshka_lora.reporting.choosing import rule_for

            self._rules[key] = rule_for(self.record, self.spec, rank, rule)
        with at_rank(self.model, rank, self._rules.get(key) or rule or BASE):
            yield


def load_run(
    folder: str | Path, *, device: str | torch.device = "cpu", model_path: str | None = None
) -> LoadedRun:
    """Load a finished run: its base model on `device` with its adapter, and the tokenizer.

    model_path: the base model's folder, where it is not where the run found it.
    Raises UserError if the folder holds no trained run, this machine has no such device, or the
    adapter or the base is not the run's own.
    """
    where = device_of(str(device))
    run = read_run(folder, model_path)
    check_base(run)
    model = build_model(run.config, where)
    load_factors(run, model)
    return LoadedRun(model, load_tokenizer(run.config.model), adapter_spec(model), run.record)


def device_of(name: str) -> torch.device:
    """The device of that name. Raises UserError for one that this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type != "meta":
            return device
        reason = "it holds no weights"
    except (RuntimeError, AssertionError) as error:  # the second: a torch without CUDA
        reason = str(error).splitlines()[0]
    raise UserError(f"device={name} cannot be used ({reason}); allowed: cpu, cuda, cuda:0, ...")


def read_run(folder: str | Path, model_path: str | None = None) -> TrainedRun:
    """The record and config of a folder. Raises UserError unless it holds a trained run.

    model_path: as for `load_run`. The adapter is not read yet.
    """
    files = RunFolder(Path(folder))
    if not files.record.is_file():
        raise UserError(f"run={folder} holds no {files.record.name}, so it is no folder of a run")
    record = read_record(files.record)
    if not is_trained(files, record):
        if record.training is not None:
            raise UserError(
                f"run={folder} was trained, but its {files.adapter.name} is missing; restore it, "
                "or train again by the run's command with force=true"
            )
        raise UserError(
            f"run={folder} has not finished training (status {record.status}); run its command "
            "again first"
        )
    config = read_config(record.config, str(files.record))
    if model_path is not None:
        config.model.path = model_path
    try:
        adapter_spec_of(config)
    except UserError as error:
        raise UserError(f"{files.record}: its config makes no adapter: {error}") from None
    return TrainedRun(files, record, config)


def adapter_facts(model: dict[str, Any], run_hash: str) -> dict[str, Any]:
    """What the adapter file of a run says beside its spec; model: the base model's identity."""
    return {"base_model": model, "run_hash": run_hash}


def check_base(run: TrainedRun) -> None:
    """Raise UserError if the base model of `run.config` is not the one the run was trained on.

    A model of the hub is read at the recorded revision. Otherwise all that both the record and the
    model hold is compared; where that leaves out the weights, a warning says so.
    """
    recorded, model = run.record.model, run.config.model
    if recorded["revision"] is not None and model.path is None:
        model.revision = recorded["revision"]  # what the hub's branch was at training
        return
    now = model_identity(model)
    if None in (recorded.get("weights"), now["weights"]) and not recorded["random_weights"]:
        logger.warning(
            "taking %s for the base that %s was trained on: its record holds no digest of all "
            "weights",
            *(model.path or model.name, run.folder.path),
        )
    for key in recorded:
        if None not in (recorded[key], now.get(key)) and recorded[key] != now[key]:
            raise UserError(
                f"the base model {model.path or model.name} is not the one that "
                f"run={run.folder.path} was trained on: {key} is {now.get(key)}, the record says "
                f"{recorded[key]}; give the right one with model_path=FOLDER (scripts/evaluate.py: "
                "model.path=FOLDER)"
            )


def build_model(
    config: Config, device: torch.device, mesh: DeviceMesh | None = None
) -> PreTrainedModel:
    """The base model with fresh adapters on `device`; without weights on the meta device.

    mesh: see `load_model`; the adapters are whole on every process.
    """
    model = load_model(config.model, device, mesh)
    add_adapters(
        model,
        adapter_spec_of(config),
        config.adapter.targets,
        init=config.adapter.init,
        dtype=DTYPES[config.adapter.dtype],
        seed=config.seed,
        without=other_modalities(model),
    )
    if device.type != "meta":
        build_method(config).hooks.initialise(adapter_parameters(model), config.seed)
    return model


def warn_of_narrow_layers(model: PreTrainedModel) -> None:
    """Name the adapted layers that are narrower than R, whose updates cannot have rank R."""
    rank = adapter_spec(model).rank
    narrow = {
        name.rpartition(".")[2]: min(layer.in_features, layer.out_features)
        for name, layer in adapter_layers(model).items()
        if min(layer.in_features, layer.out_features) < rank
    }
    if narrow:
        logger.warning(
            "adapter.rank=%d is more than some layers are wide, whose updates have that rank at "
            "most: %s",
            *(rank, ", ".join(f"{name} {width}" for name, width in narrow.items())),
        )


def load_factors(run: TrainedRun, model: PreTrainedModel) -> None:
    """Load the run's adapter into its adapted model.

    Raises UserError where the file is damaged, does not fit the model or is another run's.
    """
    facts = load_adapter(run.folder.adapter, model)
    _check_own(run, adapter_spec(model), facts)


def read_factors(run: TrainedRun) -> AdapterFile:
    """The run's adapter without weights of a model.

    Raises UserError for a damaged file, another run's, and layers that the model does not have.
    """
    file = read_own(run)
    check_layers(run.folder.adapter, file, build_model(run.config, torch.device("meta")))
    return file


def read_own(run: TrainedRun) -> AdapterFile:
    """The run's adapter, whether or not its base model is at hand.

    Raises UserError for a damaged file and another run's.
    """
    file = read_adapter(run.folder.adapter, run.spec)
    _check_own(run, file.spec, file.facts)
    return file


def _check_own(run: TrainedRun, found: AdapterSpec, facts: dict[str, Any]) -> None:
    """Raise UserError unless a file with this header is the adapter of the run's record."""
    for name in ("method", "rank", "train_ranks", "scaling"):
        _check_same(run, name, getattr(found, name), getattr(run.spec, name))
    _check_same(run, "run_hash", facts.get("run_hash"), run.record.run_hash)


def _check_same(run: TrainedRun, name: str, found: Any, recorded: Any) -> None:
    if found != recorded:
        raise UserError(
            f"{run.folder.adapter} is not the adapter of its {run.folder.record.name}: {name} is "
            f"{found} in the adapter and {recorded} in the record; restore the two files of one run"
        )
