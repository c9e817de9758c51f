"""DyLoRA (arXiv 2210.07558): a rank for every step."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.layer import RANK_AXIS
from matryoshka_lora.methods.base import AdapterShape, Method, nothing_to_draw, register, setting
from matryoshka_lora.methods.hooks import Hooks
from matryoshka_lora.methods.prefixes import prefix_choices


@dataclass(frozen=True)
class Settings:
    draw: str = setting("step", "one rank per step, micro_batch or sample", idle=nothing_to_draw)
    independent: bool = setting(
        False,
        "draw the ranks of a step one by one (paper); false: stratified, each as often as its odds",
        later=True,
        idle=lambda shape, settings: (
            "method.draw=step draws one rank a step"
            if settings.draw == "step"
            else nothing_to_draw(shape, settings)
        ),
    )
    frozen: bool = setting(False, "update only the rows above the next smaller sub-rank")
    weights: list[float] | None = setting(
        None, "odds of each trained sub-rank; null: all alike", idle=nothing_to_draw
    )


@register(label="DyLoRA", colour="#E69F00", marker="s", order=1, settings=Settings)
def dylora(shape: AdapterShape, settings: Settings) -> Method:
    """p = prefix(r), r drawn from S for each step or micro-batch.

    frozen: with S = 1..R this is the official implementation, which trains the drawn row alone.
    """
    if settings.frozen and settings.draw != "step":
        raise UserError("method.frozen=true needs one rank a step: set method.draw=step")
    hooks = FrozenRows(shape.train_ranks) if settings.frozen else Hooks()
    method = prefix_choices(shape, settings.weights, settings.draw, hooks)
    return dataclasses.replace(method, independent=settings.independent)


class FrozenRows(Hooks):
    """Trains, at a drawn rank, only the rows beyond the next smaller sub-rank.

    The others keep their values and the optimizer's moments.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self._frozen: tuple[tuple[int, int | None], ...] = ()
        """Where frozen rows start and end; None is R."""
        self._kept: list[tuple[Tensor, Tensor]] = []
        """(a view of what the update may change in frozen rows, its values before)."""

    def start(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        self.parameters, self.optimizer = parameters, optimizer

    def after_backward(self, step: int, choice: np.ndarray) -> None:
        """Zero the frozen rows' gradients, and remember what the update must leave alone."""
        chosen = int(choice[0])
        start, end = self.ranks[chosen - 1] if chosen else 0, self.ranks[chosen]
        self._frozen = ((0, start), (end, None))
        self._kept = []
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            for part in self._parts(name, parameter.grad):
                part.zero_()
            self._kept += [(part, part.clone()) for part in self._parts(name, parameter.data)]
            for moment in self._moments(parameter):
                self._kept += [(part, part.clone()) for part in self._parts(name, moment)]

    def after_update(self, step: int, lr: float) -> None:
        """Put back what the update has changed in the frozen rows."""
        for part, before in self._kept:
            part.copy_(before)

    def _moments(self, parameter: nn.Parameter) -> list[Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]

    def _parts(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Views of the frozen rows of a tensor."""
        axis = RANK_AXIS[name.rpartition(".")[2]]
        size = tensor.shape[axis]
        return [
            tensor.narrow(axis, start, (size if end is None else end) - start)
            for start, end in self._frozen
        ]
