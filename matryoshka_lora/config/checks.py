"""Every check on the settings that needs neither model nor data."""

import sys
from collections.abc import Iterable

from matryoshka_lora.config.schema import (
    LARGEST,
    LARGEST_LR,
    LARGEST_RANK,
    Config,
    adapter_spec_of,
    build_method,
)
from matryoshka_lora.core.adapter import INITS
from matryoshka_lora.core.diagonals import SCALINGS, check_rank, check_train_ranks
from matryoshka_lora.core.errors import UserError, nearest
from matryoshka_lora.core.rules import RULES, rules_at


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
    except UserError as error:
        raise UserError(f"adapter.rank={adapter.rank}, adapter.train_ranks: {error}") from None
    _choice("adapter.scaling", adapter.scaling, SCALINGS)
    _choice("adapter.init", adapter.init, INITS)
    for key, dtype in (("adapter.dtype", adapter.dtype), ("model.dtype", config.model.dtype)):
        _choice(key, dtype, ("float32", "bfloat16"))
    _check_quantization(config)
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
    for key in ("max_steps", "micro_batch", "save_every", "validate_every"):
        _positive(f"trainer.{key}", getattr(trainer, key), optional=True)
    if not 0 <= trainer.rate * trainer.weight_decay <= 1:
        raise UserError(
            f"trainer.weight_decay={trainer.weight_decay} must be 0 or a positive number of at "
            f"most 1 / trainer.lr = {1 / trainer.rate:g}: a step takes their product off the "
            "factors"
        )
    _positive("dataset.max_length", config.dataset.max_length)
    for key in ("limit", "train_limit"):
        _positive(f"dataset.{key}", getattr(config.dataset, key), optional=True)
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
        except UserError as error:
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


def _check_quantization(config: Config) -> None:
    if config.model.quantization is None:
        return
    _choice("model.quantization", config.model.quantization, ("nf4", "int8"))
    asked = {
        "trainer.compile": config.trainer.compile,
        "trainer.cuda_graphs": config.trainer.cuda_graphs,
        "eval.cuda_graphs": config.eval.cuda_graphs,
    }
    if any(asked.values()):
        raise UserError(
            f"model.quantization={config.model.quantization}: its weights are dequantised in each "
            "forward, which is neither compiled nor captured; set "
            + " ".join(f"{key}=false" for key, given in asked.items() if given)
        )
