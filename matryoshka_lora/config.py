"""Typed, documented settings, every check on them, and the name and hash of a run.

The dataclasses are the schema that Hydra composes `configs/` into; `validate` is called before
anything heavy starts and names what was given, what is allowed and what to do.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from matryoshka_lora.core.diagonals import SCALINGS, check_rank, check_train_ranks, powers_of_two
from matryoshka_lora.core.errors import nearest

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def setting(default: Any, help: str) -> Any:
    """A field with its meaning, which `python train.py --help` shows."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelConfig:
    name: str = setting("tiny", "hub repository of the base model, or tiny for the embedded one")
    path: str | None = setting(None, "local folder to read instead of the hub")
    revision: str = setting("main", "branch, tag or commit on the hub; what was loaded is recorded")
    dtype: str = setting("float32", "float32 or bfloat16: of the base weights and of all compute")
    random_weights: bool = setting(False, "the real shape without its weights, for speed work")
    trust_remote_code: bool = setting(False, "run code that the model repository brings along")


@dataclass
class DatasetConfig:
    name: str = setting("arithmetic", "arithmetic, gsm8k or platypus")
    hub: str | None = setting(None, "hub repository; null: made by the package's own generator")
    subset: str | None = setting(None, "configuration of the hub repository")
    path: str | None = setting(None, "folder with train.jsonl (.json, .parquet) instead of the hub")
    revision: str = setting("main", "branch, tag or commit on the hub")
    limit: int | None = setting(None, "use only the first n training records")
    validation: float = setting(0.0, "share of the training records held out (split seed 0)")
    max_length: int = setting(512, "tokens a training example may have; the rest is cut, counted")
    prompt: str = setting(
        "harness", "harness: text and tokens as lm-eval's own; paper: as released"
    )


@dataclass
class MethodConfig:
    name: str = setting("matryoshka", "lora, dylora, matryoshka or nested_dropout")
    draw: str = setting("step", "dylora: one rank per step, micro_batch or sample")
    frozen: bool = setting(False, "dylora: update only the rows above the next smaller sub-rank")
    normalise: str = setting("sum", "matryoshka: P is the sum or the mean of the prefix diagonals")
    weights: list[float] | None = setting(None, "odds of each trained sub-rank; null: all alike")


@dataclass
class AdapterConfig:
    rank: int = setting(32, "R, the rank of the factors")
    train_ranks: list[int] | None = setting(None, "S, the trained sub-ranks; null: powers of 2")
    scaling: str = setting("none", "s_r: none (1), sqrt (1/sqrt r) or rank (1/r)")
    targets: list[str] = setting(LLAMA_TARGETS, "last name segments of the layers to adapt")
    init: str = setting("lora", "bound of A: lora 1/sqrt(in), paper 1/sqrt(R)")
    dtype: str = setting("float32", "of the factors and optimizer: float32 or bfloat16 (paper)")


@dataclass
class TrainerConfig:
    lr: float = setting(1e-3, "peak learning rate; it falls linearly to 0, without warm-up")
    epochs: float = setting(3.0, "passes over the training records")
    max_steps: int | None = setting(None, "stop after n steps; the schedule ends there too")
    effective_batch: int = setting(32, "samples an optimizer step sees, over all processes")
    micro_batch: int | None = setting(None, "samples a forward takes; null: as max_tokens allows")
    max_tokens: int = setting(16384, "tokens a forward takes at most, where micro_batch is null")
    clip_norm: float = setting(1.0, "largest gradient norm")
    weight_decay: float = setting(0.0, "AdamW's, on the factors")
    packed: bool = setting(True, "documents share a row without padding; false: padded rows")
    save_every: int | None = setting(
        None, "steps between checkpoints; null: 30 s, more where saving takes over 2 % of the time"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    compile: bool = setting(False, "torch.compile each decoder layer but the first")
    cuda_graphs: bool = setting(False, "replay packed forwards as CUDA graphs, on a GPU")
    dry_run: bool = setting(False, "print parameters, tokens, steps and memory, and stop")


@dataclass
class EvalConfig:
    tasks: list[str] = setting([], "harness tasks as name:shots, such as gsm8k:3")
    ranks: list[int] | None = setting(None, "ranks to read the adapter at; null: powers of 2")
    rules: list[str] = setting(["prefix", "trained", "svd"], "inference rules")
    engine: str = setting("batched", "batched, or hf: lm-eval's own backend, the reference")
    batch_size: int = setting(32, "rows a batch has at most with engine hf")
    cuda_graphs: bool = setting(False, "replay decoding steps as CUDA graphs (batched, on a GPU)")
    data_path: str | None = setting(None, "folder with local copies of the tasks' data")
    limit: int | None = setting(None, "only the first n documents of each task")


@dataclass
class TrackingConfig:
    name: str = setting("none", "none or wandb")
    mode: str = setting("online", "online or offline")
    project: str = setting("matryoshka-lora", "W&B project")
    entity: str | None = setting(None, "W&B team or user; null: the account's default")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = setting(42, "of the adapter's start, the batch order and the drawn ranks")
    output_dir: str = setting("results", "runs go to <output_dir>/runs")
    force: bool = setting(False, "train and evaluate again although the run is finished")

    @property
    def train_ranks(self) -> list[int]:
        """S, resolved."""
        given = self.adapter.train_ranks
        return powers_of_two(self.adapter.rank) if given is None else list(given)

    @property
    def eval_ranks(self) -> list[int]:
        """The ranks that the adapter is read at, resolved."""
        given = self.eval.ranks
        return powers_of_two(self.adapter.rank) if given is None else list(given)

    @property
    def tasks(self) -> list[tuple[str, int]]:
        """(harness task, shots) pairs of `eval.tasks`."""
        return [parse_task(text) for text in self.eval.tasks]


def build_config(node: DictConfig) -> Config:
    """The composed Hydra config as a checked `Config`."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), node))
    assert isinstance(config, Config)
    validate(config)
    return config


def parse_task(text: str) -> tuple[str, int]:
    """`gsm8k:3` -> ("gsm8k", 3). Raises ValueError on anything else."""
    name, _, shots = text.rpartition(":")
    if not name or not shots.isdigit():
        raise ValueError(f"eval.tasks: {text!r} is not name:shots, such as gsm8k:3")
    return name, int(shots)


def _choice(key: str, given: str, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if given not in allowed:
        raise ValueError(
            f"{key}={given} is unknown; allowed: {', '.join(allowed)}{nearest(given, allowed)}"
        )


def _positive(key: str, given: float | None, optional: bool = False) -> None:
    if not (given is None and optional) and not (given is not None and 0 < given < float("inf")):
        raise ValueError(f"{key}={given} must be a positive number" + " or null" * optional)


def validate(config: Config) -> None:
    """Check every value that can be checked without model or data. Raises ValueError."""
    adapter, method, trainer = config.adapter, config.method, config.trainer
    try:
        check_rank(adapter.rank, adapter.rank)
        check_train_ranks(config.train_ranks, adapter.rank)
    except ValueError as error:
        raise ValueError(f"adapter.rank={adapter.rank}, adapter.train_ranks: {error}") from None
    _choice("adapter.scaling", adapter.scaling, SCALINGS)
    _choice("adapter.init", adapter.init, ("lora", "paper"))
    for key, dtype in (("adapter.dtype", adapter.dtype), ("model.dtype", config.model.dtype)):
        _choice(key, dtype, ("float32", "bfloat16"))
    if not adapter.targets or len(set(adapter.targets)) < len(adapter.targets):
        raise ValueError(
            f"adapter.targets={adapter.targets} must name at least one layer, such as q_proj, "
            "each once"
        )
    _choice("method.draw", method.draw, ("step", "micro_batch", "sample"))
    _choice("method.normalise", method.normalise, ("sum", "mean"))
    if method.weights is not None:
        if len(method.weights) != len(config.train_ranks):
            raise ValueError(
                f"method.weights has {len(method.weights)} values for the "
                f"{len(config.train_ranks)} trained sub-ranks {config.train_ranks}"
            )
        if not all(0 <= w < math.inf for w in method.weights) or sum(method.weights) <= 0:
            raise ValueError(f"method.weights={method.weights} must be >= 0 with a positive sum")
    if method.frozen and method.draw != "step":
        raise ValueError("method.frozen=true needs one rank a step: set method.draw=step")
    if method.name == "dylora" and method.draw == "micro_batch" and trainer.micro_batch is None:
        raise ValueError("method.draw=micro_batch needs trainer.micro_batch, such as 8")
    for key in ("lr", "epochs", "effective_batch", "max_tokens", "clip_norm"):
        _positive(f"trainer.{key}", getattr(trainer, key))
    for key in ("max_steps", "micro_batch", "save_every"):
        _positive(f"trainer.{key}", getattr(trainer, key), optional=True)
    if not 0 <= trainer.weight_decay < math.inf:
        raise ValueError(
            f"trainer.weight_decay={trainer.weight_decay} must be 0 or a positive number"
        )
    _positive("dataset.max_length", config.dataset.max_length)
    _positive("dataset.limit", config.dataset.limit, optional=True)
    if not 0 <= config.dataset.validation < 1:
        raise ValueError(f"dataset.validation={config.dataset.validation} must be in [0, 1)")
    _choice("dataset.prompt", config.dataset.prompt, ("harness", "paper"))
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must not be negative")
    if not config.eval.rules or len(set(config.eval.rules)) < len(config.eval.rules):
        raise ValueError(f"eval.rules={config.eval.rules} must name at least one rule, each once")
    if not config.eval_ranks:
        raise ValueError("eval.ranks is empty; give at least one rank, or null for powers of 2")
    for rule in config.eval.rules:
        _choice("eval.rules", rule, ("prefix", "trained", "svd"))
    for rank in config.eval_ranks:
        try:
            check_rank(rank, adapter.rank)
        except ValueError as error:
            raise ValueError(f"eval.ranks: {error}") from None
    if sorted(set(config.eval_ranks)) != config.eval_ranks:
        raise ValueError(f"eval.ranks={config.eval_ranks} must be strictly increasing")
    _choice("eval.engine", config.eval.engine, ("batched", "hf"))
    _positive("eval.batch_size", config.eval.batch_size)
    _positive("eval.limit", config.eval.limit, optional=True)
    if len(set(config.tasks)) != len(config.tasks):
        raise ValueError(f"eval.tasks={config.eval.tasks} names a task twice")
    _choice("tracking.name", config.tracking.name, ("none", "wandb"))
    _choice("tracking.mode", config.tracking.mode, ("online", "offline"))
    check_output(Path(config.output_dir))


def check_output(folder: Path) -> None:
    """Raises ValueError unless `folder` is, or can be made, a folder that can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir={folder} cannot be written ({error.strerror}); choose another folder"
        ) from None


def run_hash(config: Config, model_identity: dict, data_fingerprint: str) -> str:
    """8 hex digits over exactly what changes the adapter.

    Evaluation, tracking, paths, the process count and how a batch is cut into forwards do not
    change it; micro_batch does where the method draws a rank for each.
    """
    method = dataclasses.asdict(config.method)
    if config.method.name in ("lora", "matryoshka"):
        method["weights"] = None
    if config.method.name != "dylora":
        method.pop("draw"), method.pop("frozen")
    if config.method.name != "matryoshka":
        method.pop("normalise")
    trainer = {
        key: getattr(config.trainer, key)
        for key in ("lr", "epochs", "max_steps", "effective_batch", "clip_norm", "weight_decay")
    }
    if config.method.name == "dylora" and config.method.draw == "micro_batch":
        trainer["micro_batch"] = config.trainer.micro_batch
    adapter = dataclasses.asdict(config.adapter)
    adapter["train_ranks"] = None if config.method.name == "lora" else config.train_ranks
    content = {
        "model": model_identity,
        "dtype": config.model.dtype,
        "data": data_fingerprint,
        "max_length": config.dataset.max_length,
        "prompt": config.dataset.prompt,
        "method": method,
        "adapter": adapter,
        "trainer": trainer,
        "seed": config.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def run_folder(config: Config, hash8: str) -> Path:
    """`<output_dir>/runs/<dataset>/<model>/<method>-r<R>-<scaling>/lr<lr>-seed<seed>-<hash>`."""
    adapter = config.adapter
    return (
        Path(config.output_dir)
        / "runs"
        / config.dataset.name
        / short_name(config.model.name)
        / f"{config.method.name}-r{adapter.rank}-{adapter.scaling}"
        / f"lr{config.trainer.lr:g}-seed{config.seed}-{hash8}"
    )


def short_name(model: str) -> str:
    """The last segment of a hub name, as folders and tables show it."""
    return model.rstrip("/").rpartition("/")[2]
