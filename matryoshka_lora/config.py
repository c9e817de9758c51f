"""Typed, documented settings, what each of them affects, and every check on them.

The dataclasses are the schema that Hydra composes `configs/` into; `validate` is called before
anything heavy starts and names what was given, what is allowed and what to do.

What a setting affects is declared beside it, once. The hash of a run, the variants that tables keep
apart and what `finished` means are derived from that:

    adapter      the adapter that comes out: it is part of the run's hash
    evaluation   what is evaluated
    fingerprint  where content is read from: a fingerprint of the content is hashed in its place
    nothing      speed, or where files go
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from matryoshka_lora import methods
from matryoshka_lora.core.adapter import INITS
from matryoshka_lora.core.diagonals import SCALINGS, check_rank, check_train_ranks, powers_of_two
from matryoshka_lora.core.errors import UserError, nearest
from matryoshka_lora.core.rules import RULES
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.methods import AdapterShape, Method

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Effect = Literal["adapter", "evaluation", "fingerprint", "nothing"]
Affects = Effect | Callable[["Config"], Effect]
T = TypeVar("T")


def setting(default: Any, help: str, affects: Affects) -> Any:
    """A field with its meaning, which `python train.py --help` shows, and what it affects."""
    metadata = {"help": help, "affects": affects}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _with_settings_of_methods(cls: type[T]) -> type[T]:
    """Add the settings of every method to `cls`; one that several methods read is one field."""
    read_by: dict[str, list[str]] = {}
    for info in methods.METHODS.values():
        for found in dataclasses.fields(info.settings):
            read_by.setdefault(found.name, []).append(info.name)
            cls.__annotations__[found.name] = found.type
            help = f"{', '.join(read_by[found.name])}: {found.metadata['help']}"
            default = found.default if found.default_factory is dataclasses.MISSING else None
            if default is None and found.default_factory is not dataclasses.MISSING:
                default = found.default_factory()
            setattr(cls, found.name, setting(default, help, _read_by(*read_by[found.name])))
    return cls


def _read_by(*names: str) -> Affects:
    return lambda config: "adapter" if config.method.name in names else "nothing"


def _where_sub_ranks_are_trained(config: "Config") -> Effect:
    return "adapter" if methods.get(config.method.name).trains_sub_ranks else "nothing"


def _where_micro_batches_draw(config: "Config") -> Effect:
    """It only splits a batch, unless each micro-batch draws a rank of its own."""
    return "adapter" if build_method(config).draw == "micro_batch" else "nothing"


@dataclass
class ModelConfig:
    name: str = setting(
        "tiny", "hub repository of the base model, or tiny for the embedded one", "fingerprint"
    )
    path: str | None = setting(None, "local folder to read instead of the hub", "fingerprint")
    revision: str = setting(
        "main", "branch, tag or commit on the hub; what was loaded is recorded", "fingerprint"
    )
    dtype: str = setting(
        "float32", "float32 or bfloat16: of the base weights and of all compute", "adapter"
    )
    random_weights: bool = setting(
        False, "the real shape without its weights, for speed work", "fingerprint"
    )
    trust_remote_code: bool = setting(
        False, "run code that the model repository brings along", "fingerprint"
    )


@dataclass
class DatasetConfig:
    name: str = setting("arithmetic", "arithmetic, gsm8k or platypus", "fingerprint")
    hub: str | None = setting(
        None, "hub repository; null: made by the package's own generator", "fingerprint"
    )
    subset: str | None = setting(None, "configuration of the hub repository", "fingerprint")
    path: str | None = setting(
        None, "folder with train.jsonl (.json, .parquet) instead of the hub", "fingerprint"
    )
    revision: str = setting("main", "branch, tag or commit on the hub", "fingerprint")
    limit: int | None = setting(None, "use only the first n training records", "fingerprint")
    validation: float = setting(
        0.0, "share of the training records held out (split seed 0)", "fingerprint"
    )
    max_length: int = setting(
        512, "tokens a training example may have; the rest is cut, counted", "adapter"
    )
    prompt: str = setting(
        "harness", "harness: text and tokens as lm-eval's own; paper: as released", "adapter"
    )


@dataclass
@_with_settings_of_methods
class MethodConfig:
    name: str = setting("matryoshka", f"one of {', '.join(methods.METHODS)}", "adapter")


@dataclass
class AdapterConfig:
    rank: int = setting(32, "R, the rank of the factors", "adapter")
    train_ranks: list[int] | None = setting(
        None, "S, the trained sub-ranks; null: powers of 2", _where_sub_ranks_are_trained
    )
    scaling: str = setting("none", "s_r: none (1), sqrt (1/sqrt r) or rank (1/r)", "adapter")
    targets: list[str] = setting(
        LLAMA_TARGETS, "last name segments of the layers to adapt", "adapter"
    )
    init: str = setting("lora", "bound of A: lora 1/sqrt(in), paper 1/sqrt(R)", "adapter")
    dtype: str = setting(
        "float32", "of the factors and optimizer: float32 or bfloat16 (paper)", "adapter"
    )


@dataclass
class TrainerConfig:
    lr: float = setting(
        1e-3, "peak learning rate; it falls linearly to 0, without warm-up", "adapter"
    )
    epochs: float = setting(3.0, "passes over the training records", "adapter")
    max_steps: int | None = setting(
        None, "stop after n steps; the schedule ends there too", "adapter"
    )
    effective_batch: int = setting(
        32, "samples an optimizer step sees, over all processes", "adapter"
    )
    micro_batch: int | None = setting(
        None, "samples a forward takes; null: as max_tokens allows", _where_micro_batches_draw
    )
    max_tokens: int = setting(
        16384, "tokens a forward takes at most, where micro_batch is null", "nothing"
    )
    clip_norm: float = setting(1.0, "largest gradient norm", "adapter")
    weight_decay: float = setting(0.0, "AdamW's, on the factors", "adapter")
    packed: bool = setting(
        True, "documents share a row without padding; false: padded rows", "nothing"
    )
    save_every: int | None = setting(
        None,
        "steps between checkpoints; null: 30 s, more where saving takes over 2 % of the time",
        "nothing",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations: less memory, slower", "nothing"
    )
    compile: bool = setting(False, "torch.compile each decoder layer but the first", "nothing")
    cuda_graphs: bool = setting(False, "replay packed forwards as CUDA graphs, on a GPU", "nothing")
    dry_run: bool = setting(
        False, "print parameters, tokens, steps and memory, and stop", "nothing"
    )


@dataclass
class EvalConfig:
    tasks: list[str] = setting([], "harness tasks as name:shots, such as gsm8k:3", "evaluation")
    ranks: list[int] | None = setting(
        None, "ranks to read the adapter at; null: powers of 2", "evaluation"
    )
    rules: list[str] = setting(list(RULES), "inference rules", "evaluation")
    engine: str = setting(
        "batched", "batched, or hf: lm-eval's own backend, the reference", "nothing"
    )
    batch_size: int = setting(32, "rows a batch has at most with engine hf", "nothing")
    cuda_graphs: bool = setting(
        False, "replay decoding steps as CUDA graphs (batched, on a GPU)", "nothing"
    )
    data_path: str | None = setting(
        None, "folder with local copies of the tasks' data", "fingerprint"
    )
    limit: int | None = setting(None, "only the first n documents of each task", "evaluation")


@dataclass
class TrackingConfig:
    name: str = setting("none", "none or wandb", "nothing")
    mode: str = setting("online", "online or offline", "nothing")
    project: str = setting("matryoshka-lora", "W&B project", "nothing")
    entity: str | None = setting(None, "W&B team or user; null: the account's default", "nothing")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = setting(
        42, "of the adapter's start, the batch order and the drawn ranks", "adapter"
    )
    output_dir: str = setting("results", "runs go to <output_dir>/runs", "nothing")
    force: bool = setting(False, "train and evaluate again although the run is finished", "nothing")

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


def read_config(content: Mapping[str, Any], source: str) -> Config:
    """The config that a record holds, not checked again.

    Settings that came later have their defaults. Raises UserError naming `source` for settings
    that this version does not know or whose values have another type.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), content))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"{source}: its config is not one of this version: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(config, Config)
    return config


def method_shape(config: Config) -> AdapterShape:
    """What a method is told of the adapter."""
    adapter = config.adapter
    return AdapterShape(adapter.rank, tuple(config.train_ranks), adapter.scaling)


def build_method(config: Config) -> Method:
    """The method that the config names, with its settings. Raises UserError for wrong ones."""
    info = methods.get(config.method.name)
    own = {f.name: getattr(config.method, f.name) for f in dataclasses.fields(info.settings)}
    return info.build(method_shape(config), info.settings(**own))


def adapter_spec_of(config: Config) -> AdapterSpec:
    """What reading the trained adapter at a sub-rank needs to know."""
    return methods.get(config.method.name).spec(method_shape(config), build_method(config))


def affecting(config: Config, effect: Effect) -> dict[str, Any]:
    """The settings that have this effect, by their key, with their resolved values."""
    resolved = {"adapter.train_ranks": config.train_ranks, "eval.ranks": config.eval_ranks}
    found: dict[str, Any] = {}
    for key, value, declared in _settings(config):
        if (declared(config) if callable(declared) else declared) == effect:
            found[key] = resolved.get(key, value)
    return found


def _settings(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Affects]]:
    """(key, value, what it affects) of every setting."""
    for found in dataclasses.fields(node):
        key, value = f"{prefix}{found.name}", getattr(node, found.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{key}.")
        else:
            yield key, value, found.metadata["affects"]


def run_hash(config: Config, model_identity: Mapping[str, Any], data_fingerprint: str) -> str:
    """8 hex digits over exactly what changes the adapter."""
    content = {
        "settings": affecting(config, "adapter"),
        "model": model_identity,
        "data": data_fingerprint,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


COLUMNS = ("method.name", "adapter.rank", "adapter.scaling", "trainer.lr", "seed")
"""Settings that tables show for themselves."""


def variant(
    config: Config, model_identity: Mapping[str, Any], data_fingerprint: str | None
) -> dict[str, str]:
    """What tells two runs apart whose settings in COLUMNS are equal, as JSON by name.

    Runs of different variants are never pooled as seeds of one row. `data` and `base` stand for the
    content behind paths and revisions; None where it is not known.
    """
    base = {k: v for k, v in model_identity.items() if k not in ("name", "provenance")}
    digest = hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()[:8]
    found = {k: v for k, v in affecting(config, "adapter").items() if k not in COLUMNS}
    found["base"] = digest
    found["data"] = None if data_fingerprint is None else data_fingerprint[:8]
    return {key: json.dumps(value) for key, value in found.items()}


def wanted_points(config: Config) -> list[str]:
    """A name for every number that the config asks for; a run is finished when it has them all."""
    axes = ("eval.tasks", "eval.ranks", "eval.rules")
    asked = affecting(config, "evaluation")
    rest = " ".join(f"{k.removeprefix('eval.')}={v}" for k, v in asked.items() if k not in axes)
    tasks = [f"{name}:{shots} {rest}" for name, shots in config.tasks]
    if config.dataset.validation:
        tasks.append("validation")
    readings = [f"{rule}@{rank}" for rank in config.eval_ranks for rule in config.eval.rules]
    return [f"{task} {reading}" for task in tasks for reading in readings]


def parse_task(text: str) -> tuple[str, int]:
    """`gsm8k:3` -> ("gsm8k", 3). Raises UserError on anything else."""
    name, _, shots = text.rpartition(":")
    if not name or not shots.isdigit():
        raise UserError(f"eval.tasks: {text!r} is not name:shots, such as gsm8k:3")
    return name, int(shots)


def _choice(key: str, given: str, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if given not in allowed:
        raise UserError(
            f"{key}={given} is unknown; allowed: {', '.join(allowed)}{nearest(given, allowed)}"
        )


def _positive(key: str, given: float | None, optional: bool = False) -> None:
    if not (given is None and optional) and not (given is not None and 0 < given < float("inf")):
        raise UserError(f"{key}={given} must be a positive number" + " or null" * optional)


def validate(config: Config) -> None:
    """Check every value that can be checked without model or data. Raises UserError."""
    adapter, trainer = config.adapter, config.trainer
    try:
        check_rank(adapter.rank, adapter.rank)
        check_train_ranks(config.train_ranks, adapter.rank)
    except UserError as error:
        raise UserError(f"adapter.rank={adapter.rank}, adapter.train_ranks: {error}") from None
    _choice("adapter.scaling", adapter.scaling, SCALINGS)
    _choice("adapter.init", adapter.init, INITS)
    for key, dtype in (("adapter.dtype", adapter.dtype), ("model.dtype", config.model.dtype)):
        _choice(key, dtype, ("float32", "bfloat16"))
    if not adapter.targets or len(set(adapter.targets)) < len(adapter.targets):
        raise UserError(
            f"adapter.targets={adapter.targets} must name at least one layer, such as q_proj, "
            "each once"
        )
    if build_method(config).draw == "micro_batch" and trainer.micro_batch is None:
        raise UserError("method.draw=micro_batch needs trainer.micro_batch, such as 8")
    for key in ("lr", "epochs", "effective_batch", "max_tokens", "clip_norm"):
        _positive(f"trainer.{key}", getattr(trainer, key))
    for key in ("max_steps", "micro_batch", "save_every"):
        _positive(f"trainer.{key}", getattr(trainer, key), optional=True)
    if not 0 <= trainer.weight_decay < math.inf:
        raise UserError(
            f"trainer.weight_decay={trainer.weight_decay} must be 0 or a positive number"
        )
    _positive("dataset.max_length", config.dataset.max_length)
    _positive("dataset.limit", config.dataset.limit, optional=True)
    if not 0 <= config.dataset.validation < 1:
        raise UserError(f"dataset.validation={config.dataset.validation} must be in [0, 1)")
    _choice("dataset.prompt", config.dataset.prompt, ("harness", "paper"))
    if config.seed < 0:
        raise UserError(f"seed={config.seed} must not be negative")
    if not config.eval.rules or len(set(config.eval.rules)) < len(config.eval.rules):
        raise UserError(f"eval.rules={config.eval.rules} must name at least one rule, each once")
    if not config.eval_ranks:
        raise UserError("eval.ranks is empty; give at least one rank, or null for powers of 2")
    for rule in config.eval.rules:
        _choice("eval.rules", rule, RULES)
    for rank in config.eval_ranks:
        try:
            check_rank(rank, adapter.rank)
        except UserError as error:
            raise UserError(f"eval.ranks: {error}") from None
    if sorted(set(config.eval_ranks)) != config.eval_ranks:
        raise UserError(f"eval.ranks={config.eval_ranks} must be strictly increasing")
    _choice("eval.engine", config.eval.engine, ("batched", "hf"))
    _positive("eval.batch_size", config.eval.batch_size)
    _positive("eval.limit", config.eval.limit, optional=True)
    if len(set(config.tasks)) != len(config.tasks):
        raise UserError(f"eval.tasks={config.eval.tasks} names a task twice")
    _choice("tracking.name", config.tracking.name, ("none", "wandb"))
    _choice("tracking.mode", config.tracking.mode, ("online", "offline"))
    check_output(Path(config.output_dir))


def check_output(folder: Path) -> None:
    """Raises UserError unless `folder` is, or can be made, a folder that can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir={folder} cannot be written ({error.strerror}); choose another folder"
        ) from None


def short_name(model: str) -> str:
    """The last segment of a hub name, as folders and tables show it."""
    return model.rstrip("/").rpartition("/")[2]
