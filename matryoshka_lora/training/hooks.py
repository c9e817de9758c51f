"""What a method may do around an optimizer step, outside the captured forward."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matryoshka_lora.methods import Method
from matryoshka_lora.training.gradients import RANK_AXIS


class Hooks:
    """Does nothing; a method that does something overrides what it needs."""

    def start(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        """Before the first step. parameters: `<layer>.<role>` -> parameter; steps: of training."""

    def penalty(self) -> Tensor | None:
        """A loss of the parameters alone, a scalar, whose gradient is added once a step."""
        return None

    def after_backward(self, step: int, choice: np.ndarray) -> None:
        """The summed gradients stand. choice: (samples,), the diagonal that each sample had."""

    def after_update(self, step: int, lr: float) -> None:
        """The parameters are updated; the clipped gradients still stand."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed training goes on with the same bits."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; called after `start`."""


class FrozenRows(Hooks):
    """At a drawn rank, updates only the components beyond the next smaller sub-rank.

    All others keep their values and the optimizer's moments. ranks: the sub-ranks, ascending.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self._frozen: list[Tensor] = []
        self._before: list[Tensor] = []

    def start(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        self.parameters, self.optimizer = parameters, optimizer

    def after_backward(self, step: int, choice: np.ndarray) -> None:
        """Zero the frozen gradients and remember what the update must not change."""
        chosen = choice[0]
        start, end = (self.ranks[chosen - 1] if chosen else 0), self.ranks[chosen]
        self._frozen = []
        for name, parameter in self.parameters.items():
            axis = RANK_AXIS[name.rpartition(".")[2]]
            size = parameter.shape[axis]
            outside = [(0, start), (end, size - end)]
            # In the first step there are no moments yet; a zero gradient leaves them at zero.
            state = self.optimizer.state.get(parameter, {})
            moments = [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]
            assert parameter.grad is not None, name
            for first, length in outside:
                parameter.grad.narrow(axis, first, length).zero_()
                self._frozen += [
                    tensor.narrow(axis, first, length) for tensor in (parameter.data, *moments)
                ]
        self._before = [tensor.clone() for tensor in self._frozen]

    def after_update(self, step: int, lr: float) -> None:
        """Put back what the update changed."""
        torch._foreach_copy_(self._frozen, self._before)


def hooks_of(method: Method) -> Hooks:
    return FrozenRows(method.ranks) if method.frozen else Hooks()
