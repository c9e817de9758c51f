"""A sub-rank of a finished run as a plain PEFT adapter, or merged into the base weights.

Both need nothing of this package to be read. A sub-rank of a nested adapter is a LoRA of that rank:
its first r rows and columns and one number, which PEFT writes as `lora_alpha` over r (or over
sqrt(r)). Where the diagonal is not one number it is folded into A.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from matryoshka_lora.config import Config, adapter_spec_of
from matryoshka_lora.core.adapter import principal_factors
from matryoshka_lora.core.diagonals import check_rank, prefix_diagonal, sub_rank_scale
from matryoshka_lora.core.errors import nearest
from matryoshka_lora.core.rules import RULES, read
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.models import (
    DTYPES,
    EMBEDDED,
    PROVENANCE,
    load_model,
    load_tokenizer,
    model_identity,
)
from matryoshka_lora.runs.record import Record, read_record

logger = logging.getLogger(__name__)

# s_r -> (lora_alpha as a function of r, use_rslora): integers, so that PEFT computes s_r exactly.
# PEFT's scale is lora_alpha / r, with rslora lora_alpha / sqrt(r).
PEFT_SCALE = {
    "none": (lambda rank: rank, False),
    "sqrt": (lambda rank: 1, True),
    "rank": (lambda rank: 1, False),
}


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a finished training left: `factors` maps a layer's name to (A (R, in), B (out, R))."""

    folder: Path
    config: Config
    record: Record
    spec: AdapterSpec
    factors: dict[str, tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class SubRank:
    """The update `scale * B A` of each layer: A (r, in), B (out, r), one scale for all of them."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scaling: str
    """Which `s_r` the scale is: "none", "sqrt" or "rank"."""


def read_run(folder: Path, model_path: str | None = None) -> TrainedRun:
    """Read the record and the factors of a run's folder.

    model_path: the base model's folder, where the recorded one is on another machine.
    Raises ValueError if the run is not there, has not finished training, or is not whole.
    """
    if not (folder / "record.json").is_file():
        raise ValueError(f"run={folder} holds no record.json, so it is no folder of a run")
    record = read_record(folder / "record.json")
    path = folder / "adapter.safetensors"
    if record.status == "training" or not path.is_file():
        raise ValueError(
            f"run={folder} has not finished training (status {record.status}, "
            f"{path.name} {'there' if path.is_file() else 'missing'}); run its command again first"
        )
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), record.config))
    assert isinstance(config, Config)
    if model_path is not None:
        config.model.path = model_path
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an adapter: {error}") from error
    layers = sorted({name.rpartition(".")[0] for name in state})
    expected = {f"{layer}.{factor}" for layer in layers for factor in ("lora_A", "lora_B")}
    if not layers or state.keys() != expected:
        raise ValueError(f"{path} does not hold lora_A and lora_B of each of its layers")
    factors = {layer: (state[f"{layer}.lora_A"], state[f"{layer}.lora_B"]) for layer in layers}
    return TrainedRun(folder, config, record, adapter_spec_of(config), factors)


def sub_rank(run: TrainedRun, rank: int, rule: str) -> SubRank:
    """The factors that `rule` reads at `rank`, in float32. Raises ValueError for unknown ones."""
    if rule not in RULES:
        raise ValueError(
            f"rule={rule} is unknown; allowed: {', '.join(RULES)}{nearest(rule, RULES)}"
        )
    try:
        check_rank(rank, run.spec.rank)
    except ValueError as error:
        raise ValueError(f"{error}; allowed: 1 to {run.spec.rank}") from None
    if trained_rank(run, rank, rule) is False:
        logger.warning(
            "rank %d is not one of the trained sub-ranks %s", rank, run.config.train_ranks
        )
    reading = read(run.spec, rank, rule)
    factor_set, p = reading.factors, reading.p[:rank]
    # One number at every row is a scale of PEFT's; anything else goes into A.
    exact = (name for name in PEFT_SCALE if torch.equal(p, prefix_diagonal(rank, rank, name)))
    scaling = next(exact, None)
    factors = {}
    for name, (A, B) in run.factors.items():
        if factor_set == "svd":
            A, B = principal_factors(A, B, torch.tensor(run.spec.p_full))
        A = A[:rank] if scaling is not None else A[:rank] * p[:, None]
        # Copies: a slice of B is not contiguous, and safetensors refuses views of one tensor.
        factors[name] = (A.contiguous().clone(), B[:, :rank].contiguous().clone())
    return SubRank(factors, scaling or "none")


def trained_rank(run: TrainedRun, rank: int, rule: str) -> bool | None:
    """Whether training visited this sub-rank; None for svd, where every rank is valid."""
    return None if rule == "svd" else rank in run.config.train_ranks


def export_peft(run: TrainedRun, rank: int, rule: str, out: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`.

    Raises ValueError for an unknown rank or rule, if `out` exists and is not empty, and without the
    package peft.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("format=peft needs the package peft: pip install peft") from None

    read = sub_rank(run, rank, rule)
    alpha, rslora = PEFT_SCALE[read.scaling]
    state = {}
    for name, (A, B) in read.factors.items():
        state[f"base_model.model.{name}.lora_A.weight"] = A
        state[f"base_model.model.{name}.lora_B.weight"] = B
    with _new_folder(out) as folder:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        LoraConfig(
            r=rank,
            lora_alpha=alpha(rank),
            use_rslora=rslora,
            target_modules=sorted({name.rpartition(".")[2] for name in read.factors}),
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=_base_of(run.config),
        ).save_pretrained(str(folder))
        _write_provenance(folder, run, rank, rule)


@torch.no_grad()
def export_merged(
    run: TrainedRun,
    rank: int,
    rule: str,
    out: Path,
    dtype: str | None = None,
    device: str = "cpu",
) -> None:
    """Write the base model with `W0 + scale * B A` in place of each adapted weight, and tokenizer.

    The sum is formed in float32 and rounded once, to `dtype` (float32 or bfloat16; None: that of
    the run's model). Raises ValueError for an unknown rank, rule or dtype, if `out` exists and is
    not empty, if the base model is not the one that was trained on, or if an adapted weight is tied
    to another one, which merging would change too.
    """
    dtype = run.config.model.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is unknown; allowed: {', '.join(DTYPES)}")
    read = sub_rank(run, rank, rule)
    with _new_folder(out) as folder:
        tokenizer = load_tokenizer(run.config.model)
        _check_base(run)
        model = load_model(run.config.model, torch.device(device))
        scale = sub_rank_scale(rank, read.scaling)
        for name, (A, B) in read.factors.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear), name
            _check_untied(model, name)
            update = scale * (B.to(layer.weight.device) @ A.to(layer.weight.device))
            merged = (layer.weight.float() + update).to(DTYPES[dtype])
            layer.weight = nn.Parameter(merged, requires_grad=False)
        model.to(dtype=DTYPES[dtype])  # type: ignore[call-arg]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_provenance(folder, run, rank, rule)


def _base_of(config: Config) -> str:
    """What `base_model_name_or_path` has to be for the base to be found again."""
    if config.model.path is not None:
        return config.model.path
    return str(EMBEDDED) if config.model.name == "tiny" else config.model.name


def _check_base(run: TrainedRun) -> None:
    """Raises ValueError if what tells base models apart differs from what the run recorded."""
    now = model_identity(run.config.model)
    for key in ("config_sha256", "weights_sha256", "revision"):
        before = run.record.model.get(key)
        if None not in (before, now[key]) and before != now[key]:
            raise ValueError(
                f"the base model {_base_of(run.config)} is not the one that run={run.folder} was "
                f"trained on: {key} is {now[key]}, the record says {before}; give the right one "
                "with model_path=FOLDER"
            )


def _check_untied(model: nn.Module, name: str) -> None:
    weight = model.get_submodule(name).weight
    tied = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and other != f"{name}.weight"
    ]
    if tied:
        raise ValueError(
            f"{name}.weight is tied to {', '.join(tied)}, so merging would change both; "
            "use format=peft"
        )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well and vanishes when it does not."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists and is not an empty folder; choose another one")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_provenance(folder: Path, run: TrainedRun, rank: int, rule: str) -> None:
    """What the export is; a run that uses it as its base model copies this into its record."""
    content: dict[str, Any] = {
        "source": run.record.name,
        "note": f"exported at rank {rank} of {run.spec.rank}, rule {rule}",
        "run_hash": run.record.run_hash,
        "method": run.config.method.name,
        "scaling": run.spec.scaling,
        "rank": rank,
        "rule": rule,
        "trained_rank": trained_rank(run, rank, rule),
        "base": run.record.model,
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n")
