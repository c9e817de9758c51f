"""The training methods: each is a choice of the diagonal between the LoRA factors.

To add one, write a function here, mark it `@method`, and add `configs/method/<name>.yaml`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matryoshka_lora.config import Config
from matryoshka_lora.core.adapter import AdapterSpec
from matryoshka_lora.core.diagonals import lora_diagonal, matryoshka_diagonal, prefix_diagonal
from matryoshka_lora.core.errors import nearest

# Tells the random stream of the ranks from that of the batch order.
RANK_STREAM = 1


@dataclass(frozen=True)
class Method:
    """The diagonals that training chooses from, and how it chooses."""

    diagonals: Tensor
    """(K, R) float32: the choices."""
    ranks: tuple[int, ...]
    """The rank that each choice reads, length K: what the log shows."""
    p_full: Tensor
    """(R,) float32: the method's diagonal at full rank."""
    weights: tuple[float, ...] = (1.0,)
    """The odds of each choice, length K."""
    draw: str = "step"
    """What shares one choice: an optimizer step, a micro-batch or a single sample."""
    frozen: bool = False
    """Update only the rows that the drawn rank has beyond the next smaller one."""
    trains_prefixes: bool = False
    """Whether the choices are prefix diagonals, so that training and `prefix` inference agree."""

    def choose(self, seed: int, step: int, samples: int, micro_batch: int | None) -> np.ndarray:
        """The choice of each sample of an effective batch: indices into diagonals, (samples,).

        A pure function of its arguments, so it does not depend on how processes and forwards cut
        the batch. Systematic sampling on the weights, then shuffled: the counts of the draws of a
        step differ from their expectation by less than one.
        """
        if len(self.ranks) == 1:
            return np.zeros(samples, dtype=np.int64)
        group = {"step": samples, "micro_batch": micro_batch, "sample": 1}[self.draw]
        assert group is not None, "checked by config.validate"
        draws = -(-samples // group)
        generator = np.random.default_rng([seed, step, RANK_STREAM])
        points = (np.arange(draws) + generator.random()) / draws
        odds = np.cumsum(self.weights) / np.sum(self.weights)
        chosen = generator.permutation(np.searchsorted(odds, points, side="right"))
        return np.repeat(np.minimum(chosen, len(self.ranks) - 1), group)[:samples]


MethodFunction = Callable[[Config], Method]
METHODS: dict[str, MethodFunction] = {}


def method(function: MethodFunction) -> MethodFunction:
    """Make a function from the config to a `Method` selectable as `method.name`."""
    METHODS[function.__name__] = function
    return function


def build_method(config: Config) -> Method:
    """The method that the config names. Raises ValueError for an unknown name."""
    name = config.method.name
    if name not in METHODS:
        raise ValueError(
            f"method.name={name} is unknown; allowed: {', '.join(METHODS)}{nearest(name, METHODS)}"
        )
    return METHODS[name](config)


def adapter_spec_of(config: Config) -> AdapterSpec:
    """What reading the trained adapter at a sub-rank needs to know."""
    chosen = build_method(config)
    return AdapterSpec(
        rank=config.adapter.rank,
        scaling=config.adapter.scaling,
        p_full=tuple(chosen.p_full.tolist()),
        trains_prefixes=chosen.trains_prefixes,
    )


def _single(p: Tensor) -> Method:
    return Method(diagonals=p[None], ranks=(len(p),), p_full=p)


def _prefixes(config: Config, draw: str, frozen: bool = False) -> Method:
    max_rank, scaling, ranks = config.adapter.rank, config.adapter.scaling, config.train_ranks
    weights: Sequence[float] = config.method.weights or [1.0] * len(ranks)
    return Method(
        diagonals=torch.stack([prefix_diagonal(r, max_rank, scaling) for r in ranks]),
        ranks=tuple(ranks),
        p_full=prefix_diagonal(max_rank, max_rank, scaling),
        weights=tuple(weights),
        draw=draw,
        frozen=frozen,
        trains_prefixes=True,
    )


@method
def lora(config: Config) -> Method:
    """p = s_R in every step (arXiv 2106.09685; with scaling=sqrt rsLoRA, arXiv 2312.03732)."""
    return _single(lora_diagonal(config.adapter.rank, config.adapter.scaling))


@method
def matryoshka(config: Config) -> Method:
    """p = the sum (or mean) of the prefix diagonals of S: Algorithm 1 of arXiv 2605.07850."""
    p = matryoshka_diagonal(config.train_ranks, config.adapter.rank, config.adapter.scaling)
    return _single(p / len(config.train_ranks) if config.method.normalise == "mean" else p)


@method
def dylora(config: Config) -> Method:
    """p = prefix(r), r drawn from S for each step or micro-batch (arXiv 2210.07558)."""
    return _prefixes(config, config.method.draw, config.method.frozen)


@method
def nested_dropout(config: Config) -> Method:
    """p = prefix(r), r drawn from S for each sample (nested dropout: arXiv 1402.0915)."""
    return _prefixes(config, "sample")
