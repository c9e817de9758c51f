"""The training loop."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from matryoshka_lora.config import Config, TrainerConfig
from matryoshka_lora.core.adapter import adapter_parameters
from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.data import Example
from matryoshka_lora.data.loss import (
    batch_loss,
    label_loss,
    on_device,
    packed_batch,
    packed_loss,
)
from matryoshka_lora.methods import Method
from matryoshka_lora.models import decoder_layers
from matryoshka_lora.ops.attention import packed_attention
from matryoshka_lora.ops.device import to_host
from matryoshka_lora.ops.graphs import Graphs
from matryoshka_lora.training.checkpoints import load_checkpoint, save_checkpoint
from matryoshka_lora.training.plan import batch_ids, check_cut, cut, total_steps

logger = logging.getLogger(__name__)

Backward = Callable[[Sequence[Example], np.ndarray, float], Tensor]
"""(examples, choice of diagonals, weight) -> the weighted loss; its gradients are added up."""

# Of gradients of one shape that are looked at together.
STACKED_BYTES = 2**28
# A forward as a CUDA graph has multiples of these, so that sizes come back.
TOKENS_MULTIPLE, LABELS_MULTIPLE = 256, 512
# Between two checkpoints, and the share of the time that saving them may take: a large adapter on a
# slow disk is saved less often.
SAVE_SECONDS, SAVING_SHARE = 30.0, 0.02
# Seconds between two progress lines.
PROGRESS_EVERY = 5.0


def fit(
    model: PreTrainedModel,
    examples: Sequence[Example],
    method: Method,
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Train the adapters of `model` in place and return the summary for the record.

    The loss of a step is the mean over the label tokens of its whole effective batch, over all
    processes and forwards. Resumes from the newest checkpoint in `folder`; appends to
    `folder/train.jsonl` and hands each of its rows to `on_step`. Raises FloatingPointError naming
    step and samples on a non-finite loss.
    """
    settings = config.trainer
    check_cut(settings.effective_batch, accelerator.num_processes, settings.micro_batch)
    steps = total_steps(
        len(examples), settings.effective_batch, settings.epochs, settings.max_steps
    )
    parameters = list(adapter_parameters(model).values())
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )
    method.hooks.start(adapter_parameters(model), optimizer, steps)
    log = _StepLog(folder, steps, accelerator.is_main_process, on_step)
    first, spent = 0, 0.0
    if state := load_checkpoint(folder / "checkpoints", device):
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
        logger.info("resuming at step %d of %d", first, steps)
    log.start(first)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        # Not the first: its input needs no gradient, so it would be compiled for itself alone.
        for layer in list(decoder_layers(model))[1:]:
            layer.compile(dynamic=True)
    graphs = None
    # Sharded weights are gathered anew in each forward, so they are in no fixed place; padded rows
    # have too many shapes, and recomputing activations reads random states from the device.
    sharded = accelerator.distributed_type == DistributedType.FSDP
    refused = sharded or not settings.packed or settings.gradient_checkpointing
    if settings.cuda_graphs and device.type == "cuda" and not refused:
        graphs = Graphs()
        for parameter in parameters:  # a graph adds to gradients that stay where they are
            parameter.grad = torch.zeros_like(parameter)
    elif settings.cuda_graphs:
        logger.info(
            "trainer.cuda_graphs has no effect: it needs a GPU, packed rows, an unsharded model "
            "and no gradient checkpointing"
        )
    bank = method.diagonals.to(device)
    if settings.packed:
        backward = packed_backward(model, bank, config, graphs)
    else:
        backward = padded_backward(model, bank)
    reset_peak(device)
    began = saved = time.monotonic()
    saving = 0.0
    model.train()
    # The attention is in place for the backward pass too, where checkpointed layers run again.
    with (
        packed_attention(model) if settings.packed else nullcontext(),
        # A diagonal for every token has as many rows as the batch has tokens.
        torch._dynamo.config.patch(force_nn_module_property_static_shapes=False)
        if settings.compile
        else nullcontext(),
        log,
    ):
        for step in range(first, steps):
            ids = batch_ids(config.seed, step, len(examples), settings.effective_batch)
            batch = [examples[i] for i in ids]
            choice = method.choose(config.seed, step, len(ids), settings.micro_batch)
            same = bool((choice == choice[0]).all())
            label_tokens = sum(example.labels for example in batch)
            loss = torch.zeros((), dtype=torch.float32, device=device)
            for forward, weight in _forwards(batch, settings, accelerator):
                loss += backward(
                    [batch[i] for i in forward],
                    choice[:1] if same else choice[forward],
                    weight / label_tokens,
                )
            _sum_over_processes(parameters, loss, accelerator)
            method.hooks.after_backward(step, choice)
            rows = _row_square_sums(parameters)
            norm = rows.sum().sqrt()
            scale = (settings.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(_grads(parameters), scale)
            lr = settings.lr * (1 - step / steps)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            method.hooks.after_update(step, lr)
            optimizer.zero_grad(set_to_none=graphs is None)
            log.add(
                step,
                [example.record for example in batch],
                {
                    "loss": loss,
                    "grad_norm": norm,
                    "block_grad_norms": _block_norms(rows, config.train_ranks),
                },
                {
                    "lr": lr,
                    "label_tokens": label_tokens,
                    "tokens": sum(len(example.tokens) for example in batch),
                    "ranks": np.bincount(choice, minlength=len(method.ranks)).tolist(),
                    "seconds": spent + time.monotonic() - began,
                },
            )
            done = step + 1
            if settings.save_every is None:
                due = time.monotonic() - saved > max(SAVE_SECONDS, saving / SAVING_SHARE)
            else:
                due = done % settings.save_every == 0
            if due and done < steps:
                log.sync()
                saved = time.monotonic()
                if accelerator.is_main_process:
                    state = {
                        "step": done,
                        "seconds": spent + time.monotonic() - began,
                        "parameters": [parameter.detach() for parameter in parameters],
                        "optimizer": optimizer.state_dict(),
                    }
                    save_checkpoint(folder / "checkpoints", done, state)
                saving = time.monotonic() - saved
        log.flush()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if settings.compile:
        for layer in decoder_layers(model):
            layer._compiled_call_impl = None  # evaluation has other shapes and dtypes
    return log.summary(peak_gib(device, graphs is not None)) | {"cuda_graphs": graphs is not None}


def reset_peak(device: torch.device) -> None:
    """Forget the memory that what came before took."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device, graphs: bool = False) -> float | None:
    """The most memory that torch had in use since it was last reset; None on a CPU.

    graphs: what CUDA graphs keep for themselves counts, and with it what is held and not in use.
    """
    if device.type != "cuda":
        return None
    measure = torch.cuda.max_memory_reserved if graphs else torch.cuda.max_memory_allocated
    return measure(device) / 2**30


def packed_backward(
    model: PreTrainedModel, bank: Tensor, config: Config, graphs: Graphs | None
) -> Backward:
    """Forward and backward of packed rows; bank: (K, R), the diagonals that are chosen from.

    With `graphs` the sizes are rounded up and each size has tensors of its own that stay.
    """
    device = model.device
    round_to = (1, 1) if graphs is None else (TOKENS_MULTIPLE, LABELS_MULTIPLE)
    longest = max(config.dataset.max_length, round_to[0])
    # Compiled, no float32 copy of the logits is made.
    loss = torch.compile(label_loss, dynamic=True) if config.trainer.compile else label_loss
    static: dict[tuple[torch.Size, ...], dict[str, Tensor]] = {}

    def run(batch: dict[str, Tensor]) -> Tensor:
        part = packed_loss(model, batch, bank, longest, loss) * batch["weight"]
        part.backward()
        return part.detach()

    def backward(examples: Sequence[Example], choice: np.ndarray, weight: float) -> Tensor:
        batch = packed_batch(examples, choice, round_to, longest)
        batch = on_device(batch | {"weight": torch.tensor(weight, dtype=torch.float64)}, device)
        if graphs is None:
            return run(batch)
        sizes = tuple(tensor.shape for tensor in batch.values())
        fixed = static.setdefault(sizes, batch)
        for name, tensor in batch.items():
            fixed[name].copy_(tensor)
        # One diagonal for all is compiled for itself.
        return graphs(len(choice) > 1, sizes, lambda: run(fixed))

    return backward


def padded_backward(model: PreTrainedModel, bank: Tensor) -> Backward:
    """Forward and backward of padded rows."""

    def backward(examples: Sequence[Example], choice: np.ndarray, weight: float) -> Tensor:
        p = bank[choice[0]] if len(choice) == 1 else bank[torch.from_numpy(choice).to(bank.device)]
        part = batch_loss(model, examples, p, packed=False) * weight
        part.backward()
        return part.detach()

    return backward


def _forwards(
    batch: Sequence[Example], settings: TrainerConfig, accelerator: Accelerator
) -> Iterator[tuple[list[int], float]]:
    """(positions in the effective batch, weight) of each forward of this process.

    Where the base is sharded every process must run equally many forwards: one that has fewer
    repeats a sample with weight 0.
    """
    lengths = [len(example.tokens) for example in batch]
    cuts = [
        cut(
            lengths,
            process,
            accelerator.num_processes,
            settings.micro_batch,
            settings.max_tokens,
            padded=not settings.packed,
        )
        for process in range(accelerator.num_processes)
    ]
    mine = cuts[accelerator.process_index]
    yield from ((positions, 1.0) for positions in mine)
    if accelerator.distributed_type == DistributedType.FSDP:
        for _ in range(max(map(len, cuts)) - len(mine)):
            yield [0], 0.0


def _sum_over_processes(
    parameters: Sequence[nn.Parameter], loss: Tensor, accelerator: Accelerator
) -> None:
    """Add up gradients and loss over the processes, in one message."""
    for parameter in parameters:
        if parameter.grad is None:  # a process without a sample in the last batch of an epoch
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    grads = [*_grads(parameters), loss]
    total = accelerator.reduce(torch.cat([grad.float().flatten() for grad in grads]), "sum")
    for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def _grads(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _factor_pairs(parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, int]]:
    """(factor, axis of the rank): lora_A is (R, in) and lora_B (out, R), in turn."""
    for index, parameter in enumerate(parameters):
        yield parameter, index % 2


def _row_square_sums(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Squared gradient norm of each of the R rows over all layers.

    Gradients of one shape are stacked, up to STACKED_BYTES: a kernel for each of the hundreds of
    factors takes longer to launch than to run.
    """
    groups: dict[tuple[torch.Size, int], list[list[Tensor]]] = {}
    for parameter, axis in _factor_pairs(parameters):
        grad = parameter.grad
        assert grad is not None
        stacks = groups.setdefault((grad.shape, axis), [[]])
        if len(stacks[-1]) >= max(STACKED_BYTES // (grad.numel() * grad.itemsize), 1):
            stacks.append([])
        stacks[-1].append(grad)
    sums = [
        torch.linalg.vector_norm(
            torch.stack(stack),
            dim=(0, 2 - axis),
            dtype=torch.promote_types(stack[0].dtype, torch.float32),
        )
        for (_, axis), stacks in groups.items()
        for stack in stacks
    ]
    return torch.stack(sums).square().sum(0)


def _block_norms(rows: Tensor, ranks: Sequence[int]) -> Tensor:
    """Gradient norm of each block of rows between neighbouring sub-ranks, (len(ranks),)."""
    blocks = zip([0, *ranks], ranks, strict=False)
    return torch.stack([rows[start:end].sum() for start, end in blocks]).sqrt()


class _StepLog:
    """`train.jsonl` and the progress line.

    Values are read one step late, so that the device always has a step to go on with: a non-finite
    loss is noticed before the next checkpoint, at the latest one step after it came up.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        writes: bool,
        on_step: Callable[[dict[str, Any]], None],
    ) -> None:
        self.path, self.steps, self.writes, self.on_step = (
            folder / "train.jsonl",
            steps,
            writes,
            on_step,
        )
        self.rows: list[dict[str, Any]] = []
        self.pending: tuple[int, list[int], Callable[[], dict[str, Tensor]], dict[str, Any]] | None
        self.pending = None
        self.shown = time.monotonic()
        self.file: Any = None

    def start(self, first: int) -> None:
        """Keep the rows of the steps before `first`, as a checkpoint may be older than the log."""
        if self.path.is_file():
            # A kill may leave half a line behind those that the checkpoint stands on.
            lines = self.path.read_text().split("\n")[:-1]
            self.rows = [json.loads(line) for line in lines[:first]]
        if len(self.rows) < first and self.writes:
            raise ValueError(
                f"{self.path} has {len(self.rows)} rows, its checkpoint is of step {first}; "
                "restore the file, or set force=true to train again"
            )
        if self.writes:
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_atomically(self.path, text.encode())
            self.file = self.path.open("a")

    def add(
        self, step: int, records: list[int], tensors: dict[str, Tensor], row: dict[str, Any]
    ) -> None:
        # Asked for now: a copy that is asked for later comes behind the next step's work.
        values = to_host(tensors)
        self.flush()
        self.pending = (step, records, values, row)

    def sync(self) -> None:
        """`flush`, and have all rows on the disk, so that no checkpoint is ahead of them."""
        self.flush()
        if self.file is not None:
            os.fsync(self.file.fileno())

    def flush(self) -> None:
        """Read the values of the last step, write its row, show progress."""
        if self.pending is None:
            return
        step, records, values_of, row = self.pending
        self.pending = None
        values: dict[str, Any] = {k: tensor.tolist() for k, tensor in values_of().items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(
                f"step {step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
                f"training records of the step, counted from 1: {records}. Lower trainer.lr, or "
                "look at these records"
            )
        before = self.rows[-1]["seconds"] if self.rows else 0.0
        row["tokens_per_second"] = row["tokens"] / max(row["seconds"] - before, 1e-9)
        self.rows.append({"step": step, **values, **row})
        if not self.writes:
            return
        self.file.write(json.dumps(self.rows[-1]) + "\n")
        self.file.flush()
        self.on_step(self.rows[-1])
        if time.monotonic() - self.shown > PROGRESS_EVERY or step + 1 in (1, self.steps):
            self.shown = time.monotonic()
            window = self.rows[-50:]
            span = window[-1]["seconds"] - (self.rows[-51]["seconds"] if step >= 50 else 0.0)
            speed = sum(row["tokens"] for row in window) / span
            rate = span / len(window)
            logger.info(
                "step %d/%d  loss %.4f  %.0f tokens/s  %s left",
                step + 1,
                self.steps,
                values["loss"],
                speed,
                timedelta(seconds=round(rate * (self.steps - step - 1))),
            )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def summary(self, peak_memory_gib: float | None) -> dict[str, Any]:
        last = self.rows[-10:]
        seconds = self.rows[-1]["seconds"]
        tokens = sum(row["tokens"] for row in self.rows)
        return {
            "steps": len(self.rows),
            "tokens": tokens,
            "label_tokens": sum(row["label_tokens"] for row in self.rows),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": peak_memory_gib,
            "first_loss": self.rows[0]["loss"],
            "final_loss": sum(row["loss"] for row in last) / len(last),
        }
