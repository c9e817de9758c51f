"""Base model and tokenizer: the embedded one, a local folder, the hub, or random weights."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
from matryoshka_lora.core.files import parse_json

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
            raise UserError(f"model.path={folder} is not a folder")
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={folder} holds no config.json, so it is no model folder")
        if not config.random_weights and not list(folder.glob("*.safetensors")):
            raise UserError(
                f"model.path={folder} holds no *.safetensors; weights are read as safetensors only"
            )
        if not (folder / "tokenizer_config.json").is_file():
            raise UserError(
                f"model.path={folder} holds no tokenizer_config.json; save the tokenizer there too"
            )
        return str(folder)
    return str(EMBEDDED) if config.name == "tiny" else config.name


def load_shape(config: ModelConfig) -> PretrainedConfig:
    """The model's transformers config.

    Raises UserError that says how to get access, or to use a local copy, where it cannot be read.
    """
    shape = SHAPES / f"{short_name(config.name)}.json"
    if config.random_weights and config.path is None and shape.is_file():
        return AutoConfig.for_model(**json.loads(shape.read_text()))
    source = source_of(config)
    with _reading(config, source):
        return AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; with random weights and no way to the hub, the embedded one."""
    source = source_of(config)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        with _reading(config, source):
            return AutoTokenizer.from_pretrained(source, **options)
    except UserError:
        if not config.random_weights:
            raise
        logger.warning("tokenizer of %s is out of reach: the embedded one is used", source)
        return AutoTokenizer.from_pretrained(EMBEDDED)


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The frozen base model in `model.dtype` on `device`, in evaluation mode.

    With `random_weights` the shape is built with transformers' own initialisation from a fixed
    seed; on the meta device nothing is allocated.
    """
    dtype = DTYPES[config.dtype]
    shape = load_shape(config)
    source = source_of(config)
    if config.random_weights or device.type == "meta":
        devices = [device] if device.type == "cuda" else []
        with _reading(config, source), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            with device:
                model = AutoModelForCausalLM.from_config(
                    shape, dtype=dtype, trust_remote_code=config.trust_remote_code
                )
    else:
        with _reading(config, source):
            model = AutoModelForCausalLM.from_pretrained(
                source,
                config=shape,
                revision=config.revision,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
            )
        model = model.to(device)  # type: ignore[arg-type]
    model.requires_grad_(False)
    return model.eval()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The repeated blocks of a causal language model: its longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


@contextmanager
def _reading(config: ModelConfig, source: str) -> Iterator[None]:
    """Whatever fails while the files of `source` are read is a UserError that names it.

    transformers raises errors of all kinds for damaged or foreign files.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(_unreachable(config, source, error)) from error


def _unreachable(config: ModelConfig, source: str, error: Exception) -> str:
    # The first two lines: of a failed check of a config, the second says what is wrong.
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    if not isinstance(error, OSError | ValueError):
        reason = f"{type(error).__name__}: {reason}"
    if Path(source).is_dir():
        return (
            f"model {source} cannot be read: {reason.rstrip('. ') or repr(error)}; restore the "
            "files of this folder, or name another one by model.path=FOLDER"
        )
    return (
        f"model {source} (revision {config.revision}) cannot be read: {reason} If the repository "
        f"is gated, accept its licence on its hub page and run `hf auth login` or set HF_TOKEN; "
        f"for a local copy set model.path=FOLDER; for the shape alone set model.random_weights=true"
    )


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
    content = _read_object(folder / "config.json")
    content.pop("transformers_version", None)
    identity["config_sha256"] = hashlib.sha256(
        json.dumps(content, sort_keys=True).encode()
    ).hexdigest()
    if not config.random_weights:
        identity["weights_sha256"] = _header_hash(folder)
    if (folder / PROVENANCE).is_file():
        identity["provenance"] = _read_object(folder / PROVENANCE)
    return identity


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder. Raises UserError naming it."""
    try:
        content = parse_json(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path} is {error}; restore the files of this model") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; restore the files of this model")
    return content


def _header_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, path.stat().st_size)))
            # The first weights tell two trainings of one shape apart at no cost.
            digest.update(file.read(1 << 20))
        digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()
