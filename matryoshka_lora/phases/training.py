"""Train a run's adapter, save it, and write what it took to the record."""

import logging
import shutil
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from matryoshka_lora.config import Config, build_method
from matryoshka_lora.core.adapter import set_importance
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.storage import save_adapter
from matryoshka_lora.evaluation.held_out import loss_at_full_rank
from matryoshka_lora.inputs import Tokens
from matryoshka_lora.loading import adapter_facts
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.provenance import new_phase
from matryoshka_lora.runs.record import Record, write_record
from matryoshka_lora.tracking import Tracker
from matryoshka_lora.training.loop import fit

logger = logging.getLogger(__name__)


def train(
    config: Config,
    model: PreTrainedModel,
    tokens: Tokens,
    record: Record,
    folder: RunFolder,
    accelerator: Accelerator,
    tracker: Tracker,
    has_begun: Callable[[], None],
) -> None:
    """Train the adapter of `model`, save it and write the training's summary to the record.

    has_begun: called after the first step.
    """
    logger.info("training %s in %s", config.method.name, folder.path)
    method = build_method(config)
    phase = new_phase("training", accelerator.num_processes)
    record.phases.append(phase)

    def on_step(entry: dict[str, Any]) -> None:
        if "first_step" not in phase:
            phase["first_step"] = entry["step"]
            write_record(folder.record, record)
            has_begun()
        tracker.step(entry)

    try:
        record.training = fit(
            *(model, tokens.train, method, config, folder.path, accelerator),
            on_step=on_step,
            held_out=tokens.held_out,
            loss_on=lambda examples: loss_at_full_rank(
                model, examples, config.trainer.packed, accelerator
            ),
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{str(error).splitlines()[0]} Lower trainer.max_tokens "
            f"({config.trainer.max_tokens}) or set trainer.micro_batch, or set "
            "trainer.gradient_checkpointing=true, or trainer.cuda_graphs=false"
        ) from error
    set_importance(model, method.hooks.importance())
    if accelerator.is_main_process:
        save_adapter(folder.adapter, model, adapter_facts(record.model, record.run_hash))
        record.status = "evaluating"
        write_record(folder.record, record)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
