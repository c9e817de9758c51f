"""The loss of a batch, packed or padded: the negative log-likelihood of its label tokens."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from matryoshka_lora.core.adapter import set_diagonal
from matryoshka_lora.data.examples import Example
from matryoshka_lora.data.packing import pack
from matryoshka_lora.ops.attention import packed_inputs
from matryoshka_lora.ops.device import to_device

LabelLoss = Callable[[Tensor, Tensor], Tensor]
Diagonals = Tensor | Mapping[str, Tensor]
"""For all layers, or by layer."""


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed, in float32 or higher. logits (N, vocabulary), labels (N,)."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, labels, reduction="sum")


def batch_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    diagonals: Diagonals,
    *,
    packed: bool = True,
) -> Tensor:
    """Negative log-likelihood in nats, summed over the label tokens of `examples`, as a scalar.

    diagonals: (R,) for all examples, or (len(examples), R), one for each; or layer -> such. The
    loss reads the logits of label positions only, and its softmax is in float32 or higher. packed:
    one row without padding, for which the caller must have `packed_attention` in place; False: one
    padded row for each example.
    """
    diagonals = _each(diagonals, lambda p: p.to(model.device))
    one = diagonals if isinstance(diagonals, Tensor) else next(iter(diagonals.values()))
    single = one.dim() == 1
    if packed:
        choice = np.zeros(1, dtype=np.int64) if single else np.arange(len(examples))
        batch = on_device(packed_batch(examples, choice), model.device)
        longest = max(len(example.tokens) for example in examples)
        table = _each(diagonals, lambda p: p[None]) if single else diagonals
        return packed_loss(model, batch, table, longest)
    batch_of = pack(examples)
    lengths = torch.tensor(batch_of.lengths)
    mask = torch.arange(max(batch_of.lengths))[None] < lengths[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, batch_of.tokens[0])
    rows = mask.nonzero()[batch_of.label_rows].to(model.device)
    set_diagonal(model, diagonals if single else _each(diagonals, lambda p: p[:, None]))
    logits = model(
        input_ids=padded.to(model.device),
        attention_mask=mask.long().to(model.device),
        use_cache=False,
    ).logits[rows[:, 0], rows[:, 1]]
    return label_loss(logits, batch_of.labels.to(model.device))


def packed_batch(
    examples: Sequence[Example],
    choice: np.ndarray,
    round_to: tuple[int, int] = (1, 1),
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """The tensors that `packed_loss` takes, on the CPU.

    choice: the index of the diagonal of each example, (len(examples),), or of all of them, (1,).
    round_to: the multiples that the numbers of tokens and of labels are rounded up to (`pack`).
    max_length: an upper bound of the documents' lengths.

    With T tokens, N labels and D documents: tokens and positions (1, T); bounds (D + 1,) int32, the
    starts of all documents and the end of the last; label_rows and labels (N,); choice (T,) or
    (1,).
    """
    batch = pack(examples, *round_to)
    inputs = packed_inputs(batch.lengths, "cpu", max_length)
    if len(choice) > 1:
        # The document that rounding adds has no labels, so that any diagonal will do.
        padded = np.append(choice, choice[-1:].repeat(len(batch.lengths) - len(choice)))
        choice = padded.repeat(batch.lengths)
    bounds, positions = inputs["cu_seq_lens_q"], inputs["position_ids"]
    assert isinstance(bounds, Tensor) and isinstance(positions, Tensor)
    # The document that rounding adds may be longer than what the model embeds positions of, or
    # scales them by.
    positions[:, sum(batch.lengths[: len(examples)]) :] = 0
    return {
        "tokens": batch.tokens,
        "positions": positions,
        "bounds": bounds,
        "label_rows": batch.label_rows,
        "labels": batch.labels,
        "choice": torch.from_numpy(choice),
    }


def _each(diagonals: Diagonals, function: Callable[[Tensor], Tensor]) -> Diagonals:
    """The function of the diagonals, or of those of each layer."""
    if isinstance(diagonals, Tensor):
        return function(diagonals)
    return {layer: function(own) for layer, own in diagonals.items()}


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors on `device`."""
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


def packed_loss(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    diagonals: Diagonals,
    max_length: int,
    label_loss: LabelLoss = label_loss,
) -> Tensor:
    """`batch_loss` of a `packed_batch`; never waits for the device, so that a graph can capture it.

    diagonals: (K, R), those that `choice` indexes, or layer -> its own. max_length: an upper bound
    of the documents' lengths. Compiled layers treat it as a constant, so pass the same one for
    every batch.
    """
    bounds = batch["bounds"]
    # Becomes (1, 1, R), or (1, T, R) where each token has a diagonal.
    set_diagonal(model, _each(diagonals, lambda p: p.index_select(0, batch["choice"])[None]))
    logits = model(
        input_ids=batch["tokens"],
        position_ids=batch["positions"],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max_length,
        max_length_k=max_length,
        use_cache=False,
        logits_to_keep=batch["label_rows"],
    ).logits[0]
    return label_loss(logits, batch["labels"])
