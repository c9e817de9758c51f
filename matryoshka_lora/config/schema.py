"""Typed, documented settings and what each of them affects.

The dataclasses are the schema that Hydra composes `configs/` into. What a setting affects is
declared beside it, once. From that follow the hash of a run, which runs tables keep apart, and when
a run is finished (`effects`):

    adapter      the adapter that comes out: it is part of the run's hash
    evaluation   what is evaluated
    fingerprint  where content is read from: a fingerprint of the content is hashed in its place
    nothing      speed, or where files go
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from matryoshka_lora import methods
from matryoshka_lora.core.diagonals import powers_of_two
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.methods import AdapterShape, Method

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Above these, a slip of the keyboard: no model has such layers, no such step leaves a number.
LARGEST, LARGEST_RANK, LARGEST_LR = 10**9, 2**16, 1000

Effect = Literal["adapter", "evaluation", "fingerprint", "nothing"]
Affects = Effect | Callable[["Config"], Effect]
T = TypeVar("T")


def setting(
    default: Any,
    help: str,
    affects: Affects,
    *,
    later: bool = False,
    idle: Callable[["Config"], str | None] = lambda config: None,
) -> Any:
    """A field with its meaning, which `python train.py --help` shows, and what it affects.

    later: it came when there were runs already; at its default it affects nothing, so that they are
    found under the hash that they have. idle: why it cannot change anything beside the rest of a
    config; None where it can.
    """
    metadata = {"help": help, "affects": affects, "later": later, "idle": idle}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _with_settings_of_methods(cls: type[T]) -> type[T]:
    """Add the settings of every method to `cls`; one that several methods read is one field."""
    read_by: dict[str, dict[str, bool]] = {}
    for info in methods.METHODS.values():
        for found in dataclasses.fields(info.settings):
            read_by.setdefault(found.name, {})[info.name] = found.metadata["later"]
            cls.__annotations__[found.name] = found.type
            help = f"{', '.join(read_by[found.name])}: {found.metadata['help']}"
            default = found.default if found.default_factory is dataclasses.MISSING else None
            if default is None and found.default_factory is not dataclasses.MISSING:
                default = found.default_factory()
            affects = _read_by(found.name, default, read_by[found.name])
            setattr(cls, found.name, setting(default, help, affects))
    return cls


def _read_by(name: str, default: Any, later: Mapping[str, bool]) -> Affects:
    """later: by method that reads the setting, whether it came when there were runs of it."""

    def affects(config: "Config") -> Effect:
        method = config.method.name
        unchanged = later.get(method, True) and getattr(config.method, name) == default
        return "adapter" if method in later and not unchanged else "nothing"

    return affects


def _where_sub_ranks_are_trained(config: "Config") -> Effect:
    return "adapter" if methods.get(config.method.name).trains_sub_ranks else "nothing"


def _where_micro_batches_draw(config: "Config") -> Effect:
    """It only splits a batch, unless each micro-batch draws a rank of its own."""
    return "adapter" if build_method(config).draw == "micro_batch" else "nothing"


def _not_of_the_hub(section: str, embedded: bool, path: str | None) -> str | None:
    if path is not None:
        return f"{section}.path={path} is read"
    return f"the {section} is the embedded one" if embedded else None


def _not_with_engine(engine: str, config: "Config") -> str | None:
    given = config.eval.engine
    return None if given == engine else f"it is for eval.engine={engine}, not {given}"


def _without_tracking(config: "Config") -> str | None:
    return "tracking=none tracks nothing" if config.tracking.name == "none" else None


@dataclass
class ModelConfig:
    name: str = setting(
        "tiny", "hub repository of the base model, or tiny for the embedded one", "fingerprint"
    )
    path: str | None = setting(None, "local folder to read instead of the hub", "fingerprint")
    revision: str = setting(
        "main",
        "branch, tag or commit on the hub; what was loaded is recorded",
        "fingerprint",
        idle=lambda config: _not_of_the_hub(
            "model", config.model.name == "tiny", config.model.path
        ),
    )
    dtype: str = setting(
        "float32", "float32 or bfloat16: of the base weights and of all compute", "adapter"
    )
    quantization: str | None = setting(
        None,
        "nf4 (QLoRA) or int8: keep the weights of the base's linear layers so; needs bitsandbytes",
        "adapter",
        later=True,
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
    subset: str | None = setting(
        None,
        "configuration of the hub repository",
        "fingerprint",
        idle=lambda config: _not_of_the_hub(
            "dataset", config.dataset.hub is None, config.dataset.path
        ),
    )
    path: str | None = setting(
        None, "folder with train.jsonl (.json, .parquet) instead of the hub", "fingerprint"
    )
    revision: str = setting(
        "main",
        "branch, tag or commit on the hub",
        "fingerprint",
        idle=lambda config: _not_of_the_hub(
            "dataset", config.dataset.hub is None, config.dataset.path
        ),
    )
    limit: int | None = setting(None, "use only the first n training records", "fingerprint")
    validation: float = setting(
        0.0, "share of the training records held out (split seed 0)", "fingerprint"
    )
    train_limit: int | None = setting(
        None,
        "train on only the first n of those that are not held out",
        "fingerprint",
        later=True,
    )
    max_length: int = setting(
        512, "tokens a training example may have; the rest is cut, counted", "adapter"
    )
    prompt: str = setting(
        "harness", "harness: text and tokens as lm-eval's own; paper: as released", "adapter"
    )
    keep_masked: bool = setting(
        False,
        "train on examples whose prompt fills max_length, too (paper): they have no label, but a "
        "place in a batch",
        "adapter",
        later=True,
    )


@dataclass
@_with_settings_of_methods
class MethodConfig:
    name: str = setting("matryoshka", f"one of {', '.join(methods.TRAINED)}", "adapter")


@dataclass
class AdapterConfig:
    rank: int = setting(32, "R, the rank of the factors", "adapter")
    train_ranks: list[int] | None = setting(
        None,
        "S, the trained sub-ranks; null: powers of 2",
        _where_sub_ranks_are_trained,
        idle=lambda config: (
            None
            if methods.get(config.method.name).trains_sub_ranks
            else f"method={config.method.name} trains R alone"
        ),
    )
    scaling: str = setting("none", "s_r: none (1), sqrt (1/sqrt r) or rank (1/r)", "adapter")
    targets: list[str] = setting(
        LLAMA_TARGETS, "last name segments of the layers to adapt", "adapter"
    )
    init: str = setting("lora", "bound of A: lora 1/sqrt(in), paper 1/sqrt(R)", "adapter")
    dtype: str = setting(
        "float32", "of the factors and optimizer: float32 or bfloat16 (paper)", "adapter"
    )
    float32_diagonal: bool = setting(
        False,
        "multiply by the diagonal in float32 (paper); false: rounded to model.dtype before",
        "adapter",
        later=True,
        idle=lambda config: (
            "model.dtype=float32 rounds nothing" if config.model.dtype == "float32" else None
        ),
    )


@dataclass
class TrainerConfig:
    lr: float | None = setting(
        1e-3,
        "peak learning rate, which falls linearly to 0, without warm-up; null: that of model, "
        "method and R in configs/rates.yaml",
        "adapter",
    )
    epochs: float = setting(3.0, "passes over the training records", "adapter")
    round_steps: str = setting(
        "nearest",
        "the steps of an epoch that ends early: nearest, or up (paper)",
        "adapter",
        later=True,
        idle=lambda config: (
            f"trainer.epochs={config.trainer.epochs:g} is whole"
            if config.trainer.epochs == int(config.trainer.epochs)
            else None
        ),
    )
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
        16384,
        "tokens a forward takes at most, where micro_batch is null",
        "nothing",
        idle=lambda config: (
            None
            if config.trainer.micro_batch is None
            else f"trainer.micro_batch={config.trainer.micro_batch} sizes the forwards"
        ),
    )
    clip_norm: float = setting(1.0, "largest gradient norm", "adapter")
    weight_decay: float = setting(0.0, "AdamW's, on factors and gates", "adapter")
    packed: bool = setting(
        True, "documents share a row without padding; false: padded rows", "nothing"
    )
    save_every: int | None = setting(
        None,
        "steps between checkpoints; null: 30 s, more where saving takes over 2 % of the time",
        "nothing",
    )
    validate_every: float | None = setting(
        0.5,
        "epochs between two losses on held-out records, as rank R is trained; null: none",
        "nothing",
        idle=lambda config: None if config.dataset.validation else "no records are held out",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations: less memory, slower", "nothing"
    )
    compile: bool = setting(False, "torch.compile each decoder layer but the first", "nothing")
    cuda_graphs: bool = setting(False, "replay packed forwards as CUDA graphs, on a GPU", "nothing")
    dry_run: bool = setting(
        False, "print parameters, tokens, steps and memory, and stop", "nothing"
    )

    @property
    def rate(self) -> float:
        """The learning rate, resolved."""
        assert self.lr is not None, "build_config resolves it"
        return self.lr


@dataclass
class EvalConfig:
    tasks: list[str] = setting([], "harness tasks as name:shots, such as gsm8k:3", "evaluation")
    ranks: list[int] | None = setting(
        None, "ranks to read the adapter at; null: powers of 2", "evaluation"
    )
    rules: list[str] | None = setting(
        None, "inference rules; null: all that the method allows at a rank", "evaluation"
    )
    engine: str = setting(
        "batched", "batched, or hf: lm-eval's own backend, the reference", "nothing"
    )
    batch_size: int = setting(
        32,
        "rows a batch has at most with engine hf",
        "nothing",
        idle=lambda config: _not_with_engine("hf", config),
    )
    cuda_graphs: bool = setting(
        False,
        "replay decoding steps as CUDA graphs (batched, on a GPU)",
        "nothing",
        idle=lambda config: _not_with_engine("batched", config),
    )
    data_path: str | None = setting(
        None, "folder with local copies of the tasks' data", "fingerprint"
    )
    limit: int | None = setting(None, "only the first n documents of each task", "evaluation")


@dataclass
class TrackingConfig:
    name: str = setting("none", "none or wandb", "nothing")
    mode: str = setting("online", "online or offline", "nothing", idle=_without_tracking)
    project: str = setting("matryoshka-lora", "W&B project", "nothing", idle=_without_tracking)
    entity: str | None = setting(
        None, "W&B team or user; null: the account's default", "nothing", idle=_without_tracking
    )


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
        """S, resolved; one that the method does not use counts as not given."""
        given = self.adapter.train_ranks
        if given is None or not methods.get(self.method.name).trains_sub_ranks:
            return powers_of_two(self.adapter.rank)
        return list(given)

    @property
    def eval_ranks(self) -> list[int]:
        """The ranks that the adapter is read at, resolved."""
        given = self.eval.ranks
        return powers_of_two(self.adapter.rank) if given is None else list(given)

    @property
    def tasks(self) -> list[tuple[str, int]]:
        """(harness task, shots) pairs of `eval.tasks`."""
        return [parse_task(text) for text in self.eval.tasks]


def method_shape(config: Config) -> AdapterShape:
    """What a method is told of the adapter."""
    adapter = config.adapter
    return AdapterShape(adapter.rank, tuple(config.train_ranks), adapter.scaling)


def build_method(config: Config) -> Method:
    """The method that the config names, with its settings. Raises UserError for wrong ones."""
    return methods.get(config.method.name).build(method_shape(config), method_settings(config))


def method_settings(config: Config) -> Any:
    """The settings that the config's method reads, as an instance of its own dataclass."""
    kind = methods.get(config.method.name).settings
    return kind(**{f.name: getattr(config.method, f.name) for f in dataclasses.fields(kind)})


def adapter_spec_of(config: Config) -> AdapterSpec:
    """What reading the trained adapter at a sub-rank needs to know."""
    spec = methods.get(config.method.name).spec(method_shape(config), build_method(config))
    return dataclasses.replace(spec, float32_diagonal=config.adapter.float32_diagonal)


def parse_task(text: str) -> tuple[str, int]:
    """`gsm8k:3` -> ("gsm8k", 3). Raises UserError on anything else."""
    name, _, shots = text.rpartition(":")
    if not name or not shots.isdigit():
        raise UserError(f"eval.tasks: {text!r} is not name:shots, such as gsm8k:3")
    return name, int(shots)


def short_name(model: str) -> str:
    """The last segment of a hub name, as folders and tables show it."""
    return model.rstrip("/").rpartition("/")[2]


def settings_of(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(key, field) of every setting."""
    for found in dataclasses.fields(node):
        key, value = f"{prefix}{found.name}", getattr(node, found.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{key}.")
        else:
            yield key, found
