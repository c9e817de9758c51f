"""Copies between host and device that wait as little as possible, and the allocator's setting."""

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor.to(device)` for a tensor on the CPU, without waiting for the device's queue."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Launches copies to the host; the result waits for them, but not for work launched later."""
    copies = {
        name: tensor.to("cpu", non_blocking=True, copy=True) for name, tensor in tensors.items()
    }
    copied = []
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        copied.append(event)

    def wait() -> dict[str, Tensor]:
        for event in copied:
            event.synchronize()
        return copies

    return wait


def let_segments_grow() -> None:
    """Have torch's allocator extend its segments, unless the user has configured it.

    CUDA graphs of many sizes share one memory pool. A segment of a fixed size rarely fits the next
    graph, so that the pool takes half as much again as a single step needs. Call it before the
    device is first used.
    """
    if torch.cuda.is_available() and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
