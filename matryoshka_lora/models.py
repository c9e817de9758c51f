"""Base model and tokenizer: the embedded one, a local folder, the hub, or random weights."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from matryoshka_lora.config import ModelConfig, short_name
from matryoshka_lora.core.errors import UserError

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "tiny"
# Model shapes for random weights where the hub cannot be reached: facts of the public configs.
SHAPES = ASSETS / "shapes"
PROVENANCE = "provenance.json"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def source_of(config: ModelConfig) -> str:
    """Where transformers reads the model from: a local folder or a hub repository."""
    if config.path is not None:
        folder = Path(config.path)
        if not folder.is_dir():
            raise ValueError(f"model.path={folder} is not a folder")
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.path={folder} holds no config.json, so it is no model folder")
        if not config.random_weights and not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"model.path={folder} holds no *.safetensors; weights are read as safetensors only"
            )
        if not (folder / "tokenizer_config.json").is_file():
            raise ValueError(
                f"model.path={folder} holds no tokenizer_config.json; save the tokenizer there too"
            )
        return str(folder)
    return str(EMBEDDED) if config.name == "tiny" else config.name


def load_shape(config: ModelConfig) -> PretrainedConfig:
    """The model's transformers config.

    Raises ValueError that says how to get access, or to use a local copy, where it cannot be read.
    """
    shape = SHAPES / f"{short_name(config.name)}.json"
    if config.random_weights and config.path is None and shape.is_file():
        return AutoConfig.for_model(**json.loads(shape.read_text()))
    source = source_of(config)
    try:
        return AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(_unreachable(config, source, error)) from None


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; with random weights and no way to the hub, the embedded one."""
    source = source_of(config)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, HfHubHTTPError) as error:
        if config.random_weights:
            logger.warning("tokenizer of %s is out of reach: the embedded one is used", source)
            return AutoTokenizer.from_pretrained(EMBEDDED)
        raise ValueError(_unreachable(config, source, error)) from None


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The frozen base model in `model.dtype` on `device`, in evaluation mode.

    Raises UserError where it cannot be read, and where that needs a package that is not installed.

    With `random_weights` the shape is built with transformers' own initialisation from a fixed
    seed; on the meta device nothing is allocated.
    """
    dtype = DTYPES[config.dtype]
    shape = load_shape(config)
    if config.random_weights or device.type == "meta":
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            with device:
                model = AutoModelForCausalLM.from_config(
                    shape, dtype=dtype, trust_remote_code=config.trust_remote_code
                )
    else:
        source = source_of(config)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source,
                config=shape,
                revision=config.revision,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
            )
        except ImportError as error:  # a quantised checkpoint without its library
            raise UserError(
                f"model {source} needs a package that is not installed: {_first_line(error)}"
            ) from None
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ValueError(_unreachable(config, source, error)) from None
        model = model.to(device)  # type: ignore[arg-type]
    model.requires_grad_(False)
    return model.eval()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The repeated blocks of a causal language model: its longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[dict[str, float]]:
    """No dropout, layer drop or router noise in the base model for the length of a block.

    Their masks would follow how examples are packed and split over processes, whatever the seed.
    Yields the settings that were not 0, by name, and the log says so; they are back afterwards.
    """
    modules = [vars(module) for module in model.modules()]
    # Some read their config in each forward.
    used = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = [vars(config) for config in {id(config): config for config in used}.values()]
    found = [
        (values, name, value)
        for values in modules + configs
        for name, value in values.items()
        # `p` is nn.Dropout's.
        if (name == "p" or "drop" in name or "jitter" in name)
        and isinstance(value, float)
        and value > 0
    ]
    # As the configs name them, where they do.
    named = [entry for entry in found if any(entry[0] is c for c in configs)] or found
    switched_off = {"dropout" if name == "p" else name: value for _, name, value in named}
    if switched_off:
        logger.warning(
            "the base model's dropout is switched off in training (%s): its masks would depend on "
            "how examples are packed and split over processes",
            ", ".join(f"{name} {value:g}" for name, value in sorted(switched_off.items())),
        )
    try:
        for values, name, _ in found:
            values[name] = 0.0
        yield dict(sorted(switched_off.items()))
    finally:
        for values, name, value in found:
            values[name] = value


def other_modalities(model: PreTrainedModel) -> list[str]:
    """Names of the models inside `model` that text does not go through, such as a vision tower."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # a few call a part of their head so
        return []
    around = {id(module) for module in decoder.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and id(module) not in around
        and all(inner is not decoder for inner in module.modules())
    ]


def _unreachable(config: ModelConfig, source: str, error: Exception) -> str:
    return (
        f"model {source} (revision {config.revision}) cannot be read: {_first_line(error)} "
        "If the repository is gated, accept its licence on its hub page and run `hf auth login` or "
        "set HF_TOKEN; for a local copy set model.path=FOLDER; for the shape alone set "
        "model.random_weights=true"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """What tells this base model from another, without loading its weights.

    `config_sha256` of the shape and `weights_sha256` of the safetensors (local folders),
    `revision`: the commit that the hub resolved, `provenance`: how a local folder was made. No
    paths, so that the identity is the same on every machine.
    """
    identity: dict[str, Any] = {
        "name": config.name,
        "random_weights": config.random_weights,
        "revision": None,
        "config_sha256": None,
        "weights_sha256": None,
        "provenance": None,
    }
    if config.path is None and config.name != "tiny":
        # The shape files hold no commit; a repository that was really read does.
        identity["revision"] = getattr(load_shape(config), "_commit_hash", None)
        return identity
    folder = Path(source_of(config))
    content = json.loads((folder / "config.json").read_text())
    content.pop("transformers_version", None)
    identity["config_sha256"] = hashlib.sha256(
        json.dumps(content, sort_keys=True).encode()
    ).hexdigest()
    if not config.random_weights:
        identity["weights_sha256"] = _header_hash(folder)
    if (folder / PROVENANCE).is_file():
        identity["provenance"] = json.loads((folder / PROVENANCE).read_text())
    return identity


def _header_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(length))
            # The first weights tell two trainings of one shape apart at no cost.
            digest.update(file.read(1 << 20))
        digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()
