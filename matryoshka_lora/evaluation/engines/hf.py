"""The reference engine: lm-eval's own HF backend around the model in memory, point by point.

Slow and simple; every other engine must agree with it, and it with the harness's command line. In
half precision they agree only where all use the same attention kernel: see
`processes.make_accelerator`.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.core.adapter import diagonal
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.engines.protocol import Output, Outputs, Point, Request


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the length of a block; each module gets its own mode back."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def harness_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1
) -> HFLM:
    """The harness's view of `model`: tokenises, truncates and answers as `lm_eval --model hf` does.

    HFLM gives the tokenizer a pad token and switches the model to evaluation for good, so it gets a
    copy of the tokenizer, and the model's mode is restored. Log-probabilities are computed in
    float32 at least, because in bfloat16 different choices get the same one.
    """
    with evaluation_mode(model), _without_warnings("lm_eval.models.huggingface"):
        return HFLM(
            pretrained=model,
            # What is left to itself takes a decoder of an encoder-decoder's type for the whole.
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            softmax_dtype=torch.promote_types(model.dtype, torch.float32),
        )


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Silences the logger `name`: HFLM warns twice that it was given a loaded model."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


class HFEngine:
    """All requests of one kind at one point are one call, so batches are those of the harness.

    Raises UserError for a batch size below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        lockstep: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} is not positive")
        self.model, self.batch_size, self.lockstep = model, batch_size, lockstep
        self.lm = harness_lm(model, tokenizer, batch_size)

    def run(
        self, jobs: Sequence[tuple[Point, Request]], parts: Iterator[range] | None = None
    ) -> Outputs:
        """See `Engine.run`; answers come when all requests of a kind at a point are done."""
        taken: list[int] = []
        for part in [range(len(jobs))] if parts is None else parts:
            taken += part
            if parts is None or len(taken) >= self.batch_size:
                yield from self._answer(jobs, taken)
                taken = []
        yield from self._answer(jobs, taken)

    @torch.no_grad()
    def _answer(self, jobs: Sequence[tuple[Point, Request]], taken: Sequence[int]) -> Outputs:
        """taken: indices of the jobs to answer."""
        calls: dict[tuple[Point, str], list[int]] = {}
        for index in taken:
            point, request = jobs[index]
            calls.setdefault((point, request.kind), []).append(index)
        for (point, kind), indices in calls.items():
            instances = [jobs[index][1].instance for index in indices]
            with evaluation_mode(self.model), diagonal(self.model, point.p):
                if kind == "generate":
                    texts = self.lm.generate_until(instances, disable_tqdm=True)
                    outputs = [Output(text=text) for text in texts]
                else:
                    answers = self.lm.loglikelihood(instances, disable_tqdm=True)
                    outputs = [Output(logprob=value, is_greedy=best) for value, best in answers]
            yield from zip(indices, outputs, strict=True)
