"""A sub-rank of a finished run as a plain PEFT adapter, or merged into the base weights.

Both can be read without this package. A sub-rank of a nested adapter is a LoRA of that rank: the
first r rows of A, the first r columns of B and one number, which PEFT writes as `lora_alpha` over r
(or over sqrt(r)). Where the diagonal is not one number, A is multiplied by it. Where each layer has
a rank of its own, PEFT's `rank_pattern` and `alpha_pattern` say so, and a layer of rank 0 is left
out.
"""

import dataclasses
import json
import logging
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from matryoshka_lora import methods
from matryoshka_lora.config import Config, ModelConfig
from matryoshka_lora.core.adapter import factors_of
from matryoshka_lora.core.diagonals import prefix_diagonal, sub_rank_scale
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import naming
from matryoshka_lora.core.rules import depends_on_trained_ranks, read, rules_at
from matryoshka_lora.core.storage import AdapterFile, read_adapter
from matryoshka_lora.loading import TrainedRun, check_base, device_of, read_factors
from matryoshka_lora.models import (
    DTYPES,
    EMBEDDED,
    PROVENANCE,
    load_model,
    load_tokenizer,
)
from matryoshka_lora.ops.quantized import dequantize
from matryoshka_lora.reporting.choosing import rule_for, scores_at

logger = logging.getLogger(__name__)

PEFT_CONFIG = "adapter_config.json"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""

# s_r -> (lora_alpha as a function of r, use_rslora): integers, so that PEFT computes s_r exactly.
# PEFT's scale is lora_alpha / r, with rslora lora_alpha / sqrt(r).
PEFT_SCALE = {
    "none": (lambda rank: rank, False),
    "sqrt": (lambda rank: 1, True),
    "rank": (lambda rank: 1, False),
}


@dataclasses.dataclass(frozen=True)
class SubRank:
    """The update `s_r B A` of each layer: A (r, in), B (out, r), r its own rank."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """Those of layers whose rank is 0 are left out."""
    scaling: str
    """Which `s_r` the scale is: "none", "sqrt" or "rank"."""
    uniform: bool
    """Whether all layers have the rank that was asked for."""


def sub_rank(run: TrainedRun, rank: int, rule: str) -> SubRank:
    """The factors that `rule` reads at `rank`, in float32.

    Raises UserError for a rule that the adapter cannot be read by, where the adapter file is not
    the run's, and where it is zero in all layers.
    """
    return _sub_rank_of(read_factors(run), rank, rule, run.folder.path)


def _sub_rank_of(file: AdapterFile, rank: int, rule: str, source: Path) -> SubRank:
    """`sub_rank` of an adapter's file; source: what the message names where it is zero."""
    reading = read(file.view, rank, rule)
    uniform = isinstance(reading.p, Tensor)
    found, diagonals = {}, {}
    for name, trained in sorted(file.layers.items()):
        read_here = factors_of(trained, file.spec, reading.factors)
        own = reading.p if isinstance(reading.p, Tensor) else reading.p[name]
        p = own * read_here["lora_gate"] if "lora_gate" in read_here else own
        # The first r, some of which may be zero; others only where the rule reads others.
        taken = torch.arange(rank) if uniform and not p[rank:].any() else p.nonzero()[:, 0]
        if uniform and len(taken) > rank:
            raise UserError(f"rule={rule} reads {len(taken)} components at rank {rank}")
        if not len(taken):
            continue
        diagonals[name] = p[taken]
        # Copies: a part of B is not contiguous, and safetensors refuses views of one tensor.
        found[name] = (
            read_here["lora_A"][taken].contiguous(),
            read_here["lora_B"][:, taken].contiguous(),
        )
    multiplied = {name: (A * diagonals[name][:, None], B) for name, (A, B) in found.items()}
    if not any(A.any() and B.any() for A, B in multiplied.values()):
        raise UserError(
            f"nothing to export: at rank {rank} under rule {rule} the adapter of {source} is zero "
            "everywhere"
        )
    # A diagonal of one number, the same in all layers, is a scale of PEFT's.
    for scaling in PEFT_SCALE:
        if all(
            torch.equal(own, prefix_diagonal(len(own), len(own), scaling))
            for own in diagonals.values()
        ):
            return SubRank(found, scaling, uniform)
    return SubRank(multiplied, "none", uniform)


def rule_of(run: TrainedRun, rank: int, asked: str | None) -> str:
    """The rule to export a rank by, see `reporting.choosing.rule_for`, with what to know of it.

    Raises UserError for an unknown rank or rule, or one that the adapter cannot be read by.
    """
    rule = rule_for(run.record, run.spec, rank, asked)
    if trained_rank(run, rank, rule) is False:
        logger.warning(
            "rank %d is not one of the trained sub-ranks %s", rank, run.config.train_ranks
        )
    return rule


def trained_rank(run: TrainedRun, rank: int, rule: str) -> bool | None:
    """Whether the rank is in S; None where the rule is valid at every rank."""
    return rank in run.config.train_ranks if depends_on_trained_ranks(rank, rule) else None


def export_each(
    run: TrainedRun,
    ranks: Iterable[int],
    rule: str | None,
    out: Path,
    export: Callable[[TrainedRun, int, str | None, Path], None],
) -> list[Path]:
    """`export` each rank to a folder of its own, `out/r<rank>`: all of them, or nothing is left.

    Returns the folders. Raises UserError as `export` does.
    """
    names = {rank: f"r{rank}" for rank in ranks}
    with _new_folder(out) as folder:
        for rank, name in names.items():
            export(run, rank, rule, folder / name)
    return [out / name for name in names.values()]


def vllm_command(folders: Sequence[Path]) -> str | None:
    """The command by which vLLM serves PEFT exports of a run, each as a model of its folder's name.

    None, with a warning, where a layer's rank is above the largest of VLLM_RANKS.
    """
    configs = [json.loads((folder / PEFT_CONFIG).read_text()) for folder in folders]
    needed = max(
        rank for each in configs for rank in (each["r"], *each.get("rank_pattern", {}).values())
    )
    if needed > VLLM_RANKS[-1]:
        logger.warning(
            "vLLM serves LoRAs of rank %d at most, and a layer has %d: export a smaller rank, or "
            "use format=merged",
            *(VLLM_RANKS[-1], needed),
        )
        return None
    allowed = min(rank for rank in VLLM_RANKS if rank >= needed)
    command = ["vllm", "serve", configs[0]["base_model_name_or_path"], "--enable-lora"]
    modules = [f"{folder.name}={folder}" for folder in folders]
    return shlex.join([*command, "--max-lora-rank", str(allowed), "--lora-modules", *modules])


def export_peft(run: TrainedRun, rank: int, rule: str | None, out: str | Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`.

    rule: None is the one that the record shows best. What PEFT reads of it is compared with what
    was written; without PEFT a warning says that it was not. Raises UserError for an unknown rank
    or rule, if `out` exists and is not empty, if the base model is not the one that was trained on,
    and where PEFT cannot carry the adapter.
    """
    _check_new(Path(out))  # before the factors are read, which takes long
    rule = rule_of(run, rank, rule)
    sub = sub_rank(run, rank, rule)
    base = _shape_of_base(run.config.model)
    if base is not None:
        check_base(run)
    with _peft_folder(Path(out), sub, rank, _base_of(run.config), base) as folder:
        _write_provenance(folder, run, rank, rule)


def export_adapter(adapter: str | Path, rank: int, rule: str, out: str | Path, base: str) -> None:
    """`export_peft` for a file of `save_adapter`, without a run.

    base: what `base_model_name_or_path` is to be, a folder or a name of the hub. Raises UserError
    as `export_peft` does, but cannot tell whether it is the model that was trained on.
    """
    _check_new(Path(out))
    file = read_adapter(Path(adapter))
    rules_at(file.spec, rank, [rule])
    sub = _sub_rank_of(file, rank, rule, Path(adapter))
    model = ModelConfig(path=base) if Path(base).is_dir() else ModelConfig(name=base)
    with _peft_folder(Path(out), sub, rank, base, _shape_of_base(model)):
        pass


@contextmanager
def _peft_folder(
    out: Path, sub: SubRank, rank: int, base_name: str, base: PreTrainedModel | None
) -> Iterator[Path]:
    """A `_new_folder` with the two files of a PEFT adapter; the block may add others.

    rank: that of all layers, or the one that was asked for where each has its own. base: the shape
    that PEFT is tried on and changes.
    """
    alpha, rslora = PEFT_SCALE[sub.scaling]
    state = {}
    for name, (A, B) in sub.factors.items():
        state[f"base_model.model.{name}.lora_A.weight"] = A
        state[f"base_model.model.{name}.lora_B.weight"] = B
    with _new_folder(out) as folder:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # Only what differs from PEFT's defaults, and not written by PEFT, which adds keys that its
        # earlier versions refuse.
        content: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha(rank),
            "target_modules": _target_modules(sub.factors, base),
        }
        if rslora:
            content["use_rslora"] = True
        if not sub.uniform:
            ranks = {name: len(A) for name, (A, _) in sub.factors.items()}
            content["target_modules"] = sorted(ranks)
            content["rank_pattern"] = ranks
            content["alpha_pattern"] = {name: alpha(own) for name, own in ranks.items()}
        (folder / PEFT_CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if base is not None:
            _check_peft(base_name, base, state, folder)
        yield folder


def _shape_of_base(model: ModelConfig) -> PreTrainedModel | None:
    """The base model without weights; None, with a warning, where it is out of reach."""
    try:
        return load_model(model, torch.device("meta"))
    except ValueError as error:
        logger.warning("it was not checked that PEFT can read this: %s", error)
        return None


def _target_modules(layers: Iterable[str], base: PreTrainedModel | None) -> list[str]:
    """What PEFT has to be told to adapt these layers: their last name segments, where it can be."""
    layers = set(layers)
    short = {name.rpartition(".")[2] for name in layers}
    names = [] if base is None else [name for name, _ in base.named_modules()]
    others = any(name.rpartition(".")[2] in short and name not in layers for name in names)
    return sorted(layers if others else short)


def _check_peft(name: str, base: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Raise UserError unless PEFT makes exactly the parameters `state` of what is in `folder`.

    base: the base model without weights, which PEFT changes.
    """
    try:
        from peft import PeftModel
    except ImportError:
        logger.warning("it was not checked that PEFT can read this: peft is not installed")
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is compared below
            model = PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=True)
    except Exception as error:  # whatever PEFT raises for layers that it does not know
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        found = {
            name.replace(".default.", "."): parameter.shape
            for name, parameter in model.named_parameters()
            if ".lora_" in name
        }
        wrong = sorted(
            name
            for name in state.keys() | found.keys()
            if name not in state or state[name].shape != found.get(name)
        )
        if not wrong:
            return
        problem = f"it does not read {len(wrong)} of its tensors as they are, such as {wrong[0]}"
    raise UserError(
        f"PEFT cannot carry this adapter on {name}: {problem}; for a run, use format=merged"
    )


@torch.no_grad()
def export_merged(
    run: TrainedRun,
    rank: int,
    rule: str | None,
    out: Path,
    dtype: str | None = None,
    device: str = "cpu",
) -> None:
    """Write the base model with `W0 + scale * B A` in place of each adapted weight, and tokenizer.

    The sum is formed in float32 and rounded once, to `dtype` (float32 or bfloat16; None: that of
    the run's model); provenance and log say what that loses. A quantised base is dequantised: the
    sum is that of the weights that the run was trained on, not of those in the base's files. rule:
    None is the one that the record shows best. Raises UserError for an unknown rank, rule, dtype or
    device, if `out` exists and is not empty, if the base model is not the one that was trained on,
    or if an adapted weight is tied to another one, which merging would change too.
    """
    dtype = run.config.model.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is unknown; allowed: {', '.join(DTYPES)}")
    where = device_of(device)
    rule = rule_of(run, rank, rule)
    with _new_folder(out) as folder:
        sub = sub_rank(run, rank, rule)
        tokenizer = load_tokenizer(run.config.model)
        check_base(run)
        model = load_model(run.config.model, where)
        dequantize(model, model.dtype)
        rounding = _Rounding(dtype)
        for name, (A, B) in sub.factors.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear), name
            _check_untied(model, name)
            scale = sub_rank_scale(len(A), sub.scaling)
            update = scale * (B.to(layer.weight.device) @ A.to(layer.weight.device))
            exact = layer.weight.float() + update
            merged = exact.to(DTYPES[dtype])
            rounding.add(merged.float() - exact, update)
            layer.weight = nn.Parameter(merged, requires_grad=False)
        model.to(dtype=DTYPES[dtype])  # type: ignore[call-arg]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        logger.info("%s", rounding)
        _write_provenance(folder, run, rank, rule, rounding=rounding.facts())


class _Rounding:
    """What rounding the merged weights loses, over all adapted layers."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.largest = self.sum = self.squares = self.update_squares = 0.0
        self.count = 0

    def add(self, error: Tensor, update: Tensor) -> None:
        """error: rounded less exact weights; update: what was merged; (out, in) each."""
        self.largest = max(self.largest, float(error.abs().max()))
        self.sum += float(error.abs().sum(dtype=torch.float64))
        self.squares += float(error.square().sum(dtype=torch.float64))
        self.update_squares += float(update.square().sum(dtype=torch.float64))
        self.count += error.numel()

    def facts(self) -> dict[str, Any]:
        """`max` and `mean` absolute difference of a weight; `share`: norm over the update's."""
        share = (self.squares / self.update_squares) ** 0.5
        mean = self.sum / self.count
        return {"dtype": self.dtype, "max": self.largest, "mean": mean, "share": share}

    def __str__(self) -> str:
        return (
            "merged weights are rounded to {dtype}: a weight is off by {max:.2g} at most, "
            "{mean:.2g} on average; all are off by {share:.2%} of the norm of the update"
        ).format(**self.facts())


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


def _check_new(out: Path) -> None:
    """Raise UserError where `out` is something else than an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not an empty folder; choose another one")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well and vanishes when it does not."""
    out = out.absolute()
    _check_new(out)
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


def _write_provenance(folder: Path, run: TrainedRun, rank: int, rule: str, **more: Any) -> None:
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
        "quantization": run.config.model.quantization,
        **more,
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n")
    _write_card(folder, run, rank, rule)


def _write_card(folder: Path, run: TrainedRun, rank: int, rule: str) -> None:
    """README.md: what the export is, its scores, and how it is loaded."""
    config, base, peft = run.config, run.record.model["name"], (folder / PEFT_CONFIG).is_file()
    method = methods.get(config.method.name)
    name, trainer = config.method.name, config.method.name
    if not method.trained:
        name, trainer = method.label, "other code"
    load = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")"""
    if peft:
        load = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(_base_of(config))})
model = PeftModel.from_pretrained(base, "this folder")"""
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        f"library_name: {'peft' if peft else 'transformers'}",
        "tags: [lora, matryoshka-lora]",
        "---",
        "",
        f"# {base}, {name} at rank {rank}",
        "",
        f"{'A LoRA for' if peft else 'With a LoRA merged into it:'} {base}, read at rank {rank} by "
        f"the rule `{rule}` from an adapter of rank {run.spec.rank} that {trainer} trained on "
        f"{config.dataset.name}{'' if method.trained else ' data'}.",
    ]
    if trained_rank(run, rank, rule) is False:
        lines.append(f"Rank {rank} is not one of the trained sub-ranks {config.train_ranks}.")
    if (kind := config.model.quantization) is not None:
        lines.append(f"The run read its base in {kind}, and its scores are on that base.")
        lines.append(
            "The code below loads the base in whole precision, on which scores may differ."
            if peft
            else "These weights are the dequantised ones with the update."
        )
    lines.append("")
    if scores := scores_at(run.record, rank, rule):
        lines += ["| measured | unit | documents | base model | this |", "|---|---|---|---|---|"]
        for metric, documents, of_base, score in scores:
            cells = [metric.label, metric.unit, str(documents)]
            cells += ["" if x is None else metric.text(x) for x in (of_base, score)]
            lines.append(f"| {' | '.join(cells)} |")
    else:
        lines.append("The record of the run holds no scores at this rank by this rule.")
    lines += ["", "```python", load, "```", "", f"Run {run.record.name}; see {PROVENANCE}.", ""]
    (folder / "README.md").write_text("\n".join(lines))
