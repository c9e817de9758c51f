"""The batched engine: all points of a sweep answered together, each answer with its own diagonal.

Contexts are prefilled as one packed sequence after another, without padding and with logits only
where they are read; a context that several requests of a point share is computed once. Answers are
then decoded greedily, all rows of the KV cache together, one token a decode step; answers that are
complete make room for waiting ones. The host reads new tokens every few steps only, and while the
device works on the next ones: tokens past the end of an answer are dropped when they are read.

The answers are those of lm-eval's HF backend at batch size 1 (its larger batches end an answer
later, which matters only where a stop string crosses another or is a special token).
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.core.adapter import adapter_layers
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.engines.batched.decode_state import DecodeState
from matryoshka_lora.evaluation.engines.batched.diagonal_table import DiagonalTable
from matryoshka_lora.evaluation.engines.batched.factors import ComputeFactors, compute_factors
from matryoshka_lora.evaluation.engines.batched.fused import fused
from matryoshka_lora.evaluation.engines.batched.kv_cache import KVCache
from matryoshka_lora.evaluation.engines.batched.model_runner import ModelRunner
from matryoshka_lora.evaluation.engines.batched.prefill import Prefill
from matryoshka_lora.evaluation.engines.batched.scheduler import (
    DEVICE_LIMITS,
    Group,
    Limits,
    Scheduler,
    group_requests,
)
from matryoshka_lora.evaluation.engines.batched.stops import StopStrings
from matryoshka_lora.evaluation.engines.hf import evaluation_mode
from matryoshka_lora.evaluation.engines.protocol import Answers, Outputs, Point, Request
from matryoshka_lora.ops.attention import packed_attention
from matryoshka_lora.ops.graphs import Graphs

logger = logging.getLogger(__name__)

STEPS_PER_LAUNCH = {"cpu": 1, "cuda": 4}
"""Decode steps that are launched, and whose tokens the host reads, together. A row whose answer is
complete idles for half of them on average, and for all those of `PIPELINE_DEPTH`. A CPU gains
nothing from more."""
PIPELINE_DEPTH = {"cpu": 0, "cuda": 1}
"""Prefills or launches of decode steps that stay in flight while the host launches the next, and
while the caller scores answers. A thread for the scoring gains nothing where that takes 0.1 ms, as
on GSM8K: both compute in Python, and the engine would wait up to 5 ms for the interpreter after
each copy. Where it takes 1 ms or more, the device idles meanwhile."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "stop_strings": (None,),
    "max_time": (None,),
}
"""Settings of a generation config that change greedy answers, and the values that do not."""


class BatchedEngine:
    """Answers the jobs of any mix of points together; see `Engine`.

    max_rows: answers decoded at once; max_tokens: tokens prefilled at once. By default both follow
    from the device and its free memory. Where memory runs out all the same, both are halved for
    good, the answers being decoded start again, and the log says so.

    cuda_graphs: replay decode steps as CUDA graphs, on a GPU: a step then takes what the device
    needs, not what the host needs to launch it.

    lockstep: the base is sharded over processes that all answer the same jobs, so all must run the
    same forwards: they decode as many rows as the one with the least memory can, and running out of
    memory is an error.

    Raises UserError for limits below 1, and for devices and generation configs that this engine
    does not answer as transformers does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        cuda_graphs: bool = False,
        lockstep: bool = False,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        refuse(model)
        self.model = model
        self.limits = Limits.of(model, max_rows, max_tokens)
        # Sharded weights are gathered anew in each forward, so they are in no fixed place.
        self.cuda_graphs = cuda_graphs and model.device.type == "cuda" and not lockstep
        self.lockstep = lockstep
        self.stops = StopStrings(tokenizer)

    def run(
        self, jobs: Sequence[tuple[Point, Request]], parts: Iterator[range] | None = None
    ) -> Outputs:
        """See `Engine.run`. The model is the engine's until the iterator ends or is closed."""
        if not jobs:
            return
        assert len({point.factors for point, _ in jobs}) == 1, "one factor set a call"
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(packed_attention(self.model))
            factors = stack.enter_context(compute_factors(self.model))
            # Only while it works: what the caller does between two answers is not the engine's.
            here: AbstractContextManager[Any] = nullcontext()
            if self.model.device.type == "cuda":
                here = torch.cuda.device(self.model.device)
            with here:
                if not self.lockstep:  # sharded weights are gathered inside the modules
                    stack.enter_context(fused(self.model))
                run = Run(self, factors, jobs, parts)
            while run.busy:
                answers = None
                try:
                    with here:
                        answers = run.advance()
                except torch.OutOfMemoryError as error:
                    logger.debug("out of memory", exc_info=error)
                # Outside the handler, where the failed call's tensors are gone.
                if answers is None:
                    yield from run.drain()
                    if self.lockstep:
                        raise UserError(
                            "out of memory, which sharded processes cannot recover from one by "
                            "one; use eval.engine=hf with a small eval.batch_size, or fewer shots"
                        )
                    run.halve()
                else:
                    yield from answers


def refuse(model: PreTrainedModel) -> None:
    """Raises UserError for what greedy decoding here would not do as transformers does it."""
    if model.device.type not in DEVICE_LIMITS:
        raise UserError(
            f"the batched engine runs on {' and '.join(DEVICE_LIMITS)}, the model is on "
            f"{model.device}; use eval.engine=hf"
        )
    for name, neutral in NEUTRAL.items():
        value = getattr(model.generation_config, name, None)
        if value not in neutral:
            raise UserError(
                f"the model's generation config sets {name}={value!r}, which changes greedy "
                "answers and which the batched engine does not do; use eval.engine=hf"
            )


class Run:
    """One `BatchedEngine.run`: launches what the scheduler says and reads the results in order."""

    def __init__(
        self,
        engine: BatchedEngine,
        factors: ComputeFactors,
        jobs: Sequence[tuple[Point, Request]],
        parts: Iterator[range] | None,
    ) -> None:
        self.engine, self.model = engine, engine.model
        self.device = engine.model.device
        self.requests = [request for _, request in jobs]
        points = list(dict.fromkeys(point for point, _ in jobs))
        # A product with a gate is rounded after it, not before.
        wide = torch.promote_types(self.model.dtype, torch.float32)
        rounded_after = factors.gated or any(x.float32_diagonal for x in factors.layers)
        dtype = wide if rounded_after else self.model.dtype
        self.table = DiagonalTable(adapter_layers(self.model), points, self.device, dtype)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        index = {point: number for number, point in enumerate(points)}
        every = [range(len(jobs))] if parts is None else parts
        self.scheduler = Scheduler(
            (group_requests(jobs, part, index) for part in every),
            self.requests,
            engine.limits,
            vocabulary * self.model.dtype.itemsize,
        )
        self.state: DecodeState | None = None
        self.in_flight: deque[Callable[[], Answers]] = deque()
        """What reads the results of each launch, in their order."""
        self.stop_sets = np.array([engine.stops.index(request.until) for request in self.requests])
        eos = self.model.generation_config.eos_token_id
        self.eos = np.array([] if eos is None else eos).reshape(-1)
        self.runner = ModelRunner(self.model, factors, self.table, engine.lockstep)

    @property
    def busy(self) -> bool:
        """Whether answers are missing."""
        active = self.state is not None and self.state.active
        return bool(self.scheduler.busy or self.in_flight or active)

    @torch.no_grad()
    def advance(self) -> Answers:
        """Launch a prefill or decode steps; the answers that an earlier launch completed."""
        launched = self._launch()
        if launched is not None:
            self.in_flight.append(launched)
        full = len(self.in_flight) > PIPELINE_DEPTH[self.device.type]
        if full or (launched is None and self.in_flight):
            return self.in_flight.popleft()()
        return []

    def drain(self) -> Answers:
        """The answers of all that is in flight."""
        answers: Answers = []
        while self.in_flight:
            answers += self.in_flight.popleft()()
        return answers

    def halve(self) -> None:
        """After running out of memory: half as much at a time; answers in decoding start again."""
        groups, rows = (
            ([], None) if self.state is None else (self.state.groups(), self.state.cache.rows)
        )
        self.scheduler.halve(groups, rows)
        self.state = None

    def _launch(self) -> Callable[[], Answers] | None:
        """None: there is nothing to launch before the host has read what is in flight."""
        self.scheduler.take(None if self.state is None else self.state.free_rows)
        if groups := self.scheduler.next_scoring():
            read, _ = self._prefill(groups, None)
            self.scheduler.started(self.scheduler.scoring, groups)
            return read
        if self.state is None:
            if not self.scheduler.waiting:
                return None
            self.state = self._make_state()
        state = self.state
        if groups := self.scheduler.next_waiting(state.cache.rows, state.active):
            return self._start(groups, state)
        state.compact()
        n = state.used
        lacking = int((state.limit[:n] - state.launched[:n]).max(initial=0))
        if lacking <= 0:
            return None
        ids = state.id[:n].copy()
        steps = min(STEPS_PER_LAUNCH[self.device.type], lacking)
        return state.append(ids, self.runner.decode(state, steps))

    def _make_state(self) -> DecodeState:
        shapes = self.runner.kv_shapes
        rows, size, longest = self.scheduler.cache_shape(
            self.model, sum(shape.bytes for shape in shapes), self.engine.lockstep
        )
        return DecodeState(
            KVCache(shapes, rows, size, self.device),
            self.table,
            longest + STEPS_PER_LAUNCH[self.device.type],
            self.engine.stops,
            self.eos,
            Graphs() if self.engine.cuda_graphs else None,
        )

    def _start(self, groups: list[Group], state: DecodeState) -> Callable[[], Answers]:
        """Prefill into free rows, where decoding goes on; reads scores and first tokens."""
        read_scores, tokens = self._prefill(groups, state)
        jobs = [g.generate for g in groups if g.generate is not None]
        limits = [self.requests[job].max_new_tokens for job in jobs]
        # Should they have to start again, their targets are scored already.
        started = [replace(g, scored=[]) for g in groups]
        ids = state.add(started, limits, self.stop_sets[jobs], tokens)
        self.scheduler.started(self.scheduler.waiting, groups)
        read_tokens = state.append(ids, tokens[:, None])
        return lambda: read_scores() + read_tokens()

    def _prefill(
        self, groups: list[Group], state: DecodeState | None
    ) -> tuple[Callable[[], Answers], Tensor]:
        """Launches one prefill; what reads its scores, and the token that follows each context.

        state: in whose free rows the contexts are cached; None caches nothing.
        """
        prefill = Prefill(groups, self.requests, self.device)
        cache = None
        if state is not None:
            cache = state.cache
            cached, *places = prefill.contexts(state.free(len(groups)))
            cache.start_prefill(cached)
            cache.write_to(*places)
        logits = self.runner.prefill(prefill, [g.point for g in groups], cache)
        tokens = self.runner.greedy(logits[prefill.context_ends])
        return prefill.score(logits), tokens
