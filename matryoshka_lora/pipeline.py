"""One run: identify it, build the model, train the adapter, evaluate it at every rank, report."""

import dataclasses
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.comparison import note_run
from matryoshka_lora.config import Config, build_method, wanted_points
from matryoshka_lora.core.adapter import adapter_spec
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.core.storage import save_adapter
from matryoshka_lora.data.examples import Example
from matryoshka_lora.evaluation.engines import make_engine
from matryoshka_lora.evaluation.engines.protocol import Point
from matryoshka_lora.evaluation.held_out import held_out_rows
from matryoshka_lora.evaluation.own_tasks import load_own_and_harness_tasks
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.evaluation.rows import Row, merge_rows
from matryoshka_lora.evaluation.sweep import Source, run_sweep
from matryoshka_lora.evaluation.tasks import EvalTask
from matryoshka_lora.inputs import Inputs, Tokens, prepare, tokenize_records
from matryoshka_lora.loading import (
    adapter_facts,
    build_model,
    check_base,
    load_factors,
    read_run,
)
from matryoshka_lora.memory import estimate, print_estimate
from matryoshka_lora.models import load_tokenizer
from matryoshka_lora.processes import build_adapted_model, is_sharded, make_accelerator
from matryoshka_lora.reporting import format_run_table, plot_tables, run_tables, write_tables
from matryoshka_lora.runs.folder import RunFolder, runs_root
from matryoshka_lora.runs.progress import (
    finished_record,
    is_trained,
    open_record,
    record_failure,
)
from matryoshka_lora.runs.provenance import environment
from matryoshka_lora.runs.record import Record, write_record
from matryoshka_lora.tracking import Tracker, make_tracker
from matryoshka_lora.training.loop import fit
from matryoshka_lora.training.plan import check_effective_batch

logger = logging.getLogger(__name__)


def run(config: Config) -> Record | None:
    """Do what is missing of the run and return its record (None but on the main process)."""
    accelerator = make_accelerator()
    main = accelerator.is_main_process
    check_effective_batch(
        config.trainer.effective_batch, accelerator.num_processes, config.trainer.micro_batch
    )
    inputs = prepare(config)
    if config.trainer.dry_run:
        _dry_run(config, inputs, main)
        return None
    folder = RunFolder(inputs.folder)
    record = finished_record(config, folder)
    if record is not None:
        if main:
            logger.info("this run is finished; force=true would make it again")
            report(record, folder)
        return record
    tasks = load_own_and_harness_tasks(config, accelerator)
    tokens = tokenize_records(config, inputs)
    # The shape alone tells whether the targets exist, long before weights are read.
    build_model(config, torch.device("meta"))
    record = _start_record(config, inputs, tokens, folder, accelerator)
    tracker = make_tracker(config, inputs.run_hash, folder.path, main)
    try:
        model = build_adapted_model(config, accelerator)
        if is_trained(folder, record):
            logger.info("training is finished; reading %s", folder.adapter)
            load_factors(read_run(folder.path), model)
        else:
            train(config, inputs, model, tokens.train, record, folder, accelerator, tracker)
        evaluate(
            config, model, tokens.tokenizer, tasks, tokens.held_out, record, folder, accelerator
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


def evaluate_run(folder: Path, config: Config) -> Record | None:
    """Evaluate a trained run as `config.eval` says and add the rows to its record.

    config: the run's own, but for `eval` and `model.path`. Rows that are there already stay.
    Raises UserError where the run is not trained or the base model is another one.
    """
    trained = dataclasses.replace(read_run(folder), config=config)
    check_base(trained)
    record = trained.record
    accelerator = make_accelerator()
    tasks = load_own_and_harness_tasks(config, accelerator)
    tokenizer = load_tokenizer(config.model)
    model = build_adapted_model(config, accelerator)
    load_factors(trained, model)
    evaluate(config, model, tokenizer, tasks, [], record, trained.folder, accelerator)
    if not accelerator.is_main_process:
        return None
    record.error = None
    write_record(trained.folder.record, record)
    report(record, trained.folder)
    return record


def train(
    config: Config,
    inputs: Inputs,
    model: PreTrainedModel,
    examples: Sequence[Example],
    record: Record,
    folder: RunFolder,
    accelerator: Accelerator,
    tracker: Tracker,
) -> None:
    """Train the adapter of `model`, save it and write the training's summary to the record."""
    logger.info("training %s in %s", config.method.name, folder.path)
    try:
        record.training = fit(
            model,
            examples,
            build_method(config),
            config,
            folder.path,
            accelerator,
            on_step=tracker.step,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{str(error).splitlines()[0]} Lower trainer.max_tokens "
            f"({config.trainer.max_tokens}) or set trainer.micro_batch, or set "
            "trainer.gradient_checkpointing=true, or trainer.cuda_graphs=false"
        ) from error
    if accelerator.is_main_process:
        save_adapter(folder.adapter, model, adapter_facts(inputs.model, inputs.run_hash))
        record.status = "evaluating"
        write_record(folder.record, record)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def evaluate(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EvalTask],
    held_out: Sequence[Example],
    record: Record,
    folder: RunFolder,
    accelerator: Accelerator,
) -> None:
    """Add the rows of every point that is missing to `record`, saving it after each point."""
    main = accelerator.is_main_process
    sharded = is_sharded(accelerator)
    plan = plan_points(
        adapter_spec(model), config.eval_ranks, config.eval.rules, config.train_ranks
    )
    facts: dict[str, Any] = {"seconds": 0.0, "finished": []} | (record.evaluation or {})
    record.evaluation = facts
    spent, began = facts["seconds"], time.monotonic()

    def on_point(source: Source, point: Point, rows: list[Row]) -> None:
        record.rows = merge_rows(record.rows, rows)
        facts["seconds"] = spent + time.monotonic() - began
        write_record(folder.record, record)
        shown = [
            f"{row.metric}{f' ({row.filter})' if row.filter else ''} {row.value:.4f}"
            for row in rows
            if (row.rank, row.rule) == (point.rank, point.rule) and row.value is not None
        ]
        logger.info(
            "%s %d-shot  rank %d %s: %s",
            *(source.name, source.shots, point.rank, point.rule, ", ".join(shown)),
        )

    if held_out:
        rows = held_out_rows(model, held_out, plan, config.trainer.packed, accelerator)
        record.rows = merge_rows(record.rows, rows)
    if tasks:
        run_sweep(
            model,
            tokenizer,
            tasks,
            plan,
            make_engine(
                config.eval.engine,
                model,
                tokenizer,
                batch_size=config.eval.batch_size,
                cuda_graphs=config.eval.cuda_graphs,
                lockstep=sharded,
            ),
            folder.samples,
            identity=record.run_hash,
            processes=accelerator,
            lockstep=sharded,
            on_point=on_point,
        )
        if main:
            facts["truncated_prompts"] = dict(facts.get("truncated_prompts", {})) | {
                f"{task.name}:{task.shots}": task.truncated for task in tasks
            }
    facts["engine"] = config.eval.engine
    facts["finished"] = sorted({*facts["finished"], *wanted_points(config)})
    facts["seconds"] = spent + time.monotonic() - began


def report(record: Record, folder: RunFolder) -> Path | None:
    """Print the rank-accuracy table, write table and plot beside the record, name the files.

    Returns the plot as PNG, or None where the record has no rows for one.
    """
    note_run(folder.record)
    tables = run_tables(record)
    print(f"\n{format_run_table(record)}\n")
    if not tables:
        return None
    files = (folder.record, folder.adapter, folder.config, folder.train_log, folder.samples)
    paths = [path for path in files if path.exists()]
    paths += write_tables(tables, folder.table, title=record.name)
    figures = plot_tables(tables, folder.plot)
    print("wrote", *(str(path) for path in [*paths, *figures]), sep="\n  ", flush=True)
    return next(path for path in figures if path.suffix == ".png")


def _dry_run(config: Config, inputs: Inputs, main: bool) -> None:
    """Print what the training would take, from the model's shape alone."""
    tokens = tokenize_records(config, inputs)
    shape = build_model(config, torch.device("meta"))
    if main:
        print_estimate(estimate(config, shape, tokens.train), tokens.embedded)


def _start_record(
    config: Config, inputs: Inputs, tokens: Tokens, folder: RunFolder, accelerator: Accelerator
) -> Record:
    """The run's record so far, or a new one; the main process writes it and the config."""
    main = accelerator.is_main_process
    if config.force and main and folder.path.exists():
        shutil.rmtree(folder.path)
    accelerator.wait_for_everyone()
    facts = environment()
    fresh = Record(
        status="training",
        name=str(folder.path.relative_to(runs_root(config))),
        config=dataclasses.asdict(config),
        run_hash=inputs.run_hash,
        git=facts["git"],
        versions=facts["versions"],
        device=facts["device"] | {"processes": accelerator.num_processes},
        model=inputs.model,
        data=inputs.data | tokens.facts,
    )
    record = open_record(config, folder, fresh)
    if main:
        write_record(folder.record, record)
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        write_atomically(folder.config, text.encode())
    accelerator.wait_for_everyone()
    return record
