"""A sub-rank of a finished run as a plain PEFT adapter, or merged into the base weights.

Both can be read without this package. A sub-rank of a nested adapter is a LoRA of that rank: the
first r rows of A, the first r columns of B and one number, which PEFT writes as `lora_alpha` over r
(or over sqrt(r)). Where the diagonal is not one number, A is multiplied by it.
"""

import dataclasses
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from matryoshka_lora.config import Config
from matryoshka_lora.core.adapter import factors_of
from matryoshka_lora.core.diagonals import check_rank, prefix_diagonal, sub_rank_scale
from matryoshka_lora.core.errors import UserError, nearest
from matryoshka_lora.core.files import naming
from matryoshka_lora.core.rules import RULES, read
from matryoshka_lora.loading import TrainedRun, check_base, read_factors
from matryoshka_lora.models import (
    DTYPES,
    EMBEDDED,
    PROVENANCE,
    load_model,
    load_tokenizer,
)

logger = logging.getLogger(__name__)

# s_r -> (lora_alpha as a function of r, use_rslora): integers, so that PEFT computes s_r exactly.
# PEFT's scale is lora_alpha / r, with rslora lora_alpha / sqrt(r).
PEFT_SCALE = {
    "none": (lambda rank: rank, False),
    "sqrt": (lambda rank: 1, True),
    "rank": (lambda rank: 1, False),
}


@dataclasses.dataclass(frozen=True)
class SubRank:
    """The update `scale * B A` of each layer: A (r, in), B (out, r), one scale for all of them."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scaling: str
    """Which `s_r` the scale is: "none", "sqrt" or "rank"."""


def sub_rank(run: TrainedRun, rank: int, rule: str) -> SubRank:
    """The factors that `rule` reads at `rank`, in float32.

    Raises UserError for an unknown rank or rule, and where the adapter file is not the run's.
    """
    if rule not in RULES:
        raise UserError(
            f"rule={rule} is unknown; allowed: {', '.join(RULES)}{nearest(rule, RULES)}"
        )
    try:
        check_rank(rank, run.spec.rank)
    except UserError as error:
        raise UserError(f"{error}; allowed: 1 to {run.spec.rank}") from None
    if trained_rank(run, rank, rule) is False:
        logger.warning(
            "rank %d is not one of the trained sub-ranks %s", rank, run.config.train_ranks
        )
    file = read_factors(run)
    reading = read(file.spec, rank, rule)
    layers: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in file.state.items():
        layer, _, role = name.rpartition(".")
        layers[layer][role] = parameter
    found, diagonals = {}, {}
    for name in sorted(layers):
        read_here = factors_of(layers[name], file.spec, reading.factors)
        gate = read_here.get("lora_gate")
        diagonals[name] = (reading.p if gate is None else reading.p * gate)[:rank]
        # Copies: a slice of B is not contiguous, and safetensors refuses views of one tensor.
        found[name] = (
            read_here["lora_A"][:rank].contiguous().clone(),
            read_here["lora_B"][:, :rank].contiguous().clone(),
        )
    # A diagonal of one number, the same in all layers, is a scale of PEFT's.
    for scaling in PEFT_SCALE:
        p = prefix_diagonal(rank, rank, scaling)
        if all(torch.equal(own, p) for own in diagonals.values()):
            return SubRank(found, scaling)
    multiplied = {name: (A * diagonals[name][:, None], B) for name, (A, B) in found.items()}
    return SubRank(multiplied, "none")


def trained_rank(run: TrainedRun, rank: int, rule: str) -> bool | None:
    """Whether the rank is in S; None where the rule reads the SVD, which is valid at every rank."""
    factors = read(run.spec, rank, rule).factors
    return None if factors == "svd" else rank in run.config.train_ranks


def export_peft(run: TrainedRun, rank: int, rule: str, out: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`.

    Raises UserError for an unknown rank or rule, if `out` exists and is not empty, and without the
    package peft.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("format=peft needs the package peft: pip install peft") from None

    sub = sub_rank(run, rank, rule)
    alpha, rslora = PEFT_SCALE[sub.scaling]
    state = {}
    for name, (A, B) in sub.factors.items():
        state[f"base_model.model.{name}.lora_A.weight"] = A
        state[f"base_model.model.{name}.lora_B.weight"] = B
    with _new_folder(out) as folder:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        LoraConfig(
            r=rank,
            lora_alpha=alpha(rank),
            use_rslora=rslora,
            target_modules=sorted({name.rpartition(".")[2] for name in sub.factors}),
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
    the run's model). Raises UserError for an unknown rank, rule, dtype or device, if `out` exists
    and is not empty, if the base model is not the one that was trained on, or if an adapted weight
    is tied to another one, which merging would change too.
    """
    dtype = run.config.model.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is unknown; allowed: {', '.join(DTYPES)}")
    where = device_of(device)
    sub = sub_rank(run, rank, rule)
    with _new_folder(out) as folder:
        tokenizer = load_tokenizer(run.config.model)
        check_base(run)
        model = load_model(run.config.model, where)
        scale = sub_rank_scale(rank, sub.scaling)
        for name, (A, B) in sub.factors.items():
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


def _base_of(config: Config) -> str:
    """What `base_model_name_or_path` has to be for the base to be found again."""
    if config.model.path is not None:
        return config.model.path
    return str(EMBEDDED) if config.model.name == "tiny" else config.model.name


def _check_untied(model: nn.Module, name: str) -> None:
    weight = model.get_submodule(name).weight
    tied = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and other != f"{name}.weight"
    ]
    if tied:
        raise UserError(
            f"{name}.weight is tied to {', '.join(tied)}, so merging would change both; "
            "use format=peft"
        )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well and vanishes when it does not."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not an empty folder; choose another one")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk by an error of its own.
        with naming(out, "nothing is left of it", SafetensorError):
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
