"""SoRA (arXiv 2311.11696): a learned gate on the diagonal that a proximal step makes sparse."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matryoshka_lora.core.diagonals import lora_diagonal
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.layer import by_layer
from matryoshka_lora.methods.base import AdapterShape, Method, register, setting, single
from matryoshka_lora.methods.hooks import Hooks, start_generator


@dataclass(frozen=True)
class Settings:
    sparsity: float = setting(0.1, "lambda: how fast small gates shrink to 0, a step of size lr")


@register(
    label="SoRA", colour="#117733", marker="X", order=6, settings=Settings, trains_sub_ranks=False
)
def sora(shape: AdapterShape, settings: Settings) -> Method:
    """p = s_R g in every step, g learned and soft-thresholded after each update."""
    if not 0 <= settings.sparsity < float("inf"):
        raise UserError(f"method.sparsity={settings.sparsity} must be 0 or a positive number")
    p = lora_diagonal(shape.rank, shape.scaling)
    return single(p, gated=True, ordered=False, hooks=SoftThreshold(settings.sparsity))


class SoftThreshold(Hooks):
    """g ~ N(0, 1) at the start; g <- sign(g) max(|g| - lr lambda, 0) after each update."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def initialise(self, parameters: Mapping[str, nn.Parameter], seed: int) -> None:
        generator = start_generator(seed)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name.endswith("lora_gate"):
                    drawn = torch.empty(parameter.shape, dtype=torch.float32)
                    parameter.copy_(drawn.normal_(generator=generator))

    def start(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        self.parameters = dict(parameters)

    @torch.no_grad()
    def after_update(self, step: int, lr: float) -> None:
        for name, gate in self.parameters.items():
            if name.endswith("lora_gate"):
                gate.copy_(nn.functional.softshrink(gate, lr * self.sparsity))

    @torch.no_grad()
    def importance(self) -> dict[str, Tensor]:
        """|g_i| ||a_i|| ||b_i|| of each component, in float32 whatever the factors are in."""
        return {
            layer: own["lora_gate"].abs()
            * own["lora_A"].float().norm(dim=1)
            * own["lora_B"].float().norm(dim=0)
            for layer, own in by_layer(self.parameters).items()
        }
