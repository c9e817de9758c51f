"""An adapter as a file: safetensors, with all that reading it needs in the header."""

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from matryoshka_lora.core.adapter import (
    Factors,
    _state,
    adapter_importance,
    adapter_parameters,
    adapter_spec,
    set_diagonal,
    set_importance,
    view_of,
)
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import parse_json, write_atomically
from matryoshka_lora.core.layer import by_layer
from matryoshka_lora.core.rules import AdapterView, read
from matryoshka_lora.core.spec import AdapterSpec

IMPORTANCE = "importance"
"""Stands where parameters have their role, in the names of tensors that are none."""
HEADER = "matryoshka_lora"
"""The one entry of the file's metadata; safetensors writes several in no fixed order."""


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an adapter's file holds: `state` maps `<layer>.<role>` to float32 tensors."""

    spec: AdapterSpec
    state: dict[str, Tensor]
    facts: dict[str, Any]
    """What the writer added, such as the identity of the base model."""
    importance: dict[str, Tensor]
    """Layer -> (R,), float32, what the method says of its components; empty if it says nothing."""

    @property
    def layers(self) -> dict[str, Factors]:
        """Layer -> its factors as training left them, by role."""
        return by_layer(self.state)

    @cached_property
    def view(self) -> AdapterView:
        """What rules see of the adapter."""
        return view_of(self.spec, lambda: self.layers, self.importance)

    def parameters(self, rank: int, rule: str) -> int:
        """How many an export of this reading has: in + out for each component of a layer.

        Raises UserError as `core.rules.read` does.
        """
        p = read(self.view, rank, rule).p
        components = {
            name: rank if isinstance(p, Tensor) else int(p[name].count_nonzero())
            for name in self.layers
        }
        return sum(
            components[name] * (factors["lora_A"].shape[1] + factors["lora_B"].shape[0])
            for name, factors in self.layers.items()
        )


def save_adapter(path: Path, model: nn.Module, facts: Mapping[str, Any] | None = None) -> None:
    """Write factors and importance in float32 and the spec, atomically.

    The same adapter, the same bytes.

    facts: anything else that is to stand in the header, as JSON.
    """
    # float32 holds bf16 factors exactly, so nothing is lost for either dtype.
    state = {
        name: parameter.detach().float().cpu().contiguous()
        for name, parameter in adapter_parameters(model).items()
    } | {f"{layer}.{IMPORTANCE}": values for layer, values in adapter_importance(model).items()}
    header = {"spec": dataclasses.asdict(adapter_spec(model)), "facts": dict(facts or {})}
    write_atomically(path, save(state, {HEADER: json.dumps(header, sort_keys=True)}))


def read_adapter(path: Path, asked: AdapterSpec | None = None) -> AdapterFile:
    """Read an adapter's file without a model.

    asked: what the caller takes the adapter for. Files until commit 6b47c28 need it, as they do not
    say whether training used the prefixes themselves.
    Raises UserError if it is not one: not safetensors, a header that does not say what the adapter
    is, factors that are missing, of another rank, or not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as an adapter: {error}") from error
    try:
        spec, facts = _parse_header(metadata, asked)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no adapter of this project: its header does not say what it is ({error!r})"
        ) from None
    _check_state(path, state, spec)
    parameters, importance = {}, {}
    for name, tensor in state.items():
        layer, _, role = name.rpartition(".")
        if role == IMPORTANCE:
            importance[layer] = tensor
        else:
            parameters[name] = tensor
    return AdapterFile(spec, parameters, facts, importance)


def load_adapter(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load a file into an adapted model, strictly, with the diagonal that it was trained with.

    Returns the facts that the file carries. Raises UserError as `read_adapter` does, and if the
    method, R, S, scaling, the layers or their shapes are not those of the model's adapters.
    """
    asked = adapter_spec(model)
    file = read_adapter(path, asked)
    for name in ("rank", "scaling", "gated", "float32_diagonal", "method", "train_ranks"):
        wanted, found = getattr(asked, name), getattr(file.spec, name)
        if wanted != found and None not in (wanted, found) and () not in (wanted, found):
            raise UserError(
                f"{path} does not fit the model: its {name} is {found}, the model's adapters have "
                f"{wanted}"
            )
    check_layers(path, file, model)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(file.state[name])
    _state(model).spec = file.spec
    set_importance(model, file.importance)
    set_diagonal(model, torch.tensor(file.spec.p_full, dtype=torch.float32))
    return file.facts


def check_layers(path: Path, file: AdapterFile, model: nn.Module) -> None:
    """Raise UserError unless the layers of a file and their shapes are those of an adapted model.

    The model may be on the meta device.
    """
    parameters = adapter_parameters(model)
    if file.state.keys() != parameters.keys():
        lacking = sorted(parameters.keys() - file.state.keys())
        extra = sorted(file.state.keys() - parameters.keys())
        raise UserError(
            f"{path} does not fit the model: {len(lacking)} tensors missing {lacking[:3]}, "
            f"{len(extra)} unknown {extra[:3]}"
        )
    for name, parameter in parameters.items():
        if file.state[name].shape != parameter.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(file.state[name].shape)}, "
                f"the model needs {tuple(parameter.shape)}"
            )


def _parse_header(
    metadata: Mapping[str, str], asked: AdapterSpec | None
) -> tuple[AdapterSpec, dict[str, Any]]:
    if HEADER in metadata:
        header = parse_json(metadata[HEADER])
        spec = header["spec"]
        tuples = {name: tuple(spec[name]) for name in ("p_full", "train_ranks")}
        return AdapterSpec(**(spec | tuples)), dict(header["facts"])
    if asked is None:
        raise UserError("it is of an earlier version, which can be read with its run only")
    old = AdapterSpec(
        rank=int(metadata["rank"]),
        scaling=metadata["scaling"],
        p_full=tuple(json.loads(metadata["p_full"])),
        trains_prefixes=asked.trains_prefixes,
        method=metadata["method"],
        train_ranks=tuple(json.loads(metadata["train_ranks"])) if asked.train_ranks else (),
    )
    base = json.loads(metadata["base_model"])
    return old, {"run_hash": metadata["run_hash"], "base_model": base}


def _check_state(path: Path, state: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    roles = {"lora_A": 0, "lora_B": 1} | ({"lora_gate": 0} if spec.gated else {})
    if any(name.rpartition(".")[2] == IMPORTANCE for name in state):
        roles[IMPORTANCE] = 0
    layers = {name.rpartition(".")[0] for name in state}
    expected = {f"{layer}.{role}" for layer in layers for role in roles}
    if not layers or state.keys() != expected:
        raise UserError(f"{path} does not hold {', '.join(roles)} of each of its layers")
    for name, tensor in state.items():
        axis = roles[name.rpartition(".")[2]]
        if tensor.dim() <= axis or tensor.shape[axis] != spec.rank:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, which is not of rank {spec.rank}"
            )
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds numbers that are not finite")
