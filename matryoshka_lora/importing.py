"""A PEFT LoRA that was trained elsewhere as a run's folder, which the other commands then read.

The update of each layer is `scale * B A`; the scale goes into B, so that one diagonal of ones holds
for all layers. Where layers differ in rank, zeros fill them up to the largest, R, and layers of the
same name that PEFT left out are zero everywhere.

What is not known of the training, such as its data and learning rate, is not in the record.
"""

import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from matryoshka_lora.config import (
    Config,
    EvalConfig,
    ModelConfig,
    recorded,
    run_hash,
    short_name,
    validate,
)
from matryoshka_lora.core.adapter import adapter_layers
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import parse_json, write_atomically
from matryoshka_lora.core.storage import save_adapter
from matryoshka_lora.identity import model_identity
from matryoshka_lora.loading import adapter_facts, build_model
from matryoshka_lora.methods.imported import imported
from matryoshka_lora.models import source_of
from matryoshka_lora.runs.folder import RunFolder, imported_path, runs_root
from matryoshka_lora.runs.lock import locked
from matryoshka_lora.runs.provenance import new_phase
from matryoshka_lora.runs.record import Record, write_record

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Of PEFT's config: what is read here, and what only says how training began or went.
READ = {
    *("peft_type", "base_model_name_or_path", "init_lora_weights"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
}
OF_TRAINING = {
    *("task_type", "auto_mapping", "revision", "inference_mode", "peft_version", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "megatron_core", "megatron_config", "qalora_group_size"),
    "ensure_weight_tying",
}
REASONS = {
    "use_dora": "DoRA scales the columns of base and update together, which is no low-rank update",
    "bias": "it changes biases of the base model, which no rank of the factors holds",
    "lora_bias": "it adds a bias to each layer, which no rank of the factors holds",
    "modules_to_save": "it holds whole modules that were trained beside the factors",
    "trainable_token_indices": "it holds trained embeddings beside the factors",
    "fan_in_fan_out": "its layers hold their weights as (in, out), as GPT-2's Conv1D does",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it adapts parameters that belong to no linear layer",
    "alora_invocation_tokens": "it is active behind certain tokens only",
}
# Starts of training that leave the base as it is.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftLora:
    """A PEFT folder's adapter: layer -> A (r, in) and B (out, r), float32, the scale in B."""

    layers: dict[str, tuple[Tensor, Tensor]]
    base: str | None
    """What it calls its base model."""
    content: dict[str, Any]
    """Its `adapter_config.json`."""
    sha256: dict[str, str]
    """Of its two files, by name."""

    @property
    def rank(self) -> int:
        """R, the largest rank of a layer."""
        return max(len(A) for A, _ in self.layers.values())


def read_peft(folder: Path) -> PeftLora:
    """Read the LoRA in a folder that PEFT wrote. Raises UserError for what is no plain one."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"adapter={folder} holds no {CONFIG}, so it is no folder of a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"adapter={folder} holds no {WEIGHTS}; others, such as adapter_model.bin, may run code "
            "when they are read: load it with PEFT and save it by save_pretrained"
        )
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    try:
        content = parse_json(files[CONFIG])
    except UserError as error:
        raise UserError(f"{folder / CONFIG} is {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / CONFIG} is no JSON object")
    _check_plain(folder / CONFIG, content)
    try:
        tensors = load(files[WEIGHTS])
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}") from None
    layers = {}
    for name, (A, B) in _factors(folder / WEIGHTS, tensors).items():
        rank = _of_layer(content.get("rank_pattern"), name, content.get("r", 8))
        alpha = _of_layer(content.get("alpha_pattern"), name, content.get("lora_alpha", 8))
        if A.dim() != 2 or B.dim() != 2 or (len(A), B.shape[1]) != (rank, rank):
            raise UserError(
                f"{folder / WEIGHTS}: the factors of {name} have shapes {tuple(A.shape)} and "
                f"{tuple(B.shape)}, which are not those of a linear layer at the rank {rank} of "
                f"{CONFIG}"
            )
        scale = alpha / (math.sqrt(rank) if content.get("use_rslora") else rank)
        A, B = A.float(), scale * B.float()
        if not (A.isfinite().all() and B.isfinite().all()):
            raise UserError(f"{folder / WEIGHTS}: {name} holds numbers that are not finite")
        layers[name] = (A, B)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return PeftLora(layers, content.get("base_model_name_or_path"), content, digests)


def import_adapter(
    folder: Path, model: ModelConfig, evaluation: EvalConfig, output_dir: str, dataset: str
) -> tuple[RunFolder, Config]:
    """Make a run of the PEFT adapter in `folder`, if there is none yet; its folder and config.

    model: its base. dataset: what it was trained on, as tables are to call it.
    Raises UserError for an adapter that is no plain LoRA, is of another base, or does not fit.
    """
    found = read_peft(folder)
    _check_base_name(folder, found, model)
    config = Config(model=model, eval=evaluation, output_dir=output_dir)
    config.dataset.name = dataset
    config.method.name = imported.__name__
    config.adapter.rank = found.rank
    config.adapter.targets = sorted({name.rpartition(".")[2] for name in found.layers})
    validate(config)
    adapted = build_model(config, torch.device("meta"))
    _fill(folder, found, adapted)
    identity = model_identity(config.model)
    digest = hashlib.sha256(json.dumps(found.sha256, sort_keys=True).encode()).hexdigest()
    hash8 = run_hash(config, identity, digest)
    run = RunFolder(imported_path(config, hash8))
    with locked(run, True):
        if run.record.is_file():
            logger.info("this adapter was imported before; going on in %s", run.path)
            return run, config
        phase = new_phase("import", 1, adapter={"sha256": found.sha256, CONFIG: found.content})
        record = Record(
            status="evaluating",
            name=str(run.path.relative_to(runs_root(config))),
            config=_known(config),
            run_hash=hash8,
            model=identity,
            data={"fingerprint": digest},
            training={},
            phases=[phase],
        )
        save_adapter(run.adapter, adapted, adapter_facts(identity, hash8))
        write_atomically(run.config, OmegaConf.to_yaml(OmegaConf.create(record.config)).encode())
        write_record(run.record, record)
    return run, config


def _known(config: Config) -> dict[str, Any]:
    """What a record holds of the settings, without those of a training that was not this run's."""
    content = recorded(config)
    for name in ("trainer", "seed", "tracking", "force"):
        del content[name]
    del content["adapter"]["init"]
    return content | {"dataset": {"name": config.dataset.name}}


def _check_plain(path: Path, content: Mapping[str, Any]) -> None:
    """Raise UserError, with the reason, for whatever is more or less than a plain LoRA."""
    kind = content.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind}; only LORA is a sum of components to cut")
    for key, value in content.items():
        if key not in READ | OF_TRAINING and value not in (None, False, "none", [], {}):
            reason = REASONS.get(key, "this version does not know what it does")
            raise UserError(f"{path}: {key}={value} is refused: {reason}")
    start = content.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights={start} is refused: that start changes the weights of the "
            "base, which the adapter then belongs to; save it by PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        of_layers = content.get(pattern) or {}
        if not isinstance(of_layers, dict) or not all(map(_is_expression, of_layers)):
            raise UserError(
                f"{path}: {pattern}={of_layers!r} is no object of names of layers, or of regular "
                "expressions for them"
            )
        for value in (content.get(key, 8), *of_layers.values()):
            if not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
                raise UserError(f"{path}: {key}={value!r} is not a positive number")


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _factors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B). Raises UserError for tensors that are no factors of a linear layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise UserError(
                f"{path} holds {name}, which is no factor of a linear layer; only a plain LoRA of "
                "linear layers can be imported"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if incomplete := [name for name, pair in found.items() if len(pair) < 2]:
        raise UserError(f"{path} lacks one of the two factors of {incomplete[0]}")
    if not found:
        raise UserError(f"{path} holds no factors")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _of_layer(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that is the end of a layer's name, as PEFT chooses it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


def _check_base_name(folder: Path, found: PeftLora, model: ModelConfig) -> None:
    """Raise UserError unless the adapter names this base; owners and folders may differ."""
    names = {short_name(name).lower() for name in (model.name, source_of(model))}
    if found.base and short_name(found.base).lower() not in names:
        raise UserError(
            f"adapter={folder} was trained on {found.base}, not on {model.path or model.name}; "
            "give its base by model=... or model.name=... and model.path=FOLDER, or, if this is it "
            f"by another name, write that into base_model_name_or_path of {folder / CONFIG}"
        )


def _fill(folder: Path, found: PeftLora, adapted: nn.Module) -> None:
    """Give the layers of a model without weights the factors, and zeros where there are none.

    Raises UserError for layers that the model does not have, or has in other shapes.
    """
    layers = adapter_layers(adapted)
    if lost := sorted(found.layers.keys() - layers.keys()):
        raise UserError(
            f"adapter={folder} does not fit the model, which lacks {len(lost)} of its layers, such "
            f"as {lost[0]}"
        )
    for name, layer in layers.items():
        A, B = (torch.zeros(factor.shape) for factor in (layer.lora_A, layer.lora_B))
        if name in found.layers:
            own_A, own_B = found.layers[name]
            rank = len(own_A)
            if (own_A.shape[1], own_B.shape[0]) != (layer.in_features, layer.out_features):
                raise UserError(
                    f"adapter={folder} does not fit the model: {name} maps {own_A.shape[1]} to "
                    f"{own_B.shape[0]} features in the adapter, {layer.in_features} to "
                    f"{layer.out_features} in the model"
                )
            A[:rank], B[:, :rank] = own_A, own_B
        layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)
