"""What a method may do around an optimizer step, outside the forward that CUDA graphs capture."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Tells the random numbers that a method starts from, from those that A is drawn from: both are of
# the run's seed.
START_STREAM = 2


def start_generator(seed: int) -> torch.Generator:
    """Of `Hooks.initialise`, on the CPU."""
    state = np.random.default_rng([seed, START_STREAM]).integers(2**63)
    return torch.Generator().manual_seed(int(state))


class Hooks:
    """Every hook does nothing by default; a method overrides those that it needs.

    The order of a step: gradients are summed over the processes; the gradient of `penalty` is
    added; `after_backward`; norm and clip; the optimizer's update; `after_update`; gradients are
    cleared. All processes call the hooks with the same values.
    """

    def initialise(self, parameters: Mapping[str, nn.Parameter], seed: int) -> None:
        """Draw the start of the parameters, where the method has one of its own.

        Called once, when fresh adapters are built. parameters: `<layer>.<role>` -> parameter. Draws
        come from `start_generator`, in the order of the names, so that they depend on neither
        device nor process.
        """

    def start(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        """Before the first step. parameters: `<layer>.<role>` -> parameter; steps: of training."""

    def penalty(self) -> Tensor | None:
        """A loss of the parameters alone, a scalar, whose gradient is added once a step."""
        return None

    def after_backward(self, step: int, choice: np.ndarray) -> None:
        """Called when the summed gradients are in `.grad`.

        choice: (samples,), the index of the diagonal that each sample had.
        """

    def after_update(self, step: int, lr: float) -> None:
        """The parameters are updated; the clipped gradients are still in `.grad`."""

    def importance(self) -> dict[str, Tensor]:
        """Layer -> (R,), how much each component matters; asked for when training has ended.

        It is saved with the adapter. Empty where the singular values tell.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed training continues bit for bit."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; called after `start`."""
