"""Training speed: this project's loop against PEFT's LoRA under the HF Trainer, in one run.

    python scripts/benchmark_training.py                            every shape of this machine
    python scripts/benchmark_training.py shape=llama3_8b rank=32    one shape, in this process
    torchrun --nproc_per_node 4 scripts/benchmark_training.py shape=llama3_8b baselines=[] steps=60

Real shapes with random weights, GSM8K's lengths, random token ids, effective batch 32 (on several
processes 32 each), the same examples in the same order for all, the first steps left out. Tokens
are real ones: padding does not count. Each shape adds one entry to `<output>/training.json`, and
the table `<output>/training.md` is written anew. Without a GPU the embedded shape stands in, which
says nothing about large models.
"""

import contextlib
import gc
import logging
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from benchmark_common import (
    COMMITTED,
    LOCAL,
    SHAPES,
    entry_key,
    fill_factors,
    gsm8k_lengths,
    matmul_rate,
    merge_entry,
    random_examples,
    read_entries,
    run_each,
    settings_of,
    shard_base_over,
    synchronize,
    training_flops,
    write_table,
)
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from matryoshka_lora.cli import as_arguments, option, run_script
from matryoshka_lora.config import (
    LLAMA_TARGETS,
    Config,
    TrainerConfig,
    adapter_spec_of,
    build_method,
    validate,
)
from matryoshka_lora.core.adapter import adapter_parameters, add_adapters
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.data.examples import Example
from matryoshka_lora.data.loss import packed_batch
from matryoshka_lora.methods import TRAINED
from matryoshka_lora.models import DTYPES, load_model
from matryoshka_lora.ops.attention import PACKED
from matryoshka_lora.ops.graphs import Function, Graphs
from matryoshka_lora.processes import build_adapted_model, make_accelerator
from matryoshka_lora.training.forwards import LABELS_MULTIPLE, TOKENS_MULTIPLE
from matryoshka_lora.training.loop import fit, peak_gib, reset_peak
from matryoshka_lora.training.plan import batch_ids, split_into_forwards

logger = logging.getLogger("matryoshka_lora.benchmark")

ENTRIES = {
    "cuda": [
        f"shape={shape} rank={rank}{options}"
        for shape, options in (
            ("llama3_8b", ""),
            # Its kernels take longer to launch than to run.
            ("llama3_1b", " cuda_graphs=true warmup=60"),
        )
        for rank in (32, 256)
    ],
    "cpu": ["shape=tiny rank=32"],
}
# (samples a forward, forwards a step, packed without padding and all in the base's dtype).
BASELINES = {
    "peft 8x4": (8, 4, False),
    "peft 4x8": (4, 8, False),
    "peft 32x1": (32, 1, False),
    "peft 32x1 padding-free": (32, 1, True),
}
REFERENCE = "peft 8x4"
BASELINE_WARMUP = 5  # nothing is compiled or captured
SAMPLES, EFFECTIVE_BATCH, EPOCHS, SEED = 7473, 32, 20, 0
LR = 1e-6  # random weights must not run away in the thousand steps this may take
NOTE = """\
Training speed, random weights, GSM8K's lengths, effective batch 32 (`make benchmark-training`).
Tokens are real, unpadded ones; `x peft 8x4` is the ratio to PEFT's LoRA under the HF Trainer in the
same run; MFU is against a matrix product measured in the same run; build is making the model, start
what the first steps took beyond a steady step, compilation for the most part. In `-sharded` entries
each GPU holds a part of the base. Records: `training.json`."""


@dataclass
class Options:
    """The command line."""

    shape: str | None = option(None, "null: all of this machine", choices=SHAPES)
    rank: int = option(32, "R, where a shape is given")
    methods: list[str] = option(
        ["matryoshka", "nested_dropout"], "of this project", choices=TRAINED
    )
    baselines: list[str] = option(
        list(BASELINES), "settings of PEFT under the HF Trainer", choices=BASELINES
    )
    seconds: float = option(60.0, "of steady state of the first method")
    others: float = option(15.0, "likewise of the other methods and of the baselines")
    steps: int | None = option(
        None, "so many instead of `seconds` and `others`; several processes need it"
    )
    warmup: int = option(
        10,
        "steps left out at the beginning; of a baseline 5 at most; with `steps` as many more as "
        "leave no CUDA graph to capture in those",
    )
    compile: bool = option(True, "trainer.compile, where there is a GPU")
    cuda_graphs: bool = option(False, "trainer.cuda_graphs, where there is a GPU")
    sharded: bool = option(False, "the base over the processes, as configs/accelerate/fsdp.yaml")
    gradient_checkpointing: bool = option(False, "trainer.gradient_checkpointing")
    output: str = option(
        LOCAL, f"folder of record and table; {COMMITTED} adds to the committed ones"
    )


def check(options: Options) -> None:
    """Raises UserError for what cannot be measured."""
    read_entries(Path(options.output), "training")
    if not options.methods or min(options.seconds, options.others) <= 0 or options.warmup < 1:
        raise UserError(
            "give at least one method, seconds and others above 0 and a warmup of 1 or more"
        )
    if options.steps is not None and options.steps < 1:
        raise UserError(f"steps={options.steps} must be 1 or more")


@dataclass
class Clock:
    """Measures the steps after the first `warmup`: `steps` of them, or until `seconds` are full."""

    device: torch.device
    tokens: Sequence[int]
    """Of each step."""
    warmup: int
    seconds: float
    steps: int | None = None
    graphs: bool = False
    began: float = field(default_factory=time.perf_counter)
    first: int = 0
    started: float = 0.0

    def tick(self, queued: int) -> dict[str, Any] | None:
        """To be called when `queued` steps were handed to the device; the figures at the end."""
        if queued < self.warmup or (self.first and not self._is_over(queued)):
            return None
        synchronize(self.device)
        now = time.perf_counter()
        if not self.first:
            self.first, self.started = queued, now
            return None
        steps, spent = queued - self.first, now - self.started
        return {
            "tokens_per_second": sum(self.tokens[self.first : queued]) / spent,
            "warmup": self.first,
            "steps": steps,
            "seconds": spent,
            "start_seconds": self.started - self.began - self.first * spent / steps,
            "peak_gib": peak_gib(self.device, self.graphs),
        }

    def _is_over(self, queued: int) -> bool:
        if self.steps is None:
            return time.perf_counter() - self.started >= self.seconds
        return queued - self.first >= self.steps


class _Measured(Exception):
    """Ends a training that goes on for longer than is needed."""


def measure_ours(
    config: Config, examples: Sequence[Example], clock: Clock, accelerator: Accelerator
) -> dict[str, Any]:
    """This project's own loop, as `train.py` runs it. Only the main process has the figures."""
    began = time.perf_counter()
    reset_peak(clock.device)
    model = build_adapted_model(config, accelerator)
    synchronize(clock.device)
    built = {
        "build_seconds": time.perf_counter() - began,
        "build_peak_gib": peak_gib(clock.device),
        # Of the process since its start, in RAM.
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    fill_factors(model)
    clock.began = time.perf_counter()

    found: dict[str, Any] = {}

    def on_step(row: dict[str, Any]) -> None:
        # A row is read when the step after it was handed out.
        if not found and (figures := clock.tick(row["step"] + 2)):
            found.update(figures | built)
            if clock.steps is None:
                raise _Measured

    if clock.steps is not None:  # all processes end at the same step, the last is not read
        config.trainer.max_steps = clock.warmup + clock.steps + 2
    with tempfile.TemporaryDirectory() as folder:
        method = build_method(config)
        with contextlib.suppress(_Measured):
            fit(model, examples, method, config, Path(folder), accelerator, on_step)
    assert found or not accelerator.is_main_process, "the training was too short to be measured"
    return found


def measure_peft(
    config: Config, examples: Sequence[Example], clock: Clock, layout: tuple[int, int, bool]
) -> dict[str, Any]:
    """PEFT's LoRA under the HF Trainer on the same examples in the same order.

    The adapters are float32 under autocast, PEFT's default on a bf16 base; in the padding-free
    setting all has the base's dtype, and the attention is this project's, without flash-attn.
    """
    from peft import LoraConfig, get_peft_model

    samples, accumulate, padding_free = layout
    lora = LoraConfig(
        r=config.adapter.rank, lora_alpha=config.adapter.rank, target_modules=LLAMA_TARGETS
    )
    base = load_model(config.model, clock.device)
    model = get_peft_model(base, lora, autocast_adapter_dtype=not padding_free)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    if padding_free:
        base.set_attn_implementation(PACKED)
    reset_peak(clock.device)
    half = DTYPES[config.model.dtype] == torch.bfloat16
    found: dict[str, Any] = {}

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if figures := clock.tick(state.global_step):
                found.update(figures)
                control.should_training_stop = True

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            assert self.train_dataset is not None
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    order = [i for step in range(len(clock.tokens)) for i in ids_of(step)]
    rows = [examples[i] for i in order]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=samples,
            gradient_accumulation_steps=accumulate,
            max_steps=len(clock.tokens),
            learning_rate=LR,
            max_grad_norm=1.0,
            bf16=half and not padding_free,
            optim="adamw_torch_fused" if clock.device.type == "cuda" else "adamw_torch",
            use_cpu=clock.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        trainer = InOrder(
            model=model,
            args=arguments,
            train_dataset=[features(row) for row in rows],
            data_collator=flatten if padding_free else pad,
            callbacks=[Ticks()],
        )
        clock.began = time.perf_counter()
        trainer.train()
    assert found, "the training was too short to be measured"
    return found


def features(example: Example) -> dict[str, Any]:
    """What the HF Trainer takes: token ids, and labels with the prompt masked."""
    tokens, prompt = list(example.tokens), example.prompt_length
    return {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]}


def pad(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest row."""
    ids, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def ids_of(step: int, processes: int = 1) -> np.ndarray:
    """The examples of a step, the same for all."""
    return batch_ids(SEED, step, SAMPLES, EFFECTIVE_BATCH * processes)


def first_without_captures(
    examples: Sequence[Example],
    batches: Sequence[np.ndarray],
    trainer: TrainerConfig,
    processes: int,
    first: int,
    steps: int,
) -> int:
    """The first step, from `first` on, from which `steps` steps capture no CUDA graph.

    A process captures one for each new size of its forwards, while all others wait for it. On
    several processes, new sizes turn up for longer. batches: the examples of each step.

    Raises UserError where there are no such steps.
    """
    start, step = first, 0
    round_to = (TOKENS_MULTIPLE, LABELS_MULTIPLE)

    def capture(function: Function, pool: object) -> Function:
        nonlocal start
        start = max(start, step + 1)
        return function

    graphs = [Graphs(capture) for _ in range(processes)]
    for step, ids in enumerate(batches):
        batch = [examples[i] for i in ids]
        lengths = [len(example.tokens) for example in batch]
        for process, own in enumerate(graphs):
            for forward in split_into_forwards(
                lengths, process, processes, trainer.micro_batch, trainer.max_tokens
            ):
                samples = [batch[i] for i in forward]
                packed = packed_batch(samples, np.zeros(1, dtype=int), round_to)
                own(None, tuple(x.shape for x in packed.values()), lambda: torch.zeros(()))
        if step + 1 - start >= steps:
            return start
    raise UserError(f"no {steps} steps in a row capture no CUDA graph; give fewer steps")


def free() -> None:
    """Give back what the system measured before has left."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(options: Options) -> None:
    """Measure one shape and merge its entry into the record."""
    assert options.shape is not None
    name, dtype = SHAPES[options.shape]
    accelerator = make_accelerator()
    device, processes = accelerator.device, accelerator.num_processes
    if processes > 1 and (options.steps is None or options.baselines):
        # By the clock, one process would end while another waits for its gradients.
        raise UserError(f"{processes} processes: give steps=... and baselines=[]")
    if options.sharded:
        shard_base_over(accelerator)
    config = Config(seed=SEED)
    config.model.name, config.model.dtype, config.model.random_weights = name, dtype, True
    config.adapter.rank = options.rank
    trainer = config.trainer
    trainer.lr, trainer.epochs = LR, EPOCHS
    trainer.effective_batch = EFFECTIVE_BATCH * processes
    trainer.save_every = 10**9
    trainer.gradient_checkpointing = options.gradient_checkpointing
    if device.type == "cuda":
        trainer.compile, trainer.cuda_graphs = options.compile, options.cuda_graphs
    validate(config)
    shape = load_model(config.model, torch.device("meta"))
    add_adapters(shape, adapter_spec_of(config), LLAMA_TARGETS)
    examples = random_examples(gsm8k_lengths(SAMPLES, SEED), shape.config.vocab_size, SEED)
    flops = training_flops(shape, examples)
    steps = EPOCHS * -(-SAMPLES // trainer.effective_batch)
    batches = [ids_of(step, processes) for step in range(steps)]
    tokens = [sum(len(examples[i].tokens) for i in ids) for ids in batches]
    warmup = options.warmup
    if options.steps is not None and trainer.cuda_graphs:
        warmup = first_without_captures(
            *(examples, batches, trainer, processes, warmup, options.steps)
        )
    ceiling = matmul_rate(device, DTYPES[dtype])
    logger.info("%s R=%d: matrix product %.1f TFLOP/s", name, options.rank, ceiling / 1e12)
    systems: dict[str, dict[str, Any]] = {}
    for index, system in enumerate([*options.methods, *options.baselines]):
        seconds = options.others if index else options.seconds
        clock = Clock(device, tokens, warmup, seconds, options.steps)
        try:
            if system in BASELINES:
                clock.warmup = min(options.warmup, BASELINE_WARMUP)
                figures = measure_peft(config, examples, clock, BASELINES[system])
            else:
                config.method.name = system
                clock.graphs = trainer.cuda_graphs
                figures = measure_ours(config, examples, clock, accelerator)
        except torch.OutOfMemoryError as error:
            if processes > 1:  # the others would wait for this one
                raise
            figures = {"error": str(error).splitlines()[0]}
        systems[system] = figures
        logger.info("%s: %s", system, figures)
        free()
        if not accelerator.is_main_process:
            continue
        # System by system, so that what was measured stays, whatever becomes of the next.
        entry = {
            "options": settings_of(options),
            "processes": processes,
            "matmul_flops": ceiling,
            "model_flops": flops,
            "trainable": sum(p.numel() for p in adapter_parameters(shape).values()),
            "parameters": sum(p.numel() for p in shape.parameters()),
            "systems": systems,
        }
        entries = merge_entry(Path(options.output), "training", key_of(options, processes), entry)
        table = write_table(Path(options.output), "training", entries, table_rows, NOTE)
    if accelerator.is_main_process:
        print(table)


def key_of(options: Options, processes: int) -> str:
    """Which entry of the record a measurement is."""
    return entry_key(f"{options.shape}-r{options.rank}", processes, options.sharded)


def table_rows(key: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of the table for each system of an entry."""
    systems, flops = entry["systems"], entry["model_flops"]
    reference = systems.get(REFERENCE, {}).get("tokens_per_second")
    ceiling = entry["matmul_flops"] * entry.get("processes", 1)
    rows = []
    for name, x in systems.items():
        speed = x.get("tokens_per_second")
        gib = x.get("peak_gib")
        rows.append(
            {
                "shape": key,
                "system": name,
                "tokens/s": f"{speed:,.0f}" if speed else f"({x['error'].partition('.')[0]})",
                f"x {REFERENCE}": f"{speed / reference:.2f}" if speed and reference else "",
                "MFU": f"{100 * speed * flops / ceiling:.0f} %" if speed else "",
                "peak GiB": f"{gib:.1f}" if gib else "",
                "build s": f"{x['build_seconds']:.0f}" if "build_seconds" in x else "",
                "start s": f"{x['start_seconds']:.0f}" if speed else "",
                "steps": str(x.get("steps", "")),
            }
        )
    return rows


def main(options: Options) -> int:
    """1 where an entry failed, else 0. Raises UserError for what cannot be measured."""
    check(options)
    if options.shape is not None:
        measure(options)
        return 0
    return run_each(__file__, ENTRIES, as_arguments(options))


if __name__ == "__main__":
    run_script(main, __doc__, Options)
