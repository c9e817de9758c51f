"""The KV cache of the batched engine: keys and values of the answers that are being decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from matryoshka_lora.ops.attention import packed_inputs


@dataclass(frozen=True)
class KVShape:
    """What one layer caches of a token: (kv_heads, d) of the key and of the value."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one token."""
        numbers = self.key[0] * self.key[1] + self.value[0] * self.value[1]
        return numbers * self.dtype.itemsize


@torch.no_grad()
def kv_shapes(model: PreTrainedModel) -> list[KVShape]:
    """What each layer caches of a token, learnt from a forward of one token.

    The configs of different models do not say it under the same names. The model must run with
    packed attention and its diagonals must fit a single token.
    """
    probe = _ShapeProbe()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    inputs = packed_inputs([1], model.device)
    model(input_ids=ids, past_key_values=probe, use_cache=True, logits_to_keep=0, **inputs)
    return probe.shapes


class _ShapeProbe(Cache):
    """Keeps the shapes of keys and values instead of the keys and values."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: list[KVShape] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model."""
        assert layer_idx == len(self.shapes), "layers that share keys are not supported"
        key, value = ((x.shape[1], x.shape[3]) for x in (key_states, value_states))
        self.shapes.append(KVShape(key, value, key_states.dtype))
        return key_states, value_states


class KVCache(Cache):
    """Keys and values of several answers, per layer (rows, kv_heads, size, d).

    A row holds the keys of one answer and its context, in the order of their positions. Before each
    forward `start_prefill` or `start_decoding`, then `write_to`, say where its keys go.
    """

    def __init__(
        self, layers: Sequence[KVShape], rows: int, size: int, device: torch.device
    ) -> None:
        """size: tokens of a row."""
        super().__init__(layers=[])
        self.rows, self.size = rows, size
        # Zeros, not empty: a masked key has weight 0, but 0 * nan would be nan.
        self.keys, self.values = (
            [
                torch.zeros(rows, heads, size, width, dtype=x.dtype, device=device)
                for (heads, width), x in pairs
            ]
            for pairs in ([(x.key, x) for x in layers], [(x.value, x) for x in layers])
        )
        heads = {x.shape[1] for x in (*self.keys, *self.values)}
        self._heads = {n: torch.arange(n, device=device) for n in heads}
        self._places: dict[int, Tensor] = {}
        self._cached: Tensor | None = None
        self._decoding = 0

    def start_prefill(self, cached: Tensor | None) -> None:
        """The next forwards attend to their own keys alone.

        cached: which of their tokens are cached; None: all.
        """
        self._cached, self._decoding = cached, 0

    def start_decoding(self, rows: int) -> None:
        """The next forwards have one token for each of the first `rows` rows, and attend to it."""
        self._cached, self._decoding = None, rows

    def write_to(self, rows: Tensor, positions: Tensor) -> None:
        """Keys of cached token i of the next forward go to row rows[i] at positions[i]; both (T,).

        Launches the same work for the same T, so it can be captured with the forward.
        """
        self._places = {
            n: ((rows[:, None] * n + heads) * self.size + positions[:, None]).flatten()
            for n, heads in self._heads.items()
        }

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model: (1, kv_heads, T, d) in; the keys and values to attend to out."""
        key = self._write(key_states, self.keys[layer_idx])
        value = self._write(value_states, self.values[layer_idx])
        return (key, value) if self._decoding else (key_states, value_states)

    def _write(self, states: Tensor, cache: Tensor) -> Tensor:
        tokens = states[0].transpose(0, 1)
        if self._cached is not None:
            tokens = tokens[self._cached]
        cache.flatten(0, 2).index_copy_(0, self._places[cache.shape[1]], tokens.flatten(0, 1))
        return cache[: self._decoding]

    def move(self, source: Tensor, destination: Tensor, used: int) -> None:
        """Copy the first `used` tokens of the rows `source` to the rows `destination`."""
        for cache in (*self.keys, *self.values):
            rows = cache[:, :, :used]
            rows[destination] = rows[source]
