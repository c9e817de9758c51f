"""The forwards of a step: which of them a process runs, each forward and backward."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from matryoshka_lora.config import Config, TrainerConfig
from matryoshka_lora.data.examples import Example
from matryoshka_lora.data.loss import (
    batch_loss,
    label_loss,
    on_device,
    packed_batch,
    packed_loss,
)
from matryoshka_lora.models import decoder_layers, without_dropout
from matryoshka_lora.ops.attention import packed_attention
from matryoshka_lora.ops.graphs import Graphs
from matryoshka_lora.training.plan import split_into_forwards

logger = logging.getLogger(__name__)

Backward = Callable[[Sequence[Example], np.ndarray, float], Tensor]
"""(examples, choice of diagonals, weight) -> weight * their loss, a scalar without gradient.

The gradients are added to those that the parameters have. choice: the index of the diagonal of each
example, (len(examples),), or of all of them, (1,).
"""

# A forward that is replayed as a CUDA graph has multiples of these, so that few sizes occur.
TOKENS_MULTIPLE, LABELS_MULTIPLE = 256, 512


def forwards_of_process(
    batch: Sequence[Example], settings: TrainerConfig, accelerator: Accelerator
) -> Iterator[tuple[list[int], float]]:
    """(positions in the effective batch, weight) of each forward that this process runs.

    Where the base is sharded, all processes must run the same number of forwards: a process with
    fewer repeats a sample with weight 0.
    """
    lengths = [len(example.tokens) for example in batch]
    forwards = [
        split_into_forwards(
            lengths,
            process,
            accelerator.num_processes,
            settings.micro_batch,
            settings.max_tokens,
            padded=not settings.packed,
        )
        for process in range(accelerator.num_processes)
    ]
    mine = forwards[accelerator.process_index]
    yield from ((positions, 1.0) for positions in mine)
    if accelerator.distributed_type == DistributedType.FSDP:
        for _ in range(max(map(len, forwards)) - len(mine)):
            yield [0], 0.0


def backward_of(
    model: PreTrainedModel, diagonals: Tensor, config: Config, graphs: Graphs | None
) -> Backward:
    """The forward and backward pass that the config asks for. diagonals: (K, R)."""
    diagonals = diagonals.to(model.device)
    if config.trainer.packed:
        return packed_backward(model, diagonals, config, graphs)
    return padded_backward(model, diagonals)


def packed_backward(
    model: PreTrainedModel, diagonals: Tensor, config: Config, graphs: Graphs | None
) -> Backward:
    """Forward and backward of packed rows. diagonals: (K, R), those that a choice indexes.

    With `graphs`, the numbers of tokens and labels are rounded up, and the tensors of each size
    stay where they are: a graph reads the same memory in every replay.
    """
    device = model.device
    round_to = (1, 1) if graphs is None else (TOKENS_MULTIPLE, LABELS_MULTIPLE)
    longest = max(config.dataset.max_length, round_to[0])
    # Compiled, the loss makes no float32 copy of the logits.
    loss = torch.compile(label_loss, dynamic=True) if config.trainer.compile else label_loss
    inputs: dict[tuple[torch.Size, ...], dict[str, Tensor]] = {}

    def run(batch: dict[str, Tensor]) -> Tensor:
        part = packed_loss(model, batch, diagonals, longest, loss) * batch["weight"]
        part.backward()
        return part.detach()

    def backward(examples: Sequence[Example], choice: np.ndarray, weight: float) -> Tensor:
        batch = packed_batch(examples, choice, round_to, longest)
        batch = on_device(batch | {"weight": torch.tensor(weight, dtype=torch.float64)}, device)
        if graphs is None:
            return run(batch)
        sizes = tuple(tensor.shape for tensor in batch.values())
        fixed = inputs.setdefault(sizes, batch)
        for name, tensor in batch.items():
            fixed[name].copy_(tensor)
        # Compiled layers have one version for a diagonal for all and one for a diagonal a token.
        return graphs(len(choice) > 1, sizes, lambda: run(fixed))

    return backward


def padded_backward(model: PreTrainedModel, diagonals: Tensor) -> Backward:
    """Forward and backward of padded rows. diagonals: (K, R), on the model's device."""

    def backward(examples: Sequence[Example], choice: np.ndarray, weight: float) -> Tensor:
        index = choice[0] if len(choice) == 1 else torch.from_numpy(choice).to(diagonals.device)
        part = batch_loss(model, examples, diagonals[index], packed=False) * weight
        part.backward()
        return part.detach()

    return backward


def graphs_of(
    settings: TrainerConfig,
    accelerator: Accelerator,
    parameters: Iterable[nn.Parameter],
    device: torch.device,
) -> Graphs | None:
    """CUDA graphs, if the settings ask for them and this training can use them.

    Gives every parameter a gradient: a graph adds to gradients that must stay where they are.
    """
    if not settings.cuda_graphs:
        return None
    # Sharded weights are gathered anew in each forward, so they have no fixed place; padded rows
    # have too many shapes; recomputing activations reads random states from the device.
    sharded = accelerator.distributed_type == DistributedType.FSDP
    refused = sharded or not settings.packed or settings.gradient_checkpointing
    if device.type != "cuda" or refused:
        logger.info(
            "trainer.cuda_graphs has no effect: it needs a GPU, packed rows, an unsharded model "
            "and no gradient checkpointing"
        )
        return None
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return Graphs()


@contextmanager
def training_mode(model: PreTrainedModel, settings: TrainerConfig) -> Iterator[dict[str, float]]:
    """The model as the settings train it (checkpointed, compiled, packed); as before on leaving.

    Yields what `without_dropout` switched off.
    """
    with ExitStack() as stack:
        switched_off = stack.enter_context(without_dropout(model))
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            stack.callback(model.gradient_checkpointing_disable)
        if settings.compile:
            # A worker trains adapters of many kinds, each of which may need versions of its own.
            torch._dynamo.config.recompile_limit = 64
            # The first layer stays eager: its input needs no gradient, so that it would be compiled
            # for itself alone.
            for layer in list(decoder_layers(model))[1:]:
                layer.compile(dynamic=True)
            stack.callback(_undo_compile, model)
            # A diagonal for each token has as many rows as the batch has tokens.
            stack.enter_context(
                torch._dynamo.config.patch(force_nn_module_property_static_shapes=False)
            )
        if settings.packed:
            # Around the backward pass too, in which checkpointed layers run again.
            stack.enter_context(packed_attention(model))
        model.train()
        stack.callback(model.eval)
        yield switched_off


@contextmanager
def reading_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within `training_mode`, the model for forwards without gradients; as before on leaving.

    They are eager, since compiled layers would compile again for them, and outside the graphs.
    """
    compiled = {layer: layer._compiled_call_impl for layer in decoder_layers(model)}
    _undo_compile(model)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
        for layer, call in compiled.items():
            layer._compiled_call_impl = call


def _undo_compile(model: PreTrainedModel) -> None:
    """Back to eager layers: evaluation has other shapes and dtypes."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
