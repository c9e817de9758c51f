"""The processes of a run (accelerate), and a base model sharded over them (FSDP2)."""

import itertools
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, disable_fsdp_ram_efficient_loading
from torch.distributed import PrefixStore
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

LEAVE_SECONDS = 1.0
"""That a process which its launcher ends stays for the others to see it."""
MAIN_TIME = timedelta(hours=6)
"""That the others wait for what the main process alone does, such as hashing a base of 140 GB. In a
collective of NCCL they would give up after 10 minutes."""

_calls = itertools.count()
"""Of `on_main`; all processes make the same ones."""


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
    if accelerator.num_processes > 1:
        tell_who_ended()
    return accelerator


def tell_who_ended() -> None:
    """When the launcher ends this process, say which one has ended before, and end.

    Launchers end all processes by SIGTERM once one has ended. This process may then wait within
    NCCL for the one that is gone, where no handler of Python's is called, so a thread waits for the
    signal. One of the processes says it. Where something handles the signal already, as submitit
    does, it goes on to.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    arrived, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    # A forked process would wake this one's thread when it is ended.
    os.register_at_fork(after_in_child=_end_by_signal)

    def wait() -> None:
        while os.read(arrived, 1)[0] != signal.SIGTERM:
            continue
        try:
            living = _living_processes()
            first, count = min(living), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            start = int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"])
            ended = [rank for rank in range(start, start + count) if rank not in living]
            if ended and first == int(os.environ["RANK"]):
                print(
                    f"stopped: process {', '.join(map(str, ended))} of {os.environ['WORLD_SIZE']} "
                    "has ended (it was killed, unless it says why); the same command goes on from "
                    "what is finished",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(LEAVE_SECONDS)
        finally:
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _end_by_signal() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _living_processes() -> set[int]:
    """The ranks of the processes of this host that have not ended."""
    found = {int(os.environ["RANK"])}
    for process in psutil.Process(os.getppid()).children():
        with suppress(psutil.Error, KeyError):  # it has ended, or is no process of the run
            found.add(int(process.environ()["RANK"]))
    return found


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, which alone calls it, on every process.

    It is pickled, to 8 MiB at most.
    """
    if accelerator.num_processes == 1:
        return function()
    # The store that the processes have met at.
    store = PrefixStore("on_main", torch.distributed.distributed_c10d._get_default_store())
    key = str(next(_calls))
    if accelerator.is_main_process:
        value = function()
        store.set(key, pickle.dumps(value))  # type: ignore[arg-type]
        return value
    store.wait([key], MAIN_TIME)
    return pickle.loads(store.get(key))


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
