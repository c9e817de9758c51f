"""Nested MatryoshkaLoRA with ideas for its low ranks, each a setting that is off by default.

An experiment: what pays moves into `nested_matryoshka`, the rest is deleted with this file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matryoshka_lora.core.adapter import principal_factors
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.layer import RANK_AXIS, by_layer
from matryoshka_lora.methods.base import (
    AdapterShape,
    Method,
    check_weights,
    register,
    setting,
)
from matryoshka_lora.methods.hooks import Hooks
from matryoshka_lora.methods.nested_matryoshka import Settings as NestedSettings
from matryoshka_lora.methods.nested_matryoshka import nested_matryoshka


@dataclass(frozen=True)
class Settings(NestedSettings):
    weights_end: list[float] | None = setting(None, "odds at the end of training; null: weights")
    weights_hold: float = setting(0.0, "share of the steps after which the odds begin to move")
    row_rate_a: float = setting(0.0, "row i of A has (R/i)^row_rate_a times the rate")
    row_rate_b: float = setting(0.0, "column i of B has (R/i)^row_rate_b times the rate")
    b_ratio: float = setting(1.0, "B has b_ratio times the rate of A (LoRA+, arXiv 2402.12354)")
    hold: float = setting(0.0, "share of the steps before the rate begins to fall")
    warm_steps: int = setting(0, "steps in which the rate rises, after each start")
    average: float = setting(0.0, "share of the last steps whose mean factors are the adapter")
    high_decay: float = setting(0.0, "weight decay of component R; of i: (i-1)/(R-1) of it")
    clip_blocks: float | None = setting(
        None, "largest gradient norm of each block of rows between two sub-ranks"
    )
    adam_beta2: float = setting(0.999, "AdamW's, of the second moment")
    lora_share: float = setting(0.0, "share of the first steps that train LoRA, then put in order")
    gradient_start: int = setting(
        0, "steps, twice, that only look at gradients: A starts as their singular directions"
    )


@register(label="nested trials", colour="#882255", marker="p", order=7, settings=Settings)
def nested_trials(shape: AdapterShape, settings: Settings) -> Method:
    """`nested_matryoshka`, changed as the settings say. Raises UserError for wrong ones."""
    for name, least, most in (
        *((name, 0.0, 1.0) for name in ("weights_hold", "hold", "average", "lora_share")),
        *(("adam_beta2", 0.0, 0.99999), ("b_ratio", 1e-3, 1e3)),
        *((name, -4.0, 4.0) for name in ("row_rate_a", "row_rate_b")),
        *(("warm_steps", 0, 10**6), ("gradient_start", 0, 10**6), ("high_decay", 0.0, 1e3)),
    ):
        if not least <= getattr(settings, name) <= most:
            given = getattr(settings, name)
            raise UserError(f"method.{name}={given} must be from {least:g} to {most:g}")
    if settings.clip_blocks is not None and not settings.clip_blocks > 0:
        raise UserError(f"method.clip_blocks={settings.clip_blocks} must be positive, or null")
    if settings.lora_share and settings.gradient_start:
        raise UserError("method.gradient_start and method.lora_share are two starts: choose one")
    nested = nested_matryoshka(shape, settings)
    ends = nested.weights if settings.weights_end is None else tuple(settings.weights_end)
    assert nested.weights is not None and ends is not None
    check_weights(ends, nested.ranks)
    hooks = Trials(settings, shape.train_ranks, nested.p_full, np.array([nested.weights, ends]))
    fields = {f.name: getattr(nested, f.name) for f in dataclasses.fields(Method)}
    if hooks.has_start:
        # A further choice that no sample draws: LoRA's own diagonal.
        fields["diagonals"] = torch.cat([nested.diagonals, torch.ones(1, shape.rank)])
        fields["ranks"] = (*nested.ranks, shape.rank)
        fields["weights"] = (*nested.weights, 0.0)
    return Trial(**fields | {"hooks": hooks}, nested=nested, trials=hooks)


@dataclass(frozen=True, eq=False)
class Trial(Method):
    """Draws from `nested` with the odds of the step; before that, the start has LoRA's diagonal."""

    nested: Method = field(kw_only=True)
    trials: "Trials" = field(kw_only=True)

    def choose(self, seed: int, step: int, samples: int, micro_batch: int | None) -> np.ndarray:
        if step < self.trials.start_steps:
            return np.full(samples, len(self.ranks) - 1)
        odds = self.trials.odds(step)
        nested = self.nested if odds is None else dataclasses.replace(self.nested, weights=odds)
        return nested.choose(seed, step, samples, micro_batch)


class Trials(Hooks):
    """All that happens around a step. Everything is updated in place, as CUDA graphs need it."""

    def __init__(
        self, settings: Settings, ranks: tuple[int, ...], p_full: Tensor, odds: np.ndarray
    ) -> None:
        """odds: (2, len(ranks)), in the first and in the last step."""
        self.settings, self.ranks, self.p_full = settings, ranks, p_full
        self._odds = odds / odds.sum(axis=1, keepdims=True)
        self.has_start = bool(settings.lora_share or settings.gradient_start)
        self.moves = bool((self._odds[0] != self._odds[1]).any())
        self.steps = 0
        """Of training; known when it starts."""
        self.start_steps = 0
        """Steps before ranks are drawn."""

    def odds(self, step: int) -> tuple[float, ...] | None:
        """Of the ranks of S in a step; None: the method's own, in every step."""
        if not self.moves:
            return None
        first = self.settings.weights_hold * (self.steps - 1)
        moved = (step - first) / max(self.steps - 1 - first, 1)
        share = min(max(moved, 0.0), 1.0)
        return tuple((1 - share) * self._odds[0] + share * self._odds[1])

    def rate(self, step: int) -> float:
        """What the loop's rate, 1 - step / steps of the peak, is multiplied by."""
        s, wanted = self.settings, 1.0
        if s.hold:
            left = 1 - step / self.steps
            wanted = 1 / max(left, 1 - s.hold)
        since = step - self.start_steps * (step >= self.start_steps)
        return wanted * min(1.0, (since + 1) / (s.warm_steps + 1))

    def start(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        s = self.settings
        self.parameters, self.optimizer, self.steps = dict(parameters), optimizer, steps
        self.tensors = [parameter.data for parameter in parameters.values()]
        self.start_steps = (
            round(s.lora_share * steps) if s.lora_share else min(2 * s.gradient_start, steps)
        )
        for group in optimizer.param_groups:
            group["betas"] = (group["betas"][0], s.adam_beta2)
        places = torch.arange(1, len(self.p_full) + 1, dtype=torch.float32)
        powers = {"lora_A": s.row_rate_a, "lora_B": s.row_rate_b}
        ratios = {"lora_A": 1.0, "lora_B": s.b_ratio}
        self.by_row = bool(s.row_rate_a or s.row_rate_b or s.b_ratio != 1)
        # Of the parameters' full shapes, so that one kernel takes many of them.
        self.row_rates = (
            self._like_rows(lambda role: ratios[role] * (places[-1] / places) ** powers[role])
            if self.by_row
            else []
        )
        self.decays = (
            self._like_rows(lambda role: (places - 1) / max(len(places) - 1, 1))
            if s.high_decay
            else []
        )
        self.undoes = bool(self.by_row or s.hold or s.warm_steps or s.gradient_start)
        self.before = [t.clone() for t in self.tensors] if self.undoes else []
        self.averaged = round(s.average * steps)
        self.total = [torch.zeros_like(t) for t in self.tensors] if self.averaged else []
        looks = self.start_steps and s.gradient_start
        self.seen = [torch.zeros_like(t) for t in self.tensors] if looks else []
        self.norm = torch.zeros(len(by_layer(self.parameters)))
        """The mean length of a row of each layer's first A, from the middle of a gradient start."""

    def _like_rows(self, values: Callable[[str], Tensor]) -> list[Tensor]:
        """Role -> (R,), as a tensor of each parameter's own shape."""
        found = []
        for name, parameter in self.parameters.items():
            role = name.rpartition(".")[2]
            shape = [1, 1]
            shape[RANK_AXIS[role]] = -1
            full = values(role).to(parameter).view(shape).expand(parameter.shape)
            found.append(full.contiguous())
        return found

    @torch.no_grad()
    def after_backward(self, step: int, choice: np.ndarray) -> None:
        if self.undoes:
            torch._foreach_copy_(self.before, self.tensors)
        if self._looks(step):
            for seen, parameter in zip(self.seen, self.parameters.values(), strict=True):
                assert parameter.grad is not None
                seen += parameter.grad
        elif self.settings.clip_blocks is not None:
            self._clip_blocks(self.settings.clip_blocks)

    @torch.no_grad()
    def after_update(self, step: int, lr: float) -> None:
        if self._looks(step):
            torch._foreach_copy_(self.tensors, self.before)
            self._end_of_looking(step)
            return
        if self.undoes:
            torch._foreach_sub_(self.tensors, self.before)
            if self.by_row:
                torch._foreach_mul_(self.tensors, self.row_rates)
            torch._foreach_mul_(self.tensors, self.rate(step))
            torch._foreach_add_(self.tensors, self.before)
        if self.decays:
            factor = -lr * self.rate(step) * self.settings.high_decay
            torch._foreach_addcmul_(self.tensors, self.tensors, self.decays, value=factor)
        if step == self.start_steps - 1:
            self._put_in_order()
        if step >= self.steps - self.averaged:
            torch._foreach_add_(self.total, self.tensors)
            if step == self.steps - 1:
                torch._foreach_copy_(self.tensors, self.total)
                torch._foreach_div_(self.tensors, float(self.averaged))

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "seen": self.seen, "norm": self.norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for own, saved in (
            *zip(self.total, state["total"], strict=True),
            *zip(self.seen, state["seen"], strict=True),
            (self.norm, state["norm"]),
        ):
            own.copy_(saved)

    def _looks(self, step: int) -> bool:
        """Whether the step only looks at gradients and changes nothing."""
        return bool(self.settings.gradient_start) and step < self.start_steps

    def _end_of_looking(self, step: int) -> None:
        """Subspace iteration on each layer's mean gradient G (out, in), with p = 1.

        With B = 0 the gradient of B is G A^T, from whose range U is taken; with A = 0 and B = U
        that of A is U^T G, whose right singular vectors are the best directions of a first step.
        The function is the base model's all the while.
        """
        seen = by_layer(dict(zip(self.parameters, self.seen, strict=True)))
        half = min(self.settings.gradient_start, self.start_steps) - 1
        for number, (layer, own) in enumerate(by_layer(self.parameters).items()):
            A, B = own["lora_A"], own["lora_B"]
            if step == half:
                self.norm[number] = A.norm(dim=1).mean()
                U, _ = torch.linalg.qr(seen[layer]["lora_B"].double())
                A.zero_()
                B.zero_()
                B[:, : U.shape[1]] = U.to(B)
            elif step == self.start_steps - 1:
                _, _, vh = torch.linalg.svd(seen[layer]["lora_A"].double(), full_matrices=False)
                B.zero_()
                A.zero_()
                A[: len(vh)] = (vh * self.norm[number].item()).to(A)
        if step in (half, self.start_steps - 1):
            torch._foreach_zero_(self.seen)
            self._forget_moments()

    def _put_in_order(self) -> None:
        """LoRA's factors as the SVD of the same update, between which P stands."""
        root = self.p_full.sqrt()
        for own in by_layer(self.parameters).values():
            A, B = own["lora_A"], own["lora_B"]
            sorted_A, sorted_B = principal_factors(A, B, torch.ones_like(root).to(A.device))
            A.copy_(sorted_A / root.to(A)[:, None])
            B.copy_(sorted_B / root.to(B))
        self._forget_moments()

    def _forget_moments(self) -> None:
        for state in self.optimizer.state.values():
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[name].zero_()

    def _clip_blocks(self, largest: float) -> None:
        """Scale each block of rows, over all parameters, to a norm of at most `largest`."""
        grads: list[Tensor] = []
        norms = []
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            # The rank in front, whichever axis it is.
            grads.append(parameter.grad.movedim(RANK_AXIS[name.rpartition(".")[2]], 0))
            norms.append(torch.linalg.vector_norm(grads[-1], dim=1))
        square = torch.stack(norms).square().sum(0)
        scale = torch.ones_like(square)
        for first, end in zip((0, *self.ranks), self.ranks, strict=False):
            scale[first:end] = (largest / (square[first:end].sum().sqrt() + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale[:, None])
