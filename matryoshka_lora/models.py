"""Base model and tokenizer: the embedded one, a local folder, the hub, or random weights."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
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
from matryoshka_lora.ops.quantized import library, quantize
from matryoshka_lora.ops.sharded import shards_only

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "tiny"
# Model shapes for random weights where the hub cannot be reached: facts of the public configs.
SHAPES = ASSETS / "shapes"
PROVENANCE = "provenance.json"
"""How a local folder was made."""

OLD_BUFFERS = ("inv_freq", "_cached", "position_ids", "masked_bias", "attn.bias", "attention.bias")
"""Ends of names of position tables and causal masks, which old files hold and no model reads."""

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


def has_shape_file(config: ModelConfig) -> bool:
    """Whether the shape is read from a file of this package."""
    return config.random_weights and config.path is None and _shape_file(config).is_file()


def load_shape(config: ModelConfig) -> PretrainedConfig:
    """The model's transformers config.

    Raises UserError that says how to get access, or to use a local copy, where it cannot be read.
    """
    if has_shape_file(config):
        return AutoConfig.for_model(**json.loads(_shape_file(config).read_text()))
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


def load_model(
    config: ModelConfig, device: torch.device, mesh: DeviceMesh | None = None
) -> PreTrainedModel:
    """The frozen base model in `model.dtype` on `device`, in evaluation mode.

    Raises UserError where it cannot be read, and where that needs a package that is not installed.

    With `quantization` the linear layers of its blocks are quantised, except on the meta device.
    With `random_weights` the shape is built with transformers' own initialisation from a fixed
    seed; on the meta device nothing is allocated. mesh: of each weight this process gets its rows
    (`ops.sharded`), and all processes call this together.
    """
    dtype = DTYPES[config.dtype]
    rows = nullcontext() if mesh is None else shards_only(mesh, device)
    shape = load_shape(config)
    source = source_of(config)
    quantized = config.quantization is not None and device.type != "meta"
    _check_quantization(config, source, shape, quantized)
    if config.random_weights or device.type == "meta":
        devices = [device] if device.type == "cuda" else []
        with _reading(config, source), torch.random.fork_rng(devices=devices), rows:
            torch.manual_seed(0)
            with device:
                model = AutoModelForCausalLM.from_config(
                    shape, dtype=dtype, trust_remote_code=config.trust_remote_code
                )
    else:
        with _reading(config, source), _without_report(), rows:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=shape,
                revision=config.revision,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                # It would fail with a traceback of shapes; without them it tells which.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                device_map=None if mesh is None else {"": device},
            )
        model, found = loaded
        _check_weights(source, found if mesh is None else _found_by_any(found))
        if not quantized:  # otherwise it moves layer by layer
            model = model.to(device)
        _check_finite(source, model, mesh is not None)
    model.requires_grad_(False)
    if quantized and not quantize(decoder_layers(model), str(config.quantization), device):
        raise UserError(
            f"model.quantization={config.quantization}: the blocks of {source}, a "
            f"{type(model).__name__}, have no plain linear layers; leave it out"
        )
    return model.to(device).eval()


def _check_quantization(
    config: ModelConfig, source: str, shape: PretrainedConfig, quantized: bool
) -> None:
    """Raises UserError where the model cannot be quantised as configured, before it is read."""
    kind = (getattr(shape, "quantization_config", None) or {}).get("quant_method")
    # bitsandbytes' own layers lose gradients on some CPUs: see `ops.quantized`.
    if kind == "bitsandbytes" or (kind is not None and config.quantization is not None):
        raise UserError(
            f"the files of model {source} are quantised already ({kind}); give the model in whole "
            "precision, which model.quantization=nf4 or int8 quantises when it is loaded"
        )
    try:
        if quantized:
            library()
    except ImportError as error:
        raise UserError(
            f"model.quantization={config.quantization} needs bitsandbytes ({_first_line(error)}): "
            "pip install -e '.[quant]', or leave it out"
        ) from error


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


@contextmanager
def _reading(config: ModelConfig, source: str) -> Iterator[None]:
    """Whatever fails while the files of `source` are read is a UserError that names it.

    transformers raises errors of all kinds for damaged or foreign files.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:  # a quantised checkpoint without its library
        raise UserError(
            f"model {source} needs a package that is not installed: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise UserError(unreachable(config, source, error)) from error


@contextmanager
def _without_report() -> Iterator[None]:
    """Hides transformers' table of weights that do not fit; `_check_weights` says it in a line."""
    reporting = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    reporting.addFilter(is_other)
    try:
        yield
    finally:
        reporting.removeFilter(is_other)


def _shape_file(config: ModelConfig) -> Path:
    return SHAPES / f"{short_name(config.name)}.json"


def _found_by_any(found: Mapping[str, Any]) -> dict[str, set[Any]]:
    """What all processes have found: the rows of one may be right where another's are not."""
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, dict(found))
    return {key: set().union(*(each[key] for each in everyones)) for key in found}


def _check_weights(source: str, found: Mapping[str, Any]) -> None:
    """Raises UserError where weights would be random or left out.

    found: what transformers says of its loading, in which tied weights and what a class of models
    is known to leave out are no problems.
    """
    problems = {
        "missing": found["missing_keys"],
        "of another shape": [entry[0] for entry in found["mismatched_keys"]],
        "without a place": [
            name for name in found["unexpected_keys"] if not name.endswith(OLD_BUFFERS)
        ],
    }
    named = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in problems.items()
        if names
    ]
    if named:
        raise UserError(
            f"model {source}: its weights are not those that its config.json announces: "
            f"{'; '.join(named)}; restore weights and config.json of one model"
        )


def _check_finite(source: str, model: PreTrainedModel, sharded: bool) -> None:
    """Raises UserError naming a weight that holds NaN or infinity.

    Not every forward shows it: attention on the CPU makes zeros of NaN.
    """
    named = {  # but those of a quantised checkpoint
        name: parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.dtype in DTYPES.values()
    }
    # A sum takes no memory, and any such number makes it one.
    wrong = {n for n, x in named.items() if not bool(x.sum(dtype=torch.float32).isfinite())}
    if sharded:
        wrong = _found_by_any({"wrong": wrong})["wrong"]
    for name in named:
        if name in wrong:
            raise UserError(
                f"model {source}: {name} holds numbers that are not finite; restore the files of "
                "this model"
            )


def unreachable(config: ModelConfig, source: str, error: Exception) -> str:
    """Why a model cannot be read, and what to do."""
    if Path(source).is_dir():
        # The first two lines: of a failed check of a config, the second says what is wrong.
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        return (
            f"model {source} cannot be read: {reason.rstrip('. ') or repr(error)}; restore the "
            "files of this folder, or name another one by model.path=FOLDER"
        )
    return (
        f"model {source} (revision {config.revision}) cannot be read: {_first_line(error)} "
        "If the repository is gated, accept its licence on its hub page and run `hf auth login` or "
        "set HF_TOKEN; for a local copy set model.path=FOLDER; for the shape alone set "
        "model.random_weights=true"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
