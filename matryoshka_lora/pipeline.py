"""One run: build model, adapters, data; train; read the adapter at every rank; write the record."""

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, disable_fsdp_ram_efficient_loading
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.config import (
    Config,
    DatasetConfig,
    adapter_spec_of,
    build_method,
    run_folder,
    run_hash,
    short_name,
    wanted_points,
)
from matryoshka_lora.core.adapter import adapter_parameters, adapter_spec, add_adapters, use_factors
from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.core.storage import load_adapter, save_adapter
from matryoshka_lora.data import (
    Example,
    Split,
    fingerprint,
    load_records,
    split_validation,
    tokenize,
)
from matryoshka_lora.data import (
    Record as DataRecord,
)
from matryoshka_lora.evaluation.engines.batched.engine import BatchedEngine
from matryoshka_lora.evaluation.engines.hf import HFEngine
from matryoshka_lora.evaluation.engines.protocol import Engine, Point
from matryoshka_lora.evaluation.sweep import Plan, plan_points, run_sweep
from matryoshka_lora.evaluation.tasks import EvalTask, load_tasks
from matryoshka_lora.models import (
    DTYPES,
    EMBEDDED,
    decoder_layers,
    load_model,
    load_tokenizer,
    model_identity,
    source_of,
)
from matryoshka_lora.ops.attention import packed_attention
from matryoshka_lora.ops.device import let_segments_grow
from matryoshka_lora.reporting import format_run_table, plot_tables, run_tables, write_tables
from matryoshka_lora.runs.record import (
    Record,
    Row,
    environment,
    merge_rows,
    read_record,
    write_record,
)
from matryoshka_lora.tracking import make_tracker
from matryoshka_lora.training import batch_loss, fit
from matryoshka_lora.training.plan import check_cut, steps_per_epoch, total_steps

logger = logging.getLogger(__name__)

RECORD = "record.json"
ADAPTER = "adapter.safetensors"
# Harness tasks whose documents the package makes itself: task -> dataset.
OWN_TASKS = {"arithmetic_word_problems": "arithmetic"}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run is made of, known before anything heavy: it decides the folder."""

    train: list[DataRecord]
    held_out: list[DataRecord]
    data: dict[str, Any]
    model: dict[str, Any]
    run_hash: str
    folder: Path


def prepare(config: Config) -> Inputs:
    """Read the data and identify the model. Raises ValueError for whatever is wrong with either."""
    build_method(config)  # knows whether the method exists
    source_of(config.model)  # knows whether a folder is one of a model, before anything is read
    records = load_records(config.dataset)
    train, held_out = split_validation(records, config.dataset.validation)
    digest = fingerprint(train, config.dataset)
    data = {"fingerprint": digest, "held_out": len(held_out)}
    identity = model_identity(config.model)
    hash8 = run_hash(config, identity, digest)
    return Inputs(train, held_out, data, identity, hash8, run_folder(config, hash8))


def finished_record(config: Config, inputs: Inputs) -> Record | None:
    """The run's record if training and every point asked for are in it. ValueError if corrupt."""
    path = inputs.folder / RECORD
    if config.force or not path.exists():
        return None
    record = read_record(path)
    done = set((record.evaluation or {}).get("finished", ()))
    return (
        record if record.status == "finished" and done.issuperset(wanted_points(config)) else None
    )


def is_trained(folder: Path, record: Record) -> bool:
    """Whether the run's adapter is there to be evaluated."""
    return record.training is not None and (folder / ADAPTER).is_file()


def run(config: Config) -> Record | None:
    """Do what is missing of the run and return its record (None but on the main process)."""
    accelerator = make_accelerator()
    check_cut(config.trainer.effective_batch, accelerator.num_processes, config.trainer.micro_batch)
    inputs = prepare(config)
    folder, main = inputs.folder, accelerator.is_main_process
    record = None if config.trainer.dry_run else finished_record(config, inputs)
    if record is not None:
        if main:
            logger.info("this run is finished; force=true would make it again")
            _show(record, folder)
        return record
    dry = config.trainer.dry_run
    tasks = [] if dry else load_own_and_harness_tasks(config, accelerator)
    tokenizer = load_tokenizer(config.model)
    examples, counts = tokenize(inputs.train, config.dataset, tokenizer)
    held_out = tokenize(inputs.held_out, config.dataset, tokenizer)[0] if inputs.held_out else []
    # The shape alone tells whether the targets exist, long before weights are read.
    shape = load_model(config.model, torch.device("meta"))
    add_adapters(shape, adapter_spec_of(config), config.adapter.targets)
    embedded = tokenizer.name_or_path == str(EMBEDDED)
    if dry:
        if main:
            dry_run(config, shape, examples, embedded)
        return None
    if config.force and main and folder.exists():
        shutil.rmtree(folder)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    facts = counts | {"tokenizer": "embedded" if embedded else short_name(tokenizer.name_or_path)}
    record = _open_record(config, inputs, facts, accelerator)
    tracker = make_tracker(config, inputs.run_hash, folder, main)
    try:
        model = build_adapted_model(config, accelerator)
        if not is_trained(folder, record):
            logger.info("training %s in %s", config.method.name, folder)
            try:
                record.training = fit(
                    model,
                    examples,
                    build_method(config),
                    config,
                    folder,
                    accelerator,
                    on_step=tracker.step,
                )
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{str(error).splitlines()[0]} Lower trainer.max_tokens "
                    f"({config.trainer.max_tokens}) or set trainer.micro_batch, or set "
                    "trainer.gradient_checkpointing=true, or trainer.cuda_graphs=false"
                ) from error
            if main:
                made_of = {"base_model": inputs.model, "run_hash": inputs.run_hash}
                save_adapter(folder / ADAPTER, model, made_of)
                record.status = "evaluating"
                write_record(folder / RECORD, record)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        else:
            logger.info("training is finished; reading %s", folder / ADAPTER)
            load_adapter(folder / ADAPTER, model)
        evaluate(config, model, tokenizer, tasks, held_out, record, folder, accelerator)
        if main:
            record.status, record.error = "finished", None
            write_record(folder / RECORD, record)
            figure = _show(record, folder)
            tracker.finish(record, figure)
    except Exception as error:
        if main:
            record.error = f"{type(error).__name__}: {error}"
            # What a finished run has stays of use, whatever becomes of further points.
            if record.status != "finished":
                record.status = "failed"
            try:
                write_record(folder / RECORD, record)
            except (OSError, ValueError) as other:  # the disk, or the record, may be what failed
                logger.error("%s", other)
        tracker.close(1)
        raise
    tracker.close(0)
    return record if main else None


def evaluate_run(folder: Path, config: Config) -> Record | None:
    """Evaluate a trained run as `config.eval` says and add the rows to its record.

    config: the run's own, but for `eval` and `model.path`. Rows that are there already stay.
    Raises ValueError where the run is not trained or the base model is another one.
    """
    record = read_record(folder / RECORD)
    if not is_trained(folder, record):
        raise ValueError(
            f"{folder} is not trained yet (status {record.status}); run train.py first"
        )
    if config.model.path is None:
        # What the hub's branch was when the run was trained.
        config.model.revision = record.model["revision"] or config.model.revision
    elif record.model["revision"] is not None:
        logger.warning("taking %s for a copy of %s", config.model.path, record.model)
    if record.model["revision"] is None and model_identity(config.model) != record.model:
        raise ValueError(
            f"the base model of {folder} is {record.model}, which model.name={config.model.name} "
            f"model.path={config.model.path} is not"
        )
    accelerator = make_accelerator()
    tasks = load_own_and_harness_tasks(config, accelerator)
    tokenizer = load_tokenizer(config.model)
    model = build_adapted_model(config, accelerator)
    load_adapter(folder / ADAPTER, model)
    evaluate(config, model, tokenizer, tasks, [], record, folder, accelerator)
    if not accelerator.is_main_process:
        return None
    record.error = None
    write_record(folder / RECORD, record)
    _show(record, folder)
    return record


def make_accelerator() -> Accelerator:
    """Processes and device; attention without cuDNN in this process from now on.

    Raises ValueError where the processes do not know each other.
    """
    let_segments_grow()
    # Where torch prefers it, it plans anew for every shape, so in every decoding step of the HF
    # backend's first batches, and it rounds unlike the flash attention of packed rows.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Without being told, accelerate ignores the launcher where there is no GPU.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, but accelerate sees "
            f"{accelerator.num_processes}; use a file of configs/accelerate"
        )
    if not accelerator.is_main_process:
        logging.getLogger("matryoshka_lora").setLevel(logging.WARNING)
    return accelerator


def build_adapted_model(config: Config, accelerator: Accelerator) -> PreTrainedModel:
    """The base model with fresh adapters on this process's device, sharded under FSDP."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        # accelerate asks for it, and transformers 5.17 then leaves the weights of all processes but
        # the first at 0, for accelerate to fill.
        disable_fsdp_ram_efficient_loading()
    model = load_model(config.model, torch.device("cpu") if sharded else accelerator.device)
    add_adapters(
        model,
        adapter_spec_of(config),
        config.adapter.targets,
        init=config.adapter.init,
        dtype=DTYPES[config.adapter.dtype],
        seed=config.seed,
    )
    if sharded:
        shard_base(model, accelerator.device)
    return model


def shard_base(model: PreTrainedModel, device: torch.device) -> None:
    """Shard the frozen base over all processes (FSDP2), layer by layer.

    The adapters stay whole on every process, so training sums their gradients as without sharding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = set(adapter_parameters(model).values())
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(
                name, buffer.to(device), name not in module._non_persistent_buffers_set
            )
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def load_own_and_harness_tasks(config: Config, accelerator: Accelerator) -> list[EvalTask]:
    """The tasks of `eval.tasks`; for the package's own datasets their records are written."""
    tasks: list[EvalTask] = []
    for name, shots in config.tasks:
        data_path = None if config.eval.data_path is None else Path(config.eval.data_path)
        if name in OWN_TASKS and data_path is None:
            data_path = Path(config.output_dir) / "data" / OWN_TASKS[name]
            if accelerator.is_main_process:
                _write_own_data(OWN_TASKS[name], data_path)
            accelerator.wait_for_everyone()
        tasks += load_tasks([(name, shots)], data_path=data_path, limit=config.eval.limit)
    return tasks


def _write_own_data(dataset: str, folder: Path) -> None:
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        records = load_records(DatasetConfig(name=dataset), split)
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(folder / f"{split}.jsonl", text.encode())


def make_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lockstep: bool
) -> Engine:
    """The engine that `eval.engine` names. lockstep: the base is sharded over the processes."""
    if config.eval.engine == "hf":
        return HFEngine(model, tokenizer, batch_size=config.eval.batch_size)
    graphs = config.eval.cuda_graphs
    engine = BatchedEngine(model, tokenizer, cuda_graphs=graphs, lockstep=lockstep)
    if graphs and not engine.cuda_graphs:
        logger.info("eval.cuda_graphs has no effect: it needs a GPU and an unsharded model")
    return engine


def evaluate(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EvalTask],
    held_out: Sequence[Example],
    record: Record,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Add the rows of every point that is missing to `record`, saving it after each point."""
    main = accelerator.is_main_process
    sharded = accelerator.distributed_type == DistributedType.FSDP
    plan = plan_points(
        adapter_spec(model), config.eval_ranks, config.eval.rules, config.train_ranks
    )
    facts = record.evaluation = dict(record.evaluation or {"seconds": 0.0, "finished": []})
    spent, began = facts["seconds"], time.monotonic()

    def on_point(task: EvalTask, point: Point, rows: list[Row]) -> None:
        record.rows = merge_rows(record.rows, rows)
        facts["seconds"] = spent + time.monotonic() - began
        write_record(folder / RECORD, record)
        shown = [
            f"{row.metric}{f' ({row.filter})' if row.filter else ''} {row.value:.4f}"
            for row in rows
            if (row.rank, row.rule) == (point.rank, point.rule) and row.value is not None
        ]
        logger.info(
            "%s %d-shot  rank %d %s: %s",
            *(task.name, task.shots, point.rank, point.rule, ", ".join(shown)),
        )

    if held_out:
        rows = held_out_rows(model, held_out, plan, config.trainer.packed, accelerator)
        record.rows = merge_rows(record.rows, rows)
    if tasks:
        rows = run_sweep(
            model,
            tokenizer,
            tasks,
            plan,
            make_engine(config, model, tokenizer, sharded),
            folder / "samples",
            identity=record.run_hash,
            processes=accelerator,
            lockstep=sharded,
            on_point=on_point,
        )
        if main:
            record.rows = merge_rows(record.rows, rows)
            facts["truncated_prompts"] = dict(facts.get("truncated_prompts", {})) | {
                f"{task.name}:{task.shots}": task.truncated for task in tasks
            }
    facts["engine"] = config.eval.engine
    facts["finished"] = sorted({*facts["finished"], *wanted_points(config)})
    facts["seconds"] = spent + time.monotonic() - began


@torch.no_grad()
def held_out_rows(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plan: Plan,
    packed: bool,
    accelerator: Accelerator,
) -> list[Row]:
    """Loss in nats a label token on the records held out of training, at every point of `plan`.

    Each process takes its share of the records; where the base is sharded all must run the same
    forwards, and each takes all of them.
    """
    labels = sum(example.labels for example in examples)
    chunks = [examples[i : i + 32] for i in range(0, len(examples), 32)]
    alone = accelerator.distributed_type == DistributedType.FSDP
    if not alone:
        chunks = chunks[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(len(plan.points), dtype=torch.float64, device=model.device)
    for factors in ("trained", "svd"):
        with use_factors(model, factors), packed_attention(model) if packed else nullcontext():
            for index, point in enumerate(plan.points):
                if point.factors == factors:
                    for chunk in chunks:
                        sums[index] += batch_loss(model, chunk, point.p, packed=packed)
    total = sums if alone else accelerator.reduce(sums, "sum")
    losses = dict(zip(plan.points, (total / labels).tolist(), strict=True))
    return [
        Row(
            task="validation",
            shots=0,
            limit=None,
            filter=None,
            rank=rank,
            rule=rule,
            metric="loss",
            value=losses[point],
            stderr=None,
            n=len(examples),
            same_as=plan.same_as((rank, rule)),
            trained_rank=plan.trained_rank((rank, rule)),
        )
        for (rank, rule), point in plan.readings.items()
    ]


def dry_run(
    config: Config, model: PreTrainedModel, examples: Sequence[Example], embedded: bool
) -> None:
    """Print parameters, tokens, steps and estimated memory of a training.

    model: adapted, without weights. embedded: whether the embedded tokenizer cut the examples,
    which makes more tokens of a text than that of a larger model.
    """
    trainable = sum(p.numel() for p in adapter_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    trainer = config.trainer
    per_epoch = sum(len(example.tokens) for example in examples)
    steps = total_steps(len(examples), trainer.effective_batch, trainer.epochs, trainer.max_steps)
    compute = DTYPES[config.model.dtype].itemsize
    factor = DTYPES[config.adapter.dtype].itemsize
    longest = max(len(example.tokens) for example in examples)
    forward = min(
        trainer.max_tokens,
        (trainer.micro_batch or trainer.effective_batch)
        * (longest if not trainer.packed else per_epoch / len(examples)),
    )
    shape = model.config.get_text_config()
    # Per layer and token: the inputs of its linear layers, normalised and activated values.
    width = 12 * shape.hidden_size + 4 * shape.intermediate_size
    layers = 1 if trainer.gradient_checkpointing else shape.num_hidden_layers
    gib = {
        "base weights": (total - trainable) * compute,
        "factors, gradients, AdamW": trainable * factor * 4,
        "activations (rough)": forward * width * layers * compute
        + forward * shape.num_hidden_layers * shape.hidden_size * compute,
        "logits (rough)": forward * 0.6 * shape.vocab_size * (compute + 8),
    }
    print(f"parameters: {trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)")
    by = " of the embedded tokenizer" if embedded else ""
    print(
        f"tokens{by}: {per_epoch:,} an epoch in {len(examples):,} examples, the longest {longest}; "
        f"steps: {steps:,} ({steps_per_epoch(len(examples), trainer.effective_batch)} an epoch)"
    )
    for name, size in gib.items():
        print(f"memory, {name}: {size / 2**30:.2f} GiB")
    print(f"memory, sum: {sum(gib.values()) / 2**30:.2f} GiB")


def _open_record(
    config: Config, inputs: Inputs, data: dict[str, Any], accelerator: Accelerator
) -> Record:
    """The run's record so far, or a new one, saved on the main process."""
    path = inputs.folder / RECORD
    facts = environment()
    fresh = Record(
        status="training",
        name=str(inputs.folder.relative_to(Path(config.output_dir) / "runs")),
        config=dataclasses.asdict(config),
        run_hash=inputs.run_hash,
        git=facts["git"],
        versions=facts["versions"],
        device=facts["device"] | {"processes": accelerator.num_processes},
        model=inputs.model,
        data=inputs.data | data,
    )
    if path.exists():
        old = read_record(path)
        # Where it was trained stays; what it is evaluated with now is added to what it has.
        old.config["eval"] = fresh.config["eval"]
        old.error = None
        if not is_trained(inputs.folder, old):
            old.status = "training"
        elif old.status != "finished":
            old.status = "evaluating"
        fresh = old
    if accelerator.is_main_process:
        write_record(path, fresh)
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        write_atomically(inputs.folder / "config.yaml", text.encode())
    accelerator.wait_for_everyone()
    return fresh


def _show(record: Record, folder: Path) -> Path | None:
    """Print the rank-accuracy table, write table and plot beside the record, name the files."""
    tables = run_tables(record)
    print(f"\n{format_run_table(record)}\n")
    names = (RECORD, ADAPTER, "config.yaml", "train.jsonl", "samples")
    paths = [folder / name for name in names if (folder / name).exists()]
    if not tables:
        return None
    paths += write_tables(tables, folder / "table", title=record.name)
    figures = plot_tables(tables, folder / "plot")
    print("wrote", *(str(path) for path in [*paths, *figures]), sep="\n  ", flush=True)
    return next(path for path in figures if path.suffix == ".png")
