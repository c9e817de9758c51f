"""Packing: several examples in one row of tokens, without padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matryoshka_lora.data.examples import Example

# A label that torch's cross-entropy leaves out.
IGNORED = -100


@dataclass(frozen=True)
class PackedBatch:
    """Several examples (documents) in one row of T tokens."""

    tokens: Tensor
    """(1, T) token ids."""
    lengths: tuple[int, ...]
    """Tokens of each document; they sum to T."""
    label_rows: Tensor
    """(N,) the positions in the row whose next token is a label."""
    labels: Tensor
    """(N,) those next tokens."""


def pack(
    examples: Sequence[Example], tokens_multiple: int = 1, labels_multiple: int = 1
) -> PackedBatch:
    """Put examples one after another into one row.

    tokens_multiple: if above 1, T is rounded up to a multiple of it by one more document, which has
    no labels. labels_multiple: N is rounded up to a multiple of it by labels that no loss counts
    (-100). Neither changes the loss. Rounding makes sizes occur again, so that a CUDA graph can be
    used again.
    """
    rows: list[int] = []
    labels: list[int] = []
    start = 0
    for example in examples:
        first = max(example.prompt_length, 1)
        rows.extend(range(start + first - 1, start + len(example.tokens) - 1))
        labels.extend(example.tokens[first:])
        start += len(example.tokens)
    tokens = [token for example in examples for token in example.tokens]
    lengths = [len(example.tokens) for example in examples]
    if tokens_multiple > 1:
        # No document may be empty: a row whose length is a multiple already grows by a whole one.
        lengths.append(tokens_multiple - start % tokens_multiple)
        tokens += [0] * lengths[-1]
    missing = -len(labels) % labels_multiple
    return PackedBatch(
        tokens=torch.tensor([tokens]),
        lengths=tuple(lengths),
        # Each added label reads another position: the gradients of labels at one position would be
        # added up one after the other.
        label_rows=torch.tensor(rows + [i % len(tokens) for i in range(missing)], dtype=torch.long),
        labels=torch.tensor(labels + [IGNORED] * missing, dtype=torch.long),
    )
