"""What a training method is, and the registry that everything else asks about methods."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matryoshka_lora.core.adapter import adapter_parameters, add_adapters
from matryoshka_lora.core.diagonals import check_rank, check_train_ranks, powers_of_two
from matryoshka_lora.core.errors import UserError, nearest
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.methods.hooks import Hooks

# Keeps the random stream of the ranks apart from that of the batch order.
RANK_STREAM = 1
DRAWS = ("step", "micro_batch", "sample")


def setting(
    default: Any,
    help: str,
    *,
    later: bool = False,
    idle: Callable[["AdapterShape", Any], str | None] = lambda shape, settings: None,
) -> Any:
    """A field of a method's settings, with its meaning, which `python train.py --help` shows.

    later: it came when there were runs of the method; see `config.setting`. idle: why it cannot
    change anything beside the method's other settings; None where it can.
    """
    metadata = {"help": help, "later": later, "idle": idle}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def nothing_to_draw(shape: "AdapterShape", settings: Any) -> str | None:
    """`idle` of a setting that says how several trained sub-ranks are drawn or put together."""
    if len(shape.train_ranks) > 1:
        return None
    return f"there is one trained sub-rank, {shape.train_ranks[0]}"


@dataclass(frozen=True)
class NoSettings:
    """For a method without settings."""


@dataclass(frozen=True)
class AdapterShape:
    """What a method is told of the adapter: R, S and the scaling s_r."""

    rank: int
    train_ranks: tuple[int, ...]
    scaling: str

    def __post_init__(self) -> None:
        check_train_ranks(self.train_ranks, self.rank)


@dataclass(frozen=True, eq=False)
class Method:
    """What training asks: the diagonals to choose from, how to choose, and hooks around a step.

    Raises UserError where the fields do not fit each other.
    """

    diagonals: Tensor
    """(K, R) float32: the choices."""
    ranks: tuple[int, ...]
    """The rank of each choice, length K; only shown in the log."""
    p_full: Tensor
    """(R,) float32: the method's diagonal at full rank."""
    weights: tuple[float, ...] | None = None
    """The odds of each choice, length K; None: all alike."""
    draw: str = "step"
    """How long one choice holds: for a whole step, a micro-batch or one sample."""
    independent: bool = False
    """Whether the draws of a step know nothing of each other; else they are stratified."""
    trains_prefixes: bool = False
    """Whether the choices are prefix diagonals, so that training and `prefix` inference agree."""
    gated: bool = False
    """Whether each layer learns a vector (R,) that multiplies its diagonal."""
    ordered: bool = True
    """Whether training leaves the components in the order of rank, so that prefixes are read."""
    hooks: Hooks = field(default_factory=Hooks)

    def __post_init__(self) -> None:
        if self.diagonals.dim() != 2 or self.p_full.shape != self.diagonals.shape[1:]:
            raise UserError(
                f"a method's diagonals must be (K, R) and p_full (R,), got "
                f"{tuple(self.diagonals.shape)} and {tuple(self.p_full.shape)}"
            )
        if not (self.diagonals.isfinite().all() and self.p_full.isfinite().all()):
            raise UserError("a method's diagonals hold numbers that are not finite")
        if len(self.ranks) != len(self.diagonals):
            raise UserError(
                f"a method has {len(self.diagonals)} diagonals, but ranks for {len(self.ranks)}"
            )
        if self.weights is not None:
            check_weights(self.weights, self.ranks)
        if self.draw not in DRAWS:
            raise UserError(
                f"method.draw={self.draw} is unknown; allowed: {', '.join(DRAWS)}"
                f"{nearest(self.draw, DRAWS)}"
            )

    def fingerprint(self) -> str:
        """Changes with any diagonal, its odds, and how long a choice holds; not with the hooks."""
        parts = (self.diagonals.tolist(), self.p_full.tolist(), self.ranks, self.weights, self.draw)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def choose(self, seed: int, step: int, samples: int, micro_batch: int | None) -> np.ndarray:
        """The choice of each sample of an effective batch: indices into diagonals, (samples,).

        A pure function of its arguments, so it does not depend on how processes and forwards split
        the batch. Systematic sampling on the weights, then shuffled: the counts of the draws of a
        step differ from their expectation by less than one. Not so where they are `independent`.
        """
        if len(self.ranks) == 1:
            return np.zeros(samples, dtype=np.int64)
        share = {"step": samples, "micro_batch": micro_batch, "sample": 1}[self.draw]
        assert share is not None, "checked by config.validate"
        draws = -(-samples // share)
        generator = np.random.default_rng([seed, step, RANK_STREAM])
        if self.independent:
            points = generator.random(draws)
        else:
            points = (np.arange(draws) + generator.random()) / draws
        weights = np.ones(len(self.ranks)) if self.weights is None else self.weights
        odds = np.cumsum(weights) / np.sum(weights)
        chosen = generator.permutation(np.searchsorted(odds, points, side="right"))
        return np.repeat(np.minimum(chosen, len(self.ranks) - 1), share)[:samples]


Build = Callable[[AdapterShape, Any], Method]


@dataclass(frozen=True)
class MethodInfo:
    """A registered method: what commands, reports and grids need to know of it."""

    name: str
    build: Build
    settings: type
    """A dataclass of `setting` fields: the keys of `method` in the config that it reads."""
    label: str
    """As tables and legends show it."""
    colour: str
    """Of its curves, `#rrggbb`."""
    marker: str
    """Of its points, one of matplotlib's."""
    order: int
    """Its place among the rows of a table."""
    baseline: bool
    """Whether it is a baseline that trains rank R alone. Its runs at a smaller R are the dedicated
    runs, and tables give differences from its SVD."""
    trains_sub_ranks: bool
    """Whether it uses S, the trained sub-ranks."""
    trained: bool
    """Whether runs train it; the adapters of any other come from elsewhere."""

    def spec(self, shape: AdapterShape, method: Method) -> AdapterSpec:
        """What reading an adapter of this method needs to know."""
        return AdapterSpec(
            rank=shape.rank,
            scaling=shape.scaling,
            p_full=tuple(method.p_full.tolist()),
            trains_prefixes=method.trains_prefixes,
            method=self.name,
            train_ranks=shape.train_ranks if self.trains_sub_ranks else (),
            gated=method.gated,
            ordered=method.ordered,
        )


METHODS: dict[str, MethodInfo] = {}
"""By name, in the order of tables."""


def register(
    *,
    label: str,
    colour: str,
    marker: str,
    order: int,
    settings: type = NoSettings,
    baseline: bool = False,
    trains_sub_ranks: bool = True,
    trained: bool = True,
) -> Callable[[Build], Build]:
    """Make a function of the adapter's shape and the method's settings selectable by its name."""

    def add(function: Build) -> Build:
        name = function.__name__
        for setting_field in dataclasses.fields(settings):
            for other in METHODS.values():
                for theirs in dataclasses.fields(other.settings):
                    same = (theirs.type, theirs.default) == (
                        setting_field.type,
                        setting_field.default,
                    )
                    assert theirs.name != setting_field.name or same, (
                        f"method.{theirs.name} means one thing to {other.name}, another to {name}"
                    )
        METHODS[name] = MethodInfo(
            name=name,
            build=function,
            settings=settings,
            label=label,
            colour=colour,
            marker=marker,
            order=order,
            baseline=baseline,
            trains_sub_ranks=trains_sub_ranks,
            trained=trained,
        )
        return function

    return add


def get(name: str) -> MethodInfo:
    """The method of that name. Raises UserError, with the nearest names, if there is none."""
    if name not in METHODS:
        raise UserError(
            f"method.name={name} is unknown; allowed: {', '.join(METHODS)}{nearest(name, METHODS)}"
        )
    return METHODS[name]


def label(name: str) -> str:
    """How tables show a method; its name, where a record is of a method that is not known here."""
    return METHODS[name].label if name in METHODS else name


def check_weights(weights: tuple[float, ...], ranks: tuple[int, ...]) -> None:
    """Raises UserError unless there is a weight >= 0 for each rank, and one above 0."""
    if len(weights) != len(ranks):
        raise UserError(
            f"method.weights has {len(weights)} values for the {len(ranks)} trained sub-ranks "
            f"{list(ranks)}"
        )
    if not all(0 <= w < float("inf") for w in weights) or sum(weights) <= 0:
        raise UserError(f"method.weights={list(weights)} must be >= 0 with a positive sum")


def single(p: Tensor, **fields: Any) -> Method:
    """A method that trains with one diagonal p (R,) in every step."""
    return Method(diagonals=p[None], ranks=(len(p),), p_full=p, **fields)


def add_method(
    model: nn.Module,
    name: str,
    targets: Sequence[str],
    *,
    rank: int,
    train_ranks: Sequence[int] | None = None,
    scaling: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    without: Sequence[str] = (),
    **settings: Any,
) -> Method:
    """Adapt a model for a method, without a config; returns what its training has to ask.

    train_ranks: S; None: the powers of two up to R. settings: the method's own, such as `weights`.
    The others are those of `add_adapters`. Raises UserError for an unknown method or setting, and
    where either does not fit.
    """
    info = get(name)
    known = [field.name for field in dataclasses.fields(info.settings)]
    if unknown := [setting for setting in settings if setting not in known]:
        raise UserError(
            f"method {name} has no setting {unknown[0]}; it has: {', '.join(known) or 'none'}"
            f"{nearest(unknown[0], known)}"
        )
    check_rank(rank, rank)
    ranks = tuple(powers_of_two(rank) if train_ranks is None else train_ranks)
    shape = AdapterShape(rank, ranks, scaling)
    method = info.build(shape, info.settings(**settings))
    add_adapters(model, info.spec(shape, method), targets, dtype=dtype, seed=seed, without=without)
    method.hooks.initialise(adapter_parameters(model), seed)
    return method
