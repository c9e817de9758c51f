"""AdaLoRA (arXiv 2303.10512): learned singular values, of which fewer and fewer stay.

The update is `B diag(E alpha / (R + 1e-5)) A`, E being the layer's gate. As in PEFT's
implementation (https://github.com/huggingface/peft/tree/main/src/peft/tuners/adalora).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka_lora.core.diagonals import sub_rank_scale
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.layer import by_layer
from matryoshka_lora.methods.base import AdapterShape, Method, register, setting, single
from matryoshka_lora.methods.hooks import Hooks, start_generator

START_STD = 0.02
"""Deviation of the normal distribution that A and B start from; E starts at 0."""
EPSILON = 1e-5
"""PEFT divides by R plus this."""


def nothing_to_mask(shape: AdapterShape, settings: "Settings") -> str | None:
    """`idle` of a setting that says when components are masked."""
    if settings.target_rank < shape.rank:
        return None
    return f"method.target_rank={settings.target_rank} keeps all components"


@dataclass(frozen=True)
class Settings:
    target_rank: int = setting(8, "components a layer keeps on average at the end; R keeps all")
    warmup: float = setting(
        0.1, "share of the steps before the first component is masked", idle=nothing_to_mask
    )
    settle: float = setting(0.3, "share of the steps after the last one is")
    mask_every: int = setting(10, "steps between two maskings", idle=nothing_to_mask)
    orthogonality: float = setting(0.5, "weight of the penalty for A and B not orthogonal")
    beta1: float = setting(0.85, "smoothing of the sensitivity |w g|")
    beta2: float = setting(0.85, "smoothing of its uncertainty")


@register(
    label="AdaLoRA",
    colour="#882255",
    marker="v",
    order=5,
    settings=Settings,
    trains_sub_ranks=False,
)
def adalora(shape: AdapterShape, settings: Settings) -> Method:
    """p = E alpha / (R + 1e-5) with alpha = R s_R, in every step; E is masked on the way."""
    _check(shape, settings)
    alpha = shape.rank * sub_rank_scale(shape.rank, shape.scaling)
    p = torch.full((shape.rank,), alpha / (shape.rank + EPSILON), dtype=torch.float32)
    return single(p, gated=True, ordered=False, hooks=RankAllocator(settings))


def _check(shape: AdapterShape, settings: Settings) -> None:
    if not 1 <= settings.target_rank <= shape.rank:
        raise UserError(
            f"method.target_rank={settings.target_rank} must be 1 to adapter.rank={shape.rank}"
        )
    for name in ("warmup", "settle"):
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"method.{name}={getattr(settings, name)} must be in [0, 1)")
    if settings.warmup + settings.settle >= 1:
        raise UserError(
            f"method.warmup={settings.warmup} and method.settle={settings.settle} leave no steps "
            "to mask in; their sum must be below 1"
        )
    if settings.mask_every < 1:
        raise UserError(f"method.mask_every={settings.mask_every} must be at least 1")
    if not 0 <= settings.orthogonality < float("inf"):
        raise UserError(
            f"method.orthogonality={settings.orthogonality} must be 0 or a positive number"
        )
    for name in ("beta1", "beta2"):
        if not 0 < getattr(settings, name) < 1:
            raise UserError(f"method.{name}={getattr(settings, name)} must be in (0, 1)")


class RankAllocator(Hooks):
    """Scores every component (row of A, entry of E, column of B), and zeroes E of the least.

    Sensitivity I = |w g| of each weight, smoothed as M, and its uncertainty |I - M|, smoothed as U;
    a component's score is M U of its E, plus the means of M U over its row of A and column of B.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.mean: dict[str, Tensor] = {}
        """M by parameter."""
        self.uncertainty: dict[str, Tensor] = {}
        """U by parameter."""
        self.kept: dict[str, Tensor] = {}
        """Layer -> (R,) bool: what the last masking kept; final once masking has ended."""

    def initialise(self, parameters: Mapping[str, nn.Parameter], seed: int) -> None:
        generator = start_generator(seed)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name.endswith("lora_gate"):
                    parameter.zero_()
                else:
                    drawn = torch.empty(parameter.shape, dtype=torch.float32)
                    parameter.copy_(drawn.normal_(std=START_STD, generator=generator))

    def start(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        self.parameters = dict(parameters)
        self.layers = list(by_layer(parameters))
        self.first = round(self.settings.warmup * steps)
        # The last masking leaves what the target says, so there is one however few steps there are.
        self.last = min(steps - round(self.settings.settle * steps), steps - 1)
        self.mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.uncertainty = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def penalty(self) -> Tensor | None:
        """gamma * mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F."""
        if self.settings.orthogonality == 0:
            return None
        norms = []
        for name, factor in self.parameters.items():
            if not name.endswith("lora_gate"):
                gram = factor @ factor.T if name.endswith("lora_A") else factor.T @ factor
                identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                norms.append(torch.linalg.matrix_norm(gram - identity))
        return self.settings.orthogonality * torch.stack(norms).mean()

    @torch.no_grad()
    def after_update(self, step: int, lr: float) -> None:
        # The masking of the first step, where it is the last one, needs scores too.
        if step < max(self.last, 1):
            self._observe()
        budget = self.budget(step)
        if step > self.last:
            self._mask()
        elif step == self.last or (step > self.first and step % self.settings.mask_every == 0):
            self._allocate(budget)
            self._mask()

    def budget(self, step: int) -> int:
        """Components of all layers that may stay, falling with the cube of what is left."""
        whole = sum(len(self.parameters[f"{layer}.lora_gate"]) for layer in self.layers)
        target = self.settings.target_rank * len(self.layers)
        if step >= self.last:
            return target
        if step <= self.first:
            return whole
        left = 1 - (step - self.first) / (self.last - self.first)
        return int((whole - target) * left**3 + target)

    def scores(self) -> dict[str, Tensor]:
        """Layer -> (R,), the score of each component."""
        found = {}
        for layer in self.layers:
            A, B, E = (
                self.mean[f"{layer}.{role}"] * self.uncertainty[f"{layer}.{role}"]
                for role in ("lora_A", "lora_B", "lora_gate")
            )
            found[layer] = E + (A.mean(1) + B.mean(0))
        return found

    def importance(self) -> dict[str, Tensor]:
        """The scores at the end of masking; 0 for what was masked."""
        return {
            layer: score * self.kept.get(layer, torch.ones_like(score)).to(score)
            for layer, score in self.scores().items()
        }

    def _observe(self) -> None:
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            sensitivity = (parameter * parameter.grad).abs()
            mean, uncertainty = self.mean[name], self.uncertainty[name]
            mean.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
            uncertainty.mul_(beta2).add_((sensitivity - mean).abs(), alpha=1 - beta2)

    def _allocate(self, budget: int) -> None:
        scores = self.scores()
        every = torch.cat(list(scores.values()))
        masked = len(every) - budget
        if masked > 0:
            threshold = torch.kthvalue(every, masked).values
            self.kept = {layer: score > threshold for layer, score in scores.items()}

    def _mask(self) -> None:
        for layer, kept in self.kept.items():
            self.parameters[f"{layer}.lora_gate"].data.mul_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "uncertainty": self.uncertainty, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for own, saved in ((self.mean, state["mean"]), (self.uncertainty, state["uncertainty"])):
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        device = {layer: self.parameters[f"{layer}.lora_gate"].device for layer in self.layers}
        self.kept = {layer: kept.to(device[layer]) for layer, kept in state["kept"].items()}
