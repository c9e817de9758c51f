"""The adapter's parameters as the batched engine computes with them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from matryoshka_lora.core.adapter import adapter_layers, layer_parameters
from matryoshka_lora.core.layer import RANK_AXIS, AdapterLinear


class ComputeFactors:
    """The parameters of all adapter layers, which can be narrowed to their leading ranks.

    Factors are in the dtype of the computation, so that no forward casts them; they are rounded
    where the layer would round them. A gate keeps its dtype: the layer multiplies it by the
    diagonal before it rounds.
    """

    def __init__(self, layers: Sequence[AdapterLinear], dtype: torch.dtype) -> None:
        self.layers = layers
        found = [
            (parameter, role)
            for layer in layers
            for role, parameter in layer_parameters(layer).items()
        ]
        self.gated = any(role == "lora_gate" for _, role in found)
        """Whether some layer multiplies its diagonal by a gate."""
        self._axes = [(parameter, RANK_AXIS[role]) for parameter, role in found]
        self._before = [parameter.data for parameter, _ in found]
        self._whole = [
            parameter.data if role == "lora_gate" else parameter.data.to(dtype)
            for parameter, role in found
        ]
        self._rank: int | None = None
        """To which the parameters are narrowed now."""

    def narrow(self, rank: int) -> None:
        """Leave all but the first `rank` ranks out of the layers' parameters.

        The parameters become views, so that captured CUDA graphs find them where they were.
        """
        if rank == self._rank:
            return
        for (parameter, axis), whole in zip(self._axes, self._whole, strict=True):
            parameter.data = whole.narrow(axis, 0, rank)
        self._rank = rank

    def widen(self) -> None:
        """All ranks again."""
        for (parameter, _), whole in zip(self._axes, self._whole, strict=True):
            parameter.data = whole
        self._rank = None

    def restore(self) -> None:
        """Give the layers the parameters that they had before."""
        for (parameter, _), data in zip(self._axes, self._before, strict=True):
            parameter.data = data


@contextmanager
def compute_factors(model: PreTrainedModel) -> Iterator[ComputeFactors]:
    """`ComputeFactors` for a block, after which factors and diagonals are as they were."""
    layers = list(adapter_layers(model).values())
    diagonals = [layer.p for layer in layers]
    factors = ComputeFactors(layers, model.dtype)
    try:
        factors.widen()
        yield factors
    finally:
        factors.restore()
        for layer, p in zip(layers, diagonals, strict=True):
            layer.p = p
