"""The forwards of the batched engine: prefills and decode steps."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from matryoshka_lora.evaluation.engines.batched.attention_trial import attention_agrees
from matryoshka_lora.evaluation.engines.batched.decode_state import DecodeState
from matryoshka_lora.evaluation.engines.batched.diagonal_table import DiagonalTable
from matryoshka_lora.evaluation.engines.batched.factors import ComputeFactors
from matryoshka_lora.evaluation.engines.batched.kv_cache import KVCache, kv_shapes
from matryoshka_lora.evaluation.engines.batched.prefill import Prefill

MIN_CAPTURED_ROWS = 64
"""Fewer hardly shorten a step: SmolLM2 takes about 4 ms with 32 as with 128 on an H200."""


class ModelRunner:
    """Runs the model with the diagonals of a table and the factors narrowed to what they read.

    lockstep: other processes run the same forwards, and all go on with the first one's tokens.
    """

    def __init__(
        self, model: PreTrainedModel, factors: ComputeFactors, table: DiagonalTable, lockstep: bool
    ) -> None:
        self.model, self.factors, self.table = model, factors, table
        self.lockstep = lockstep
        table.apply(table.zeros(1))
        self.kv_shapes = kv_shapes(model)
        # Whether to use the plain functions of attention: in prefills, in decoding.
        self._plain = [False, False]
        if model.device.type == "cuda":
            self._plain = [
                not attention_agrees(model, self.kv_shapes, model.device, decoding)
                for decoding in (False, True)
            ]

    def prefill(self, prefill: Prefill, points: list[int], cache: KVCache | None) -> Tensor:
        """(kept tokens, vocabulary): the logits. points: those of the prefill's groups."""
        rank = self.table.rank(points)
        self.factors.narrow(rank)
        self.table.apply(self.table.choose(prefill.points, points), rank)
        return self._forward(prefill.ids, prefill.inputs, cache, prefill.kept)

    def decode(self, state: DecodeState, steps: int) -> Tensor:
        """(used rows, steps): the next tokens of all answers."""
        n, cache = state.used, state.cache
        longest = int((state.context[:n] + state.launched[:n]).max())
        rows = n if state.graphs is None else captured_rows(n, cache.rows)
        cache.start_decoding(rows)
        rank = self.table.rank(state.point[:n])
        self.factors.narrow(rank)
        self.table.apply(state.p[:, :rows], rank)
        tokens = []
        for i in range(steps):
            if state.graphs is None:
                token = self._step(state, rows, min(longest + i, cache.size))
            else:
                step = partial(self._step, state, rows, cache.size)
                token = state.graphs("step", (rows, rank), step).clone()
            tokens.append(token[:n])
        state.launched[:n] += steps
        return torch.stack(tokens, 1)

    def _step(self, state: DecodeState, rows: int, longest: int) -> Tensor:
        """One token for each of the first `rows` rows, which hold at most `longest` with this one.

        Works in place on buffers that stay where they are and waits for nothing, so that it can be
        captured as a CUDA graph.
        """
        token, position = state.token[:rows], state.position[:rows]
        state.cache.write_to(state.rows[:rows], position)
        inputs = {
            "position_ids": position[None].long(),
            "max_length_k": longest,
            "kv_lengths": position + 1,
        }
        new = self.greedy(self._forward(token[None], inputs, state.cache, 0))
        token.copy_(new)
        position.copy_(torch.minimum(position + 1, state.last[:rows]))
        return new

    def greedy(self, logits: Tensor) -> Tensor:
        """(..., vocabulary) -> (...): the greedy choice; as in transformers, in float32 at most."""
        tokens = (logits.float() if logits.dtype == torch.float64 else logits).argmax(-1)
        if self.lockstep:
            # Their number of forwards follows from the tokens. One that was rounded otherwise would
            # end an answer elsewhere, and the others would wait for its forwards for good.
            torch.distributed.broadcast(tokens, 0)
        return tokens

    def _forward(
        self, ids: Tensor, inputs: dict[str, Any], cache: Cache | None, kept: Tensor | int
    ) -> Tensor:
        """ids: (1, T) -> the model's own logits (kept, vocabulary); kept 0 means all."""
        return self.model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=kept,
            reference=self._plain["kv_lengths" in inputs],
            **inputs,
        ).logits[0]


def captured_rows(used: int, most: int) -> int:
    """How many rows a captured decode step has: `most`, or a half, a quarter, ... of it.

    Few numbers, as each has graphs of its own, and a capture takes as long as several steps.
    """
    rows = most
    while (half := -(-rows // 2)) >= max(used, MIN_CAPTURED_ROWS):
        rows = half
    return rows
