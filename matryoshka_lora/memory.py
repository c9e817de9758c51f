"""What a training will take, estimated from the model's shape before any weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from matryoshka_lora.config import Config, build_method
from matryoshka_lora.core.adapter import adapter_parameters
from matryoshka_lora.data.examples import Example
from matryoshka_lora.models import DTYPES, decoder_layers
from matryoshka_lora.ops.quantized import quantized_bytes
from matryoshka_lora.training.plan import steps_per_epoch, total_steps


@dataclass(frozen=True)
class Estimate:
    """Counts of parameters, tokens and steps, and the memory of one process."""

    trainable: int
    """Parameters of the adapters."""
    parameters: int
    """Parameters of the base model and the adapters."""
    examples: int
    tokens: int
    """Tokens of one epoch."""
    longest: int
    """Tokens of the longest example."""
    steps: int
    steps_per_epoch: int
    memory: dict[str, float]
    """What it is for -> bytes."""


def estimate(
    config: Config, model: PreTrainedModel, examples: Sequence[Example], shards: int = 1
) -> Estimate:
    """Parameters, tokens, steps and memory of a training of `examples`.

    model: adapted; it needs no weights (meta device). Activations and logits are rough: they assume
    the inputs of the linear layers kept for the backward pass, and logits of label positions alone.
    shards: over how many processes the base is sharded.
    """
    trainable = sum(p.numel() for p in adapter_parameters(model).values())
    parameters = sum(p.numel() for p in model.parameters())
    trainer = config.trainer
    tokens = sum(len(example.tokens) for example in examples)
    longest = max(len(example.tokens) for example in examples)
    compute = DTYPES[config.model.dtype].itemsize
    factor = DTYPES[config.adapter.dtype].itemsize
    forward = min(
        trainer.max_tokens,
        (trainer.micro_batch or trainer.effective_batch)
        * (longest if not trainer.packed else tokens / len(examples)),
    )
    shape = model.config.get_text_config()
    # Per layer and token: the inputs of its linear layers, normalised and activated values.
    width = 12 * shape.hidden_size + 4 * shape.intermediate_size
    layers = 1 if trainer.gradient_checkpointing else shape.num_hidden_layers
    memory = {
        "base weights": _base_bytes(config, model, parameters - trainable) / shards,
        "factors, gradients, AdamW": trainable * factor * 4,
        "activations (rough)": forward * width * layers * compute
        + forward * shape.num_hidden_layers * shape.hidden_size * compute,
        "logits (rough)": forward * 0.6 * shape.vocab_size * (compute + 8),
    }
    if shards > 1:
        in_layers = [_base_numbers(layer) for layer in decoder_layers(model)]
        # Embedding and head, the layer that computes and the next one.
        gathered = parameters - trainable - sum(in_layers) + 2 * max(in_layers)
        memory["base weights as they are used"] = gathered * compute
    steps = total_steps(len(examples), trainer)
    if kept := _state_of_method(config, model, steps):
        memory["the method's own state"] = kept
    return Estimate(
        trainable=trainable,
        parameters=parameters,
        examples=len(examples),
        tokens=tokens,
        longest=longest,
        steps=steps,
        steps_per_epoch=steps_per_epoch(len(examples), trainer.effective_batch),
        memory=memory,
    )


def _base_bytes(config: Config, model: PreTrainedModel, parameters: int) -> float:
    """Of the base's weights; of a quantised one, with the largest layer as it is multiplied by."""
    kind, compute = config.model.quantization, DTYPES[config.model.dtype].itemsize
    if kind is None:
        return parameters * compute
    # Adapter layers that have taken a plain linear layer over are linear layers, too.
    layers = [m for m in decoder_layers(model).modules() if isinstance(m, nn.Linear)]
    sizes = [layer.weight.numel() for layer in layers]
    kept = sum(
        quantized_bytes(kind, size, layer.out_features)
        for layer, size in zip(layers, sizes, strict=True)
    )
    return kept + (parameters - sum(sizes)) * compute + max(sizes, default=0) * compute


def _base_numbers(module: nn.Module) -> int:
    """Parameters of a module of an adapted model, without those of the adapters."""
    return sum(p.numel() for p in module.parameters()) - sum(
        p.numel() for p in adapter_parameters(module).values()
    )


def _state_of_method(config: Config, model: PreTrainedModel, steps: int) -> int:
    """Bytes of what the method keeps from step to step, such as AdaLoRA's scores."""
    hooks, parameters = build_method(config).hooks, adapter_parameters(model)
    hooks.start(parameters, torch.optim.AdamW(parameters.values()), steps)
    leaves = tree_leaves(hooks.state_dict())
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def print_estimate(found: Estimate, embedded: bool) -> None:
    """Print it, memory in GiB.

    embedded: whether the embedded tokenizer made the tokens; it makes more of a text than that of a
    larger model.
    """
    share = 100 * found.trainable / found.parameters
    print(f"parameters: {found.trainable:,} trainable of {found.parameters:,} ({share:.2f} %)")
    by = " of the embedded tokenizer" if embedded else ""
    print(
        f"tokens{by}: {found.tokens:,} an epoch in {found.examples:,} examples, the longest "
        f"{found.longest}; steps: {found.steps:,} ({found.steps_per_epoch} an epoch)"
    )
    for name, size in found.memory.items():
        print(f"memory, {name}: {size / 2**30:.2f} GiB")
    print(f"memory, sum: {sum(found.memory.values()) / 2**30:.2f} GiB")
