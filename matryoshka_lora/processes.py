"""The processes of a run (accelerate), and a base model sharded over them (FSDP2)."""

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
)
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from matryoshka_lora.config import Config
from matryoshka_lora.core.adapter import adapter_parameters
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.loading import build_model
from matryoshka_lora.models import decoder_layers
from matryoshka_lora.ops.device import let_segments_grow
from matryoshka_lora.ops.sharded import mesh_of, shard

T = TypeVar("T")


def make_accelerator() -> Accelerator:
    """Processes and device; attention without cuDNN in this process from now on.

    Raises UserError where the processes do not know each other.
    """
    let_segments_grow()
    # Where torch prefers cuDNN, it makes a new plan for every shape, which is in every decoding
    # step of the HF engine's first batches, and it rounds unlike the flash attention of packed
    # rows.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Without being told, accelerate ignores the launcher where there is no GPU.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"the launcher started {started} processes, but accelerate sees "
            f"{accelerator.num_processes}; use a file of configs/accelerate"
        )
    if not accelerator.is_main_process:
        logging.getLogger("matryoshka_lora").setLevel(logging.WARNING)
    return accelerator


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, which alone calls it, on every process."""
    value: list[Any] = [function() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(value)
    return value[0]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the base is sharded, so that all processes must run the same forwards."""
    return accelerator.distributed_type == DistributedType.FSDP


def build_adapted_model(config: Config, accelerator: Accelerator) -> PreTrainedModel:
    """The base model with fresh adapters on this process's device, sharded under FSDP.

    Raises UserError where a base would be both quantised and sharded.
    """
    if not is_sharded(accelerator):
        return build_model(config, accelerator.device)
    if config.model.quantization is not None:
        raise UserError(
            f"model.quantization={config.model.quantization} cannot be sharded (FSDP): a quantised "
            "base is whole on each GPU; use configs/accelerate/ddp.yaml, or leave it out"
        )
    # accelerate asks for it, and transformers 5.17 then leaves the weights of all processes but the
    # first at 0, for accelerate to fill.
    disable_fsdp_ram_efficient_loading()
    mesh = mesh_of(accelerator.device)
    model = build_model(config, accelerator.device, mesh)
    shard_base(model, mesh)
    return model


def shard_base(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard the frozen base over all processes, layer by layer.

    The adapters stay whole on every process, so training sums their gradients as without sharding.
    """
    shard(model, decoder_layers(model), adapter_parameters(model).values(), mesh)
