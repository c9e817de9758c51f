"""The training loop."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from matryoshka_lora.config import Config
from matryoshka_lora.core.adapter import adapter_parameters
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.data.examples import Example
from matryoshka_lora.methods import Method
from matryoshka_lora.training.checkpoints import Checkpoints, TrainingState
from matryoshka_lora.training.forwards import (
    backward_of,
    forwards_of_process,
    graphs_of,
    reading_mode,
    training_mode,
)
from matryoshka_lora.training.gradients import (
    add_penalty,
    are_same_on_all_processes,
    block_norms,
    clip,
    rank_square_norms,
    sum_over_processes,
)
from matryoshka_lora.training.plan import (
    batch_ids,
    check_effective_batch,
    is_validated,
    steps_per_epoch,
    total_steps,
    validation_sample,
)
from matryoshka_lora.training.step_log import StepLog

logger = logging.getLogger(__name__)


def fit(
    model: PreTrainedModel,
    examples: Sequence[Example],
    method: Method,
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    on_step: Callable[[dict[str, Any]], None] = lambda entry: None,
    held_out: Sequence[Example] = (),
    loss_on: Callable[[Sequence[Example]], float] | None = None,
) -> dict[str, Any]:
    """Train the adapters of `model` in place; returns the summary for the run's record.

    The loss of a step is the mean over the label tokens of its whole effective batch, over all
    processes and forwards. Resumes from the newest checkpoint in `folder`; appends one entry a step
    to `folder/train.jsonl` and hands it to `on_step`. On the way it reads a sample of `held_out` by
    `loss_on`, as `trainer.validate_every` says; all processes call that at the same steps.

    Raises FloatingPointError, naming step and records, if a loss or the gradient norm is not
    finite, and UserError if the effective batch cannot be split evenly or a checkpoint is not of
    this training.
    """
    settings = config.trainer
    check_effective_batch(settings.effective_batch, accelerator.num_processes, settings.micro_batch)
    steps = total_steps(len(examples), settings)
    parameters = adapter_parameters(model)
    device = next(iter(parameters.values())).device
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=settings.rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )
    hooks = method.hooks
    hooks.start(parameters, optimizer, steps)
    state = TrainingState(parameters, optimizer, hooks)
    checkpoints = Checkpoints(
        folder / "checkpoints", settings.save_every, accelerator.is_main_process
    )
    first, spent = checkpoints.resume(state)
    if first:
        logger.info("resuming at step %d of %d", first, steps)
    read = validation_sample(held_out) if loss_on is not None else []
    log = StepLog(folder, steps, accelerator.is_main_process, on_step)
    log.start(first)
    graphs = graphs_of(settings, accelerator, parameters.values(), device)
    backward = backward_of(model, method.diagonals, config, graphs)
    reset_peak(device)
    began = time.monotonic()
    with training_mode(model, settings) as switched_off, log:
        for step in range(first, steps):
            ids = batch_ids(config.seed, step, len(examples), settings.effective_batch)
            batch = [examples[i] for i in ids]
            choice = method.choose(config.seed, step, len(ids), settings.micro_batch)
            one_for_all = bool((choice == choice[0]).all())
            label_tokens = sum(example.labels for example in batch)
            if not label_tokens:
                raise UserError(
                    f"no sample of step {step + 1} has a label; raise trainer.effective_batch="
                    f"{settings.effective_batch} or set dataset.keep_masked=false"
                )

            loss = torch.zeros((), dtype=torch.float32, device=device)
            for positions, weight in forwards_of_process(batch, settings, accelerator):
                loss += backward(
                    [batch[i] for i in positions],
                    choice[:1] if one_for_all else choice[positions],
                    weight / label_tokens,
                )
            sum_over_processes(parameters, loss, accelerator)
            add_penalty(hooks)
            hooks.after_backward(step, choice)
            square_norms = rank_square_norms(parameters)
            norm = square_norms.sum().sqrt()
            clip(parameters, norm, settings.clip_norm)
            lr = settings.rate * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            hooks.after_update(step, lr)
            optimizer.zero_grad(set_to_none=graphs is None)
            done = step + 1
            validation: dict[str, float] = {}
            if read and loss_on is not None and is_validated(done, len(examples), settings):
                validation = _validation(model, read, loss_on, device)

            seconds = spent + time.monotonic() - began
            log.add(
                step,
                [example.record for example in batch],
                {
                    "loss": loss,
                    "grad_norm": norm,
                    "block_grad_norms": block_norms(square_norms, config.train_ranks),
                },
                {
                    "lr": lr,
                    "label_tokens": label_tokens,
                    "tokens": sum(len(example.tokens) for example in batch),
                    "ranks": np.bincount(choice, minlength=len(method.ranks)).tolist(),
                    "seconds": seconds,
                    **validation,
                },
            )
            if done < steps and checkpoints.due(done):
                log.sync()
                checkpoints.save(state, done, spent + time.monotonic() - began)
        log.flush()
    optimizer.zero_grad(set_to_none=True)
    summary = log.summary(peak_gib(device, graphs is not None))
    summary["cuda_graphs"] = graphs is not None
    if accelerator.num_processes > 1:
        summary["same_on_all_processes"] = are_same_on_all_processes(parameters, accelerator)
        if not summary["same_on_all_processes"]:
            logger.warning("the processes ended with different adapters; the first one's is kept")
    if switched_off:
        summary["dropout_switched_off"] = switched_off
    if validated := [entry for entry in log.entries if "validation_loss" in entry]:
        epoch = steps_per_epoch(len(examples), settings.effective_batch)
        summary["validation"] = {
            "records": len(read),
            "epochs": [(entry["step"] + 1) / epoch for entry in validated],
            "losses": [entry["validation_loss"] for entry in validated],
            "seconds": sum(entry["validation_seconds"] for entry in validated),
        }
    return summary


def _validation(
    model: PreTrainedModel,
    read: Sequence[Example],
    loss_on: Callable[[Sequence[Example]], float],
    device: torch.device,
) -> dict[str, float]:
    """The loss on held-out records and the seconds it took, as an entry of the log has them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the step's own work is not of these seconds
    began = time.monotonic()
    with reading_mode(model):
        loss = loss_on(read)
    return {"validation_loss": loss, "validation_seconds": time.monotonic() - began}


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of peak memory, for `peak_gib`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device, graphs: bool = False) -> float | None:
    """The most memory, in GiB, that torch had in use since `reset_peak`; None on a CPU.

    graphs: with CUDA graphs, count the memory that torch held, in use or not: theirs is held.
    """
    if device.type != "cuda":
        return None
    measure = torch.cuda.max_memory_reserved if graphs else torch.cuda.max_memory_allocated
    return measure(device) / 2**30
