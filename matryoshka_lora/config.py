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
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from matryoshka_lora import methods
from matryoshka_lora.core.adapter import INITS
from matryoshka_lora.core.diagonals import SCALINGS, check_rank, check_train_ranks, powers_of_two
from matryoshka_lora.core.errors import UserError, nearest
from matryoshka_lora.core.rules import RULES, rules_at
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.methods import AdapterShape, Method

logger = logging.getLogger(__name__)

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
    read_by: dict[str, list[str]] = {}
    for info in methods.METHODS.values():
        for found in dataclasses.fields(info.settings):
            read_by.setdefault(found.name, []).append(info.name)
            cls.__annotations__[found.name] = found.type
            help = f"{', '.join(read_by[found.name])}: {found.metadata['help']}"
            default = found.default if found.default_factory is dataclasses.MISSING else None
            if default is None and found.default_factory is not dataclasses.MISSING:
                default = found.default_factory()
            affects, later = _read_by(*read_by[found.name]), found.metadata["later"]
            setattr(cls, found.name, setting(default, help, affects, later=later))
    return cls


def _read_by(*names: str) -> Affects:
    return lambda config: "adapter" if config.method.name in names else "nothing"


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
    name: str = setting("matryoshka", f"one of {', '.join(methods.METHODS)}", "adapter")


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
    lr: float = setting(
        1e-3, "peak learning rate; it falls linearly to 0, without warm-up", "adapter"
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
    """The composed Hydra config as a checked `Config`. Raises UserError."""
    config = typed_config(node)
    validate(config)
    return config


def typed_config(node: DictConfig) -> Config:
    """The composed Hydra config as a `Config` that is not checked yet.

    Raises ConfigKeyError for a key that there is not, also one that `+key=` has put into `node`.
    """
    # As a plain container: a merge of two nodes keeps what was added to the second.
    content = OmegaConf.to_container(node)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), content))
    assert isinstance(config, Config)
    return config


def quote_texts(overrides: Iterable[str]) -> list[str]:
    """Hydra overrides in which a number given for a text is quoted, so that it stays as typed.

    Hydra would read `output_dir=20240101_1200` as 202401011200 and `model.revision=1e5` as
    100000.0. Whatever is no override of a setting comes back as it is.
    """
    texts = {key for key, found in _fields(Config()) if found.type in (str, str | None)}
    parser = OverridesParser.create()

    def quoted(text: str) -> str:
        if not re.fullmatch(r"[\w.+-]+", text):
            return text
        value = parser.parse_override(f"key={text}").value()
        return f"'{text}'" if isinstance(value, int | float) else text  # bool is an int

    found = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals and key.lstrip("+") in texts:
            text = ",".join(map(quoted, text.split(",")))  # of a sweep, each
        found.append(f"{key}{equals}{text}")
    return found


def check_given(config: Config, overrides: Iterable[str], *, swept: bool = False) -> None:
    """Tell of settings among the overrides, those of a command line, that change nothing.

    A setting of other methods raises UserError that names them, and any other is a warning; so is
    that of other methods in a sweep (`swept`), where it may be meant for them. What files of
    `configs/` set is theirs to set for all methods.
    """
    info, fields = methods.get(config.method.name), dict(_fields(config))
    own = {found.name: found for found in dataclasses.fields(info.settings)}
    for key in dict.fromkeys(o.lstrip("+").partition("=")[0] for o in overrides):
        section, _, name = key.rpartition(".")
        if key not in fields:
            continue  # a group, or Hydra's own
        reason = fields[key].metadata["idle"](config)
        if section == "method" and name in own:
            settings = method_settings(config)
            reason = own[name].metadata["idle"](method_shape(config), settings)
        elif section == "method" and name != "name":
            readers = [
                other.name
                for other in methods.METHODS.values()
                if name in (f.name for f in dataclasses.fields(other.settings))
            ]
            reason = f"method={info.name} does not read it, only {', '.join(readers)}"
            if not swept:
                raise UserError(f"{key} is given, but {reason}; leave it out, or choose another")
        if reason is not None:
            logger.warning("%s is given, but changes nothing: %s", key, reason)


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
    return methods.get(config.method.name).build(method_shape(config), method_settings(config))


def method_settings(config: Config) -> Any:
    """The settings that the config's method reads, as an instance of its own dataclass."""
    kind = methods.get(config.method.name).settings
    return kind(**{f.name: getattr(config.method, f.name) for f in dataclasses.fields(kind)})


def adapter_spec_of(config: Config) -> AdapterSpec:
    """What reading the trained adapter at a sub-rank needs to know."""
    spec = methods.get(config.method.name).spec(method_shape(config), build_method(config))
    return dataclasses.replace(spec, float32_diagonal=config.adapter.float32_diagonal)


def affecting(config: Config, effect: Effect) -> dict[str, Any]:
    """The settings that have this effect, by their key, with their resolved values."""
    resolved = {"adapter.train_ranks": config.train_ranks, "eval.ranks": config.eval_ranks}
    found: dict[str, Any] = {}
    for key, declaration in _fields(config):
        value = attrgetter(key)(config)
        declared: Affects = declaration.metadata["affects"]
        if declaration.metadata["later"] and value == declaration.default:
            declared = "nothing"
        if (declared(config) if callable(declared) else declared) == effect:
            found[key] = resolved.get(key, value)
    return found


def _fields(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(key, field) of every setting."""
    for found in dataclasses.fields(node):
        key, value = f"{prefix}{found.name}", getattr(node, found.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{key}.")
        else:
            yield key, found


def run_hash(config: Config, model_identity: Mapping[str, Any], data_fingerprint: str) -> str:
    """8 hex digits over exactly what changes the adapter, the method's diagonals included."""
    content = {
        "settings": affecting(config, "adapter"),
        "method": build_method(config).fingerprint(),
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


VALIDATION = "validation"
"""What points and rows call the records that are held out of training."""


def wanted_points(config: Config, fingerprints: Mapping[str, str]) -> list[str]:
    """A name for every number that the config asks for; a run is finished when it has them all.

    fingerprints: of the content behind each entry of `eval.tasks`, and behind "validation". What
    has none is left out.
    """
    spec = adapter_spec_of(config)
    axes = ("eval.tasks", "eval.ranks", "eval.rules")
    asked = affecting(config, "evaluation")
    rest = " ".join(f"{k.removeprefix('eval.')}={v}" for k, v in asked.items() if k not in axes)
    tasks = {f"{name}:{shots}": f" {rest}" for name, shots in config.tasks}
    if config.dataset.validation:
        tasks[VALIDATION] = ""
    readings = [
        f"{rule}@{rank}"
        for rank in config.eval_ranks
        for rule in rules_at(spec, rank, config.eval.rules)
    ]
    return [
        f"{task}{rest} {fingerprints[task]} {reading}"
        for task, rest in tasks.items()
        if task in fingerprints
        for reading in readings
    ]


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


def _positive(
    key: str, given: float | None, optional: bool = False, largest: float = LARGEST
) -> None:
    if given is None and optional:
        return
    if given is None or not 0 < given <= largest:
        limit = f" of at most {largest:,}" if given is not None and given > largest else ""
        raise UserError(f"{key}={given} must be a positive number{limit}" + " or null" * optional)


def validate(config: Config) -> None:
    """Check every value that can be checked without model or data. Raises UserError."""
    adapter, trainer = config.adapter, config.trainer
    if adapter.rank > LARGEST_RANK:
        raise UserError(
            f"adapter.rank={adapter.rank} is above {LARGEST_RANK:,}, wider than the layers of any "
            "model; choose a smaller one"
        )
    try:
        check_rank(adapter.rank, adapter.rank)
        check_train_ranks(config.train_ranks, adapter.rank)
    except ValueError as error:
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
    _positive("trainer.lr", trainer.lr, largest=LARGEST_LR)
    _positive("trainer.clip_norm", trainer.clip_norm, largest=sys.float_info.max)
    for key in ("epochs", "effective_batch", "max_tokens"):
        _positive(f"trainer.{key}", getattr(trainer, key))
    _choice("trainer.round_steps", trainer.round_steps, ("nearest", "up"))
    for key in ("max_steps", "micro_batch", "save_every"):
        _positive(f"trainer.{key}", getattr(trainer, key), optional=True)
    if not 0 <= trainer.lr * trainer.weight_decay <= 1:
        raise UserError(
            f"trainer.weight_decay={trainer.weight_decay} must be 0 or a positive number of at "
            f"most 1 / trainer.lr = {1 / trainer.lr:g}: a step takes their product off the factors"
        )
    _positive("dataset.max_length", config.dataset.max_length)
    _positive("dataset.limit", config.dataset.limit, optional=True)
    if not 0 <= config.dataset.validation < 1:
        raise UserError(f"dataset.validation={config.dataset.validation} must be in [0, 1)")
    _choice("dataset.prompt", config.dataset.prompt, ("harness", "paper"))
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed={config.seed} must be from 0 to 2**63 - 1 = {2**63 - 1}")
    rules = config.eval.rules
    if rules is not None and (not rules or len(set(rules)) < len(rules)):
        raise UserError(f"eval.rules={rules} must name at least one rule, each once, or be null")
    if not config.eval_ranks:
        raise UserError("eval.ranks is empty; give at least one rank, or null for powers of 2")
    for rule in rules or ():
        _choice("eval.rules", rule, RULES)
    spec = adapter_spec_of(config)
    for rank in config.eval_ranks:
        try:
            check_rank(rank, adapter.rank)
        except ValueError as error:
            raise UserError(f"eval.ranks: {error}") from None
        try:
            rules_at(spec, rank, rules)
        except UserError as error:
            raise UserError(f"eval.rules={rules}: {error}; null reads all that are") from None
    if sorted(set(config.eval_ranks)) != config.eval_ranks:
        raise UserError(f"eval.ranks={config.eval_ranks} must be strictly increasing")
    _choice("eval.engine", config.eval.engine, ("batched", "hf"))
    _positive("eval.batch_size", config.eval.batch_size)
    _positive("eval.limit", config.eval.limit, optional=True)
    if len(set(config.tasks)) != len(config.tasks):
        raise UserError(f"eval.tasks={config.eval.tasks} names a task twice")
    _choice("tracking.name", config.tracking.name, ("none", "wandb"))
    _choice("tracking.mode", config.tracking.mode, ("online", "offline"))


def short_name(model: str) -> str:
    """The last segment of a hub name, as folders and tables show it."""
    return model.rstrip("/").rpartition("/")[2]
