"""One run: identify it, build the model, train the adapter, evaluate it at every rank, report."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora import methods
from matryoshka_lora.comparison import note_run
from matryoshka_lora.config import VALIDATION, Config, build_method, recorded, wanted_points
from matryoshka_lora.core.adapter import adapter_view, set_importance
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import check_writable, write_atomically
from matryoshka_lora.core.storage import save_adapter
from matryoshka_lora.data.examples import Example
from matryoshka_lora.evaluation.engines import make_engine
from matryoshka_lora.evaluation.engines.protocol import Point
from matryoshka_lora.evaluation.held_out import held_out_rows
from matryoshka_lora.evaluation.own_tasks import fingerprints_of, flat, load_own_and_harness_tasks
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.evaluation.rows import Row
from matryoshka_lora.evaluation.sweep import Source, run_sweep
from matryoshka_lora.evaluation.tasks import EvalTask
from matryoshka_lora.identity import model_identity
from matryoshka_lora.inputs import Inputs, Tokens, prepare, tokenize_records
from matryoshka_lora.loading import (
    adapter_facts,
    build_model,
    check_base,
    load_factors,
    read_run,
    warn_of_narrow_layers,
)
from matryoshka_lora.memory import estimate, print_estimate
from matryoshka_lora.model_checks import check_model
from matryoshka_lora.models import load_tokenizer
from matryoshka_lora.processes import (
    build_adapted_model,
    is_sharded,
    make_accelerator,
    on_main,
)
from matryoshka_lora.reporting import format_run_table, plot_tables, run_tables, write_tables
from matryoshka_lora.runs.folder import RunFolder, runs_root
from matryoshka_lora.runs.lock import locked
from matryoshka_lora.runs.progress import (
    Additions,
    finished_record,
    has_points,
    is_trained,
    open_record,
    record_failure,
    replacing,
)
from matryoshka_lora.runs.provenance import new_phase
from matryoshka_lora.runs.record import Record, write_record
from matryoshka_lora.tracking import Tracker, make_tracker
from matryoshka_lora.training.loop import fit
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
        _dry_run(config, inputs, main)
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
        record = _start_record(config, inputs, tokens, folder, accelerator)
        tracker = make_tracker(config, record.run_hash, folder.path, main)
        try:
            model = build_adapted_model(config, accelerator)
            lm = check_model(config, model, tokens, flat(tasks), accelerator)
            if is_trained(folder, record):
                logger.info("training is finished; reading %s", folder.adapter)
                load_factors(read_run(folder.path), model)
            else:
                train(config, model, tokens.train, record, folder, accelerator, tracker, has_begun)
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


def train(
    config: Config,
    model: PreTrainedModel,
    examples: Sequence[Example],
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
            *(model, examples, method, config, folder.path, accelerator),
            on_step=on_step,
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


def evaluate(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[EvalTask]],
    held_out: Sequence[Example],
    fingerprints: Mapping[str, str],
    record: Record,
    folder: RunFolder,
    accelerator: Accelerator,
    lm: HFLM | None = None,
) -> None:
    """Add the rows of every point that is missing to `record`, saving it after each point.

    fingerprints: of the content behind `tasks` and `held_out`, as `wanted_points` takes them.
    lm: what `check_model` returned.
    """
    main, sharded = accelerator.is_main_process, is_sharded(accelerator)
    plan = plan_points(
        adapter_view(model), config.eval_ranks, config.eval.rules, config.train_ranks
    )
    settings = dataclasses.asdict(config.eval)
    phase = new_phase("evaluation", accelerator.num_processes, settings=settings)
    own = {key: value for key, value in fingerprints.items() if key == VALIDATION}
    measured = has_points(record, wanted_points(config, own))
    additions = Additions(record, folder, phase)

    def on_point(source: Source, point: Point, rows: list[Row], computed: bool) -> None:
        additions.add(rows, computed)
        shown = [
            f"{row.metric}{f' ({row.filter})' if row.filter else ''} {row.value:.4f}"
            for row in rows
            if (row.rank, row.rule) == (point.rank, point.rule) and row.value is not None
        ]
        logger.info(
            "%s %d-shot  rank %d %s: %s",
            *(source.name, source.shots, point.rank, point.rule, ", ".join(shown)),
        )

    if held_out and not measured:
        rows = held_out_rows(
            *(model, held_out, plan, config.trainer.packed, accelerator), fingerprints[VALIDATION]
        )
        if main:
            additions.add(rows, computed=True)
    if tasks:
        run_sweep(
            model,
            tokenizer,
            flat(tasks),
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
            lm=lm,
            processes=accelerator,
            lockstep=sharded,
            on_point=on_point,
        )
    if main:
        truncated = dict((record.evaluation or {}).get("truncated_prompts", {}))
        truncated |= {f"{task.name}:{task.shots}": task.truncated for task in flat(tasks)}
        additions.finish(wanted_points(config, fingerprints), truncated_prompts=truncated)


def _is_complete(record: Record, own: Config, held_out: dict[str, str]) -> bool:
    """Whether the record has every point that its own config asks for, on today's documents.

    held_out: the fingerprint of its held-out records, as `wanted_points` takes it.
    """
    fingerprints = fingerprints_of(load_own_and_harness_tasks(own)) | held_out
    return has_points(record, wanted_points(own, fingerprints))


def report(record: Record, folder: RunFolder) -> Path | None:
    """Print the rank-accuracy table, write table and plot beside the record, name the files.

    Returns the plot as PNG, or None where the record has no rows for one or nothing can be written:
    a finished run is shown on a disk that is only read, too.
    """
    note_run(folder.record)
    tables = run_tables(record)
    print(f"\n{format_run_table(record)}\n")
    if not tables:
        return None
    files = (folder.record, folder.adapter, folder.config, folder.train_log, folder.samples)
    paths = [path for path in files if path.exists()]
    try:
        paths += write_tables(tables, folder.table, title=record.name)
        figures = plot_tables(tables, folder.plot)
    except OSError as error:
        logger.warning("table and plot are not written: %s", error)
        return None
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
    accelerator.wait_for_everyone()  # the main process may have set an older run aside
    fresh = Record(
        status="training",
        name=str(folder.path.relative_to(runs_root(config))),
        config=recorded(config),
        run_hash=inputs.run_hash,
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
