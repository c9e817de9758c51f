"""Evaluate a trained run on further tasks."""

import dataclasses
import logging
from pathlib import Path

from matryoshka_lora.config import VALIDATION, Config, wanted_points
from matryoshka_lora.evaluation.own_tasks import fingerprints_of, flat, load_own_and_harness_tasks
from matryoshka_lora.inputs import Tokens
from matryoshka_lora.loading import check_base, load_factors, read_run
from matryoshka_lora.model_checks import check_model
from matryoshka_lora.models import load_tokenizer
from matryoshka_lora.phases.evaluation import evaluate
from matryoshka_lora.phases.report import report
from matryoshka_lora.processes import build_adapted_model, make_accelerator
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.lock import locked
from matryoshka_lora.runs.progress import has_points
from matryoshka_lora.runs.record import Record, write_record

logger = logging.getLogger(__name__)


def evaluate_run(folder: Path, config: Config) -> Record | None:
    """Evaluate a trained run as `config.eval` says and add the rows to its record.

    config: the run's own, but for `eval` and `model.path`. Rows that are there already stay; a run
    whose own evaluation is complete with them is finished. Raises UserError where the run is not
    trained, another process works on it, or the base model is another one.
    """
    read_run(folder)
    accelerator = make_accelerator()
    with locked(RunFolder(folder), accelerator.is_main_process):
        recorded = read_run(folder)  # now that nobody else changes it
        trained, record = dataclasses.replace(recorded, config=config), recorded.record
        check_base(trained)
        tasks = load_own_and_harness_tasks(config, accelerator)
        tokenizer = load_tokenizer(config.model)
        model = build_adapted_model(config, accelerator)
        load_factors(trained, model)
        untrained = Tokens(tokenizer, [], [], {}, embedded=False)
        lm = check_model(config, model, untrained, flat(tasks), accelerator)
        evaluate(
            *(config, model, tokenizer, tasks, [], fingerprints_of(tasks)),
            *(record, trained.folder, accelerator, lm),
        )
        if not accelerator.is_main_process:
            return None
        own = dataclasses.replace(recorded.config, model=config.model)
        held_out = {VALIDATION: record.data.get("held_out_fingerprint", "")}
        if not has_points(record, wanted_points(own, held_out)):
            logger.warning(
                "the loss on held-out records is not computed here, where no training data is "
                "read; the command that trained the run does so"
            )
        if record.status == "finished" or _is_complete(record, own, held_out):
            record.status, record.error = "finished", None
        write_record(trained.folder.record, record)
        report(record, trained.folder)
    return record


def _is_complete(record: Record, own: Config, held_out: dict[str, str]) -> bool:
    """Whether the record has every point that its own config asks for, on today's documents.

    held_out: the fingerprint of its held-out records, as `wanted_points` takes it.
    """
    fingerprints = fingerprints_of(load_own_and_harness_tasks(own)) | held_out
    return has_points(record, wanted_points(own, fingerprints))
