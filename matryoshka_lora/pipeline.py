"""One run: identify it, build the model, train the adapter, evaluate it at every rank, report."""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator

from matryoshka_lora import methods
from matryoshka_lora.config import Config, wanted_points
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import check_writable
from matryoshka_lora.evaluation.own_tasks import fingerprints_of, flat, load_own_and_harness_tasks
from matryoshka_lora.identity import model_identity
from matryoshka_lora.inputs import Inputs, prepare, tokenize_records
from matryoshka_lora.loading import build_model, load_factors, read_run, warn_of_narrow_layers
from matryoshka_lora.memory import estimate, print_estimate
from matryoshka_lora.model_checks import check_model
from matryoshka_lora.phases.evaluation import evaluate
from matryoshka_lora.phases.report import report
from matryoshka_lora.phases.start import start_record
from matryoshka_lora.phases.training import train
from matryoshka_lora.processes import build_adapted_model, is_sharded, make_accelerator, on_main
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.lock import locked
from matryoshka_lora.runs.progress import finished_record, is_trained, record_failure, replacing
from matryoshka_lora.runs.record import Record, write_record
from matryoshka_lora.tracking import make_tracker
from matryoshka_lora.training.plan import check_effective_batch

logger = logging.getLogger(__name__)


def run(config: Config) -> Record | None:
    """Do what is missing of the run and return its record (None but on the main process)."""
    if not methods.get(config.method.name).trained:
        raise UserError(
            f"method.name={config.method.name} is not trained; choose one of "
            f"{', '.join(methods.TRAINED)}"
        )
    accelerator = make_accelerator()
    main = accelerator.is_main_process
    check_effective_batch(
        config.trainer.effective_batch, accelerator.num_processes, config.trainer.micro_batch
    )
    inputs = prepare(config, on_main(accelerator, lambda: model_identity(config.model)))
    if config.trainer.dry_run:
        _dry_run(config, inputs, accelerator)
        return None
    folder = RunFolder(inputs.folder)
    tasks = load_own_and_harness_tasks(config, accelerator)
    fingerprints = inputs.fingerprints | fingerprints_of(tasks)
    wanted = wanted_points(config, fingerprints)
    record = None if config.force else finished_record(folder, wanted)
    if record is not None:
        if main:
            logger.info("this run is finished; force=true would make it again")
            report(record, folder)
        return record
    if inputs.place.doubtful:
        logger.info("%s", inputs.place.doubtful)
    if main:
        check_writable(Path(config.output_dir), "output_dir", "choose another folder")
    tokens = tokenize_records(config, inputs)
    # The shape alone tells whether the targets exist, long before weights are read.
    shape = build_model(config, torch.device("meta"))
    if main:
        warn_of_narrow_layers(shape)
    with locked(folder, main), replacing(folder, config.force and main) as has_begun:
        record = start_record(config, inputs, tokens, folder, accelerator)
        tracker = make_tracker(config, record.run_hash, folder.path, main)
        try:
            model = build_adapted_model(config, accelerator)
            lm = check_model(config, model, tokens, flat(tasks), accelerator)
            if is_trained(folder, record):
                logger.info("training is finished; reading %s", folder.adapter)
                load_factors(read_run(folder.path), model)
            else:
                train(config, model, tokens, record, folder, accelerator, tracker, has_begun)
            evaluate(
                *(config, model, tokens.tokenizer, tasks, tokens.held_out, fingerprints),
                *(record, folder, accelerator, lm),
            )
            if main:
                record.status, record.error = "finished", None
                write_record(folder.record, record)
                tracker.finish(record, report(record, folder))
        except Exception as error:
            if main:
                record_failure(folder, record, error)
            tracker.close(1)
            raise
        tracker.close(0)
    return record if main else None


def _dry_run(config: Config, inputs: Inputs, accelerator: Accelerator) -> None:
    """Print what the training would take, from the model's shape alone."""
    tokens = tokenize_records(config, inputs)
    shape = build_model(config, torch.device("meta"))
    shards = accelerator.num_processes if is_sharded(accelerator) else 1
    if accelerator.is_main_process:
        print_estimate(estimate(config, shape, tokens.train, shards), tokens.embedded)
