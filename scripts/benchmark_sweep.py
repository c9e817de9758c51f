"""Speed of the rank sweep: the batched engine against lm-eval's HF backend, in one run.

    python scripts/benchmark_sweep.py                              every entry of this machine
    python scripts/benchmark_sweep.py shape=llama3_8b shots=3      one entry, in this process
    python scripts/benchmark_sweep.py run=FOLDER "tasks=[gsm8k:0]" data_path=data
                                                                   the adapter of a finished run
    torchrun --nproc_per_node=4 scripts/benchmark_sweep.py baseline=false shape=llama3_1b
                                                                   the sweep on several GPUs, with
                                                                   sharded=true over one base

Shapes have random weights and get random words in problems of GSM8K's lengths, through lm-eval's
own gsm8k task. A random model never stops, so both systems end an answer at the length of its
reference (256 tokens at most, as the task does); the loss on gold answers is not asked for. The HF
backend answers some of its own batches at the largest rank, which is extrapolated to everything.

A run is evaluated as train.py does it, losses included, at its own ranks and rules; the HF backend
answers the first documents at some of the points, at each batch size, and the fastest counts. How
far the two agree is measured too, and how far the backend agrees with itself at that of the other
batch sizes where it agrees least.

Without the HF backend some answers of every point are made before the clock runs, which take what
is paid once a process (kernels are compiled). To compare numbers of GPUs, leave it out of each.

The clock runs from the first forward to the last scored answer. Each entry is merged into
`<output>/sweep.json`, and the table `<output>/sweep.md` is written anew.
"""

import gc
import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from benchmark_common import (
    COMMITTED,
    LOCAL,
    SHAPES,
    entry_key,
    fill_factors,
    gsm8k_lengths,
    matmul_rate,
    merge_entry,
    read_entries,
    run_each,
    settings_of,
    shard_base_over,
    synchronize,
    write_table,
)
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from matryoshka_lora.cli import as_arguments, option, run_script
from matryoshka_lora.config import Config, build_config, validate
from matryoshka_lora.core.adapter import adapter_view, use_factors
from matryoshka_lora.core.diagonals import powers_of_two
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import FACTOR_SETS
from matryoshka_lora.core.storage import load_adapter
from matryoshka_lora.evaluation.engines.batched.engine import BatchedEngine
from matryoshka_lora.evaluation.engines.hf import HFEngine, harness_lm
from matryoshka_lora.evaluation.engines.protocol import Engine, Output, Outputs, Point, Request
from matryoshka_lora.evaluation.own_tasks import flat, load_own_and_harness_tasks
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.evaluation.sharing import Exchange
from matryoshka_lora.evaluation.sweep import run_sweep
from matryoshka_lora.evaluation.tasks import EvalTask, load_tasks
from matryoshka_lora.models import DTYPES, load_tokenizer
from matryoshka_lora.processes import build_adapted_model, make_accelerator, on_main
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.record import read_record
from matryoshka_lora.training.loop import peak_gib, reset_peak

logger = logging.getLogger("matryoshka_lora.benchmark")

ENTRIES = {
    "cuda": [
        "shape=llama3_8b shots=3",
        "shape=llama3_8b shots=8 ranks=[1,16,256]",
        "shape=llama3_1b shots=3",
        "shape=llama3_1b shots=8",
    ],
    "cpu": ["shape=tiny shots=0 rank=32"],
}
TRAIN_PROBLEMS = 7473
WARM_UP = 256  # answers, where the HF backend does not warm up
FRAME = 2  # tokens of "Question:" and "Answer:", which the lengths of questions include
PROGRESS_EVERY = 10.0
NOTE = """\
The rank sweep, batched engine against lm-eval's HF backend (HF) in the same run, from the first
forward to the last scored answer (`make benchmark-sweep`). Shapes have random weights, prompts and
answers of GSM8K's lengths, and no losses on gold answers; runs have all. `agrees %` is the share of
answers with the same scores, in brackets with the same texts: batched with HF / HF with itself at
another of its batch sizes. On CUDA the entries of commits before b722bc6 have HF with cuDNN
attention, which plans for every new shape: samples of one batch took up to twice as long with it.
Records: `sweep.json`."""

Answers = dict[tuple[Point, Request], Output]


@dataclass
class Options:
    """The command line."""

    shape: str | None = option(None, "null: all of this machine", choices=SHAPES)
    shots: int = option(3, "examples in a prompt, for a shape")
    rank: int = option(256, "R, for a shape")
    ranks: list[int] | None = option(None, "ranks to read a shape at; null: powers of 2")
    documents: int = option(1319, "problems, for a shape")
    batch_size: int = option(32, "of the HF backend, for a shape")
    run: str | None = option(None, "folder of a finished run, instead of a shape")
    tasks: list[str] | None = option(None, "of a run, such as gsm8k:0; null: those of its config")
    data_path: str | None = option(None, "folder with the tasks' data; null: that of the run")
    limit: int | None = option(None, "only the first n documents of each task of a run")
    batch_sizes: list[int] = option([8, 32, 64, 128], "of the HF backend to try, for a run")
    baseline: bool = option(True, "measure the HF backend too; on one process alone")
    baseline_points: int | None = option(None, "of a run, for HF; null: 3, tiny on a CPU: all")
    baseline_documents: int = option(64, "that the HF backend answers at a point")
    cuda_graphs: bool = option(True, "eval.cuda_graphs, of the batched engine on a GPU")
    sharded: bool = option(False, "a shape's base over the processes, which answer together")
    output: str = option(
        LOCAL, f"folder of record and table; {COMMITTED} adds to the committed ones"
    )


def check(options: Options) -> None:
    """Raises UserError for what cannot be measured."""
    if options.shape is not None and options.run is not None:
        raise UserError("shape and run are both given; measure one at a time")
    for key in ("documents", "batch_size", "baseline_documents", "baseline_points", "limit"):
        given = getattr(options, key)
        if given is not None and given < 1:
            raise UserError(f"{key}={given} must be 1 or more")
    if options.baseline and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("the HF backend is measured on one process alone; set baseline=false")
    if options.sharded and (options.baseline or options.shape is None):
        raise UserError("sharded=true needs a shape and baseline=false")
    if not options.baseline and options.shape is None and options.run is None:
        raise UserError("baseline=false needs a shape or a run")
    read_entries(Path(options.output), "sweep")
    if not options.batch_sizes or min(options.batch_sizes) < 1:
        raise UserError(f"batch_sizes={options.batch_sizes} must be numbers of 1 or more")


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each token id, so that random ids are texts that the harness can handle.

    Other words, such as "Question:", are read as id 0. The end of text is an id that the model does
    not have, and no word holds a stop string: nothing ends an answer early.
    """
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="w0", pad_token="w0", eos_token="</s>"
    )


def write_problems(folder: Path, documents: int, vocabulary: int) -> list[int]:
    """Random problems in the schema of gsm8k; the answer tokens of each of the test's documents."""
    generator = np.random.default_rng(0)
    for split, count, seed in (("train", TRAIN_PROBLEMS, 1), ("test", documents, 2)):
        lengths = gsm8k_lengths(count, seed)
        with (folder / f"{split}.jsonl").open("w") as file:
            for question, answer in lengths.tolist():
                ids = generator.integers(1, vocabulary, question - FRAME + answer)
                words = [f"w{i}" for i in ids]
                words[-2] = "####"  # as in GSM8K; lm-eval searches the whole solution for it
                problem = {
                    "question": " ".join(words[: question - FRAME]),
                    "answer": " ".join(words[question - FRAME :]),
                }
                file.write(json.dumps(problem) + "\n")
    return lengths[:, 1].tolist()


def random_gsm8k(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shots: int, documents: int
) -> tuple[EvalTask, list[Request]]:
    """lm-eval's gsm8k on random problems, and its generations, capped at the reference answers."""
    with tempfile.TemporaryDirectory() as scratch:
        caps = write_problems(Path(scratch), documents, model.config.vocab_size)
        (task,) = load_tasks([("gsm8k", shots)], data_path=Path(scratch))
    return task, [
        replace(request, max_new_tokens=min(request.max_new_tokens, caps[request.doc_id]))
        for request in task.requests(harness_lm(model, tokenizer))
        if request.kind == "generate"
    ]


class RowCaps(StoppingCriteria):
    """Ends row i when it has `caps[i]` new tokens; the others of its batch go on."""

    def __init__(self, context: int, caps: Sequence[int], device: torch.device) -> None:
        self.context = context
        self.caps = torch.tensor(caps, device=device)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """(rows,) bool: which are done."""
        return self.caps <= input_ids.shape[1] - self.context


@contextmanager
def capped(model: PreTrainedModel, caps: Mapping[tuple[int, ...], int]) -> Iterator[None]:
    """`model.generate` ends each answer at the cap of its prompt.

    The requests themselves stay alike: the harness makes batches only of those that are.
    """
    generate: Any = model.generate

    def limited(
        input_ids: Tensor, attention_mask: Tensor, stopping_criteria: Any, **options: Any
    ) -> Any:
        rows = zip(input_ids.tolist(), attention_mask.sum(1).tolist(), strict=True)
        limits = [caps[tuple(row[len(row) - length :])] for row, length in rows]  # padded left
        own = RowCaps(input_ids.shape[1], limits, input_ids.device)
        return generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            stopping_criteria=StoppingCriteriaList([*stopping_criteria, own]),
            **options,
        )

    model.generate = limited  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generate = generate


def some_batches(requests: Sequence[Request], size: int, documents: int) -> list[Request]:
    """About `documents` requests: batches of the harness, evenly spaced from long to short.

    Whole batches of its order, so that a sample has no more padding than the whole.
    """
    ordered = sorted(requests, key=lambda request: -len(request.context))
    starts = range(0, max(len(ordered) - size, 0) + 1, size)  # of full batches, or of the only one
    batches = [ordered[start : start + size] for start in starts]
    count = min(max(documents // size, 1), len(batches))
    places = ((np.arange(count) + 0.5) * len(batches) / count).astype(int)
    return [request for place in places for request in batches[place]]


def answer(
    engine: Engine, task: EvalTask, jobs: Sequence[tuple[Point, Request]], device: torch.device
) -> tuple[float, Answers]:
    """Seconds from the first forward to the last score, and the outputs.

    A document is scored when all that `jobs` ask of it at a point is answered: the first of its
    requests, in their order. The others count as answered by nothing.
    """
    asked = Counter((point, request.doc_id) for point, request in jobs)
    arrived: dict[tuple[Point, int], dict[int, Output]] = {}
    outputs: Answers = {}
    synchronize(device)
    began = shown = time.perf_counter()
    for index, output in engine.run(jobs):
        point, request = jobs[index]
        outputs[(point, request)] = output
        key = (point, request.doc_id)
        arrived.setdefault(key, {})[index] = output
        if len(arrived[key]) == asked[key]:
            of_document = [output for _, output in sorted(arrived.pop(key).items())]
            lacking = len(task.document_requests(request.doc_id)) - len(of_document)
            task.score(request.doc_id, of_document + [Output()] * lacking)
        if time.perf_counter() - shown > PROGRESS_EVERY:
            shown = time.perf_counter()
            logger.info("%d of %d answers in %d s", len(outputs), len(jobs), shown - began)
    synchronize(device)
    return time.perf_counter() - began, outputs


def answer_together(
    task: EvalTask,
    engine: Engine,
    jobs: Sequence[tuple[Point, Request]],
    accelerator: Accelerator,
) -> tuple[float, Answers]:
    """`answer` of all processes, with what the main one has; `jobs` ask one thing of a document."""

    def scored() -> Iterator[tuple[int, Output]]:
        for index, output in engine.run(jobs, exchange.parts(len(jobs))):
            lacking = len(task.document_requests(jobs[index][1].doc_id)) - 1
            task.score(jobs[index][1].doc_id, [output] + [Output()] * lacking)
            yield index, output

    exchange: Exchange[tuple[int, Output]] = Exchange(accelerator, "benchmark")
    synchronize(accelerator.device)
    accelerator.wait_for_everyone()
    began = time.perf_counter()
    if accelerator.is_main_process:
        outputs = {jobs[index]: output for index, output in exchange.gather(scored())}
        assert len(outputs) == len(jobs)
    else:
        exchange.send(scored())
        outputs = {}
    return time.perf_counter() - began, outputs


def digest(outputs: Answers) -> str:
    """The same for the same answers."""
    lines = sorted(
        f"{point.rank} {point.rule} {request.doc_id} {request.instance.idx} {output}"
        for (point, request), output in outputs.items()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def figures(seconds: float, answers: int, prompts: Sequence[int], n: int) -> dict[str, Any]:
    """Rates. Answers are (point, document) pairs.

    prompts: tokens of each document's; n: generated tokens.
    """
    return {
        "prompt_tokens": {"mean": float(np.mean(prompts)), "max": max(prompts)},
        "answer_tokens": n / answers,
        "seconds": seconds,
        "answers_per_second": answers / seconds,
        "tokens_per_second": n / seconds,
    }


def hf_figures(seconds: float, answers: int, hf_seconds: float, hf_answers: int) -> dict[str, Any]:
    """Ratio; the HF backend's time for all answers follows from that for its sample."""
    hf_seconds_for_all = hf_seconds * answers / hf_answers
    return {
        "hf_seconds": hf_seconds,
        "hf_seconds_for_all": hf_seconds_for_all,
        "extrapolated": hf_answers < answers,
        "ratio": hf_seconds_for_all / seconds,
    }


def measure_shape(options: Options, accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """The entry of one shape with random weights."""
    assert options.shape is not None
    name, dtype = SHAPES[options.shape]
    config = Config(output_dir=options.output)
    config.model.name, config.model.dtype, config.model.random_weights = name, dtype, True
    config.adapter.rank, config.eval.ranks = options.rank, options.ranks
    validate(config)
    device = accelerator.device
    ceiling = matmul_rate(device, DTYPES[dtype])
    logger.info("%s: matrix product %.3g TFLOP/s; making the model", name, ceiling / 1e12)
    if options.sharded:
        shard_base_over(accelerator)
    model = build_adapted_model(config, accelerator)
    fill_factors(model)
    tokenizer = word_tokenizer(model.config.vocab_size)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    task, requests = random_gsm8k(model, tokenizer, options.shots, options.documents)
    plan = plan_points(adapter_view(model), config.eval_ranks, ["prefix"], config.train_ranks)
    points = [point for point in plan.points if point.rank]
    limits = {request.context: request.max_new_tokens for request in requests}
    # As the sweep orders what it shares out.
    ordered = sorted(requests, key=lambda request: -len(request.context))
    jobs = [(point, request) for point in points for request in ordered]
    engine = BatchedEngine(
        model, tokenizer, cuda_graphs=options.cuda_graphs, lockstep=options.sharded
    )
    sample, hf_seconds = [], 0.0
    if options.baseline:
        sample = some_batches(requests, options.batch_size, options.baseline_documents)
        logger.info("HF backend: %d documents at rank %d", len(sample), points[-1].rank)
        hf = HFEngine(model, tokenizer, options.batch_size)
        asked = [(points[-1], request) for request in sample]
        with capped(model, dict.fromkeys(limits, 2)):  # warms up
            answer(hf, task, asked[: options.batch_size], device)
        with capped(model, limits):
            hf_seconds, _ = answer(hf, task, asked, device)
        logger.info("%.1f s", hf_seconds)
    elif options.sharded:  # each token takes long, and nothing is compiled
        answer(engine, task, [(points[0], replace(requests[0], max_new_tokens=2))], device)
    else:
        answer(engine, task, jobs[:: max(len(jobs) // WARM_UP, 1)], device)
    logger.info("batched engine: %d points", len(points))
    reset_peak(device)
    if accelerator.num_processes > 1 and not options.sharded:
        seconds, outputs = answer_together(task, engine, jobs, accelerator)
    else:
        seconds, outputs = answer(engine, task, jobs, device)
    every, read = powers_of_two(options.rank), config.eval_ranks
    prompts = [len(request.context) for request in requests]
    tokens = sum(limits.values()) * len(points)
    entry = {
        "options": settings_of(options),
        "points": f"{len(read)}" + f" of the {len(every)} ranks" * (read != every),
        "documents": len(requests),
        "processes": accelerator.num_processes,
        "answers_sha": digest(outputs),
        **figures(seconds, len(jobs), prompts, tokens),
        "peak_gib": peak_gib(device, engine.cuda_graphs),
        "matmul_flops": ceiling,
    }
    if options.baseline:
        entry |= {
            **hf_figures(seconds, len(jobs), hf_seconds, len(sample)),
            "hf_sample": f"{len(sample)} documents at 1 point",
            "hf_batch_size": options.batch_size,
        }
    key = f"{options.shape}-r{options.rank}-{options.shots}shot-{options.documents}"
    return {entry_key(key, accelerator.num_processes, options.sharded): entry}


class Recorder:
    """An engine that notes when it was first asked, and all that it answered."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.lockstep = engine, engine.lockstep
        self.began: float | None = None
        self.outputs: Answers = {}

    def run(
        self, jobs: Sequence[tuple[Point, Request]], parts: Iterator[range] | None = None
    ) -> Outputs:
        """See `Engine.run`."""
        self.began = self.began or time.perf_counter()
        for index, output in self.engine.run(jobs, parts):
            self.outputs[jobs[index]] = output
            yield index, output


def measure_run(options: Options, accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """An entry for each task of a finished run."""
    folder = Path(options.run or "")
    files = RunFolder(folder)
    if not files.record.is_file() or not files.adapter.is_file():
        raise UserError(
            f"run={folder} holds no {files.record.name} and {files.adapter.name}; "
            "give a finished run"
        )
    record = read_record(files.record)
    with tempfile.TemporaryDirectory() as own:
        scratch = on_main(accelerator, lambda: own)  # the main process writes, all read
        node = OmegaConf.create(record.config)
        node.output_dir = scratch
        node.eval.limit = options.limit
        node.eval.tasks = node.eval.tasks if options.tasks is None else options.tasks
        node.eval.data_path = options.data_path or node.eval.data_path
        # What the hub's branch was when the run was trained.
        node.model.revision = record.model["revision"] or node.model.revision
        config = build_config(node)
        ceiling = matmul_rate(accelerator.device, DTYPES[config.model.dtype])
        tasks = flat(load_own_and_harness_tasks(config, accelerator))
        tokenizer = load_tokenizer(config.model)
        model = build_adapted_model(config, accelerator)
        load_adapter(files.adapter, model)
        return {
            entry_key(
                f"{record.name}-{task.name}-{task.shots}shot-{task.documents}",
                accelerator.num_processes,
            ): {
                "options": settings_of(options),
                **measure_task(
                    *(config, model, tokenizer, task, options, Path(scratch), accelerator)
                ),
                "matmul_flops": ceiling,
            }
            for task in tasks
        }


def measure_task(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    options: Options,
    scratch: Path,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What one task of a run adds to its entry, on the main process."""
    plan = plan_points(
        adapter_view(model), config.eval_ranks, config.eval.rules, config.train_ranks
    )
    engine = BatchedEngine(model, tokenizer, cuda_graphs=options.cuda_graphs)
    if not options.baseline:
        warm_up(model, tokenizer, task, plan.points, engine)
    recorder = Recorder(engine)
    reset_peak(model.device)
    rows = run_sweep(
        *(model, tokenizer, [task], plan, recorder, scratch / "samples"), processes=accelerator
    )
    synchronize(model.device)
    assert recorder.began is not None, "a new folder lacks everything"
    seconds = time.perf_counter() - recorder.began
    peak = peak_gib(model.device, options.cuda_graphs)
    logger.info("%s %d-shot: %.1f s for all points", task.name, task.shots, seconds)
    texts = [o.text for (_, r), o in recorder.outputs.items() if r.kind == "generate"]
    tokens = sum(map(len, tokenizer(texts).input_ids)) if texts else 0
    tokens_of_all = sum(gather_object([tokens]))
    prompts = [len(task.document_requests(doc)[0].context) for doc in range(task.documents)]
    answers = len(plan.points) * task.documents
    found = {
        "points": f"{len(plan.points)}",
        "documents": task.documents,
        "processes": accelerator.num_processes,
        "values": {
            f"{row.rank} {row.rule} {row.filter or ''} {row.metric}": row.value for row in rows
        },
        **figures(seconds, answers, prompts, tokens_of_all),
        "peak_gib": peak,
    }
    if not options.baseline:
        return found
    small = config.model.name == "tiny" and model.device.type == "cpu"
    count = min(options.baseline_points or (len(plan.points) if small else 3), len(plan.points))
    places = np.linspace(len(plan.points) - 1, 0, count).round().astype(int)
    points = [plan.points[place] for place in places]
    documents = min(options.baseline_documents, task.documents)
    hf = hf_backend(model, tokenizer, task, points, documents, options.batch_sizes)
    best, *others = sorted(hf, key=lambda size: hf[size][0])
    itself = [{"batch_size": n} | agreement(task, hf[n][1], hf[best][1]) for n in others]
    return found | {
        **hf_figures(seconds, answers, hf[best][0], len(points) * documents),
        "hf_sample": f"{documents} documents at {len(points)} point" + "s" * (len(points) > 1),
        "hf_batch_size": best,
        "hf_seconds_by_batch_size": {size: hf[size][0] for size in hf},
        "agreement": agreement(task, recorder.outputs, hf[best][1]),
        "hf_with_itself": min(
            itself, key=lambda found: (found["same_scores"], found["same_texts"]), default=None
        ),
    }


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    points: Sequence[Point],
    engine: Engine,
) -> None:
    """Answer some documents at every point."""
    task.requests(harness_lm(model, tokenizer))
    documents = range(0, task.documents, max(task.documents * len(points) // WARM_UP, 1))
    for factors in FACTOR_SETS:
        jobs = [
            (point, request)
            for point in points
            if point.factors == factors
            for doc_id in documents
            for request in task.document_requests(doc_id)
        ]
        with use_factors(model, factors):
            for _ in engine.run(jobs):
                pass


def hf_backend(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    points: Sequence[Point],
    documents: int,
    batch_sizes: Sequence[int],
) -> dict[int, tuple[float, Answers]]:
    """Batch size -> seconds and outputs of the HF backend for the first documents at `points`.

    Sizes above the number of requests are left out, as they all make one batch, and those that do
    not fit the device.
    """
    requests = [r for doc in range(documents) for r in task.document_requests(doc)]
    largest = max(Counter(request.kind for request in requests).values())
    found: dict[int, tuple[float, Answers]] = {}
    for size in [s for s in batch_sizes if s <= largest] or [min(batch_sizes)]:
        try:
            found[size] = hf_sample(model, tokenizer, task, points, requests, size, not found)
        except torch.OutOfMemoryError:
            logger.warning("HF backend, batch size %d: out of memory, left out", size)
        if size not in found:
            gc.collect()  # the error's frames hold the batch, and each other
    if not found:
        raise UserError(f"batch_sizes={list(batch_sizes)} do not fit the device; give smaller ones")
    return found


def hf_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    points: Sequence[Point],
    requests: Sequence[Request],
    size: int,
    warm_up: bool,
) -> tuple[float, Answers]:
    """Seconds and outputs of the HF backend for `requests` at `points`, in batches of `size`."""
    engine = HFEngine(model, tokenizer, size)
    total, outputs = 0.0, Answers()
    for point in points:
        jobs = [(point, request) for request in requests]
        with use_factors(model, point.factors):
            if warm_up and not outputs:
                with capped(model, {request.context: 2 for request in requests}):
                    answer(engine, task, jobs[:2], model.device)
            seconds, new = answer(engine, task, jobs, model.device)
        total, outputs = total + seconds, outputs | new
        logger.info(
            "HF backend, batch size %d, %d requests at rank %d (%s): %.1f s",
            *(size, len(requests), point.rank, point.rule, seconds),
        )
    return total, outputs


def agreement(task: EvalTask, outputs: Answers, hf: Answers) -> dict[str, Any]:
    """How far `outputs` agree with `hf`, on what both answered.

    The task's first metric on either side, the shares of documents with the same scores in all
    metrics and with the same generated texts, and the mean difference of the log-probabilities that
    were asked for, in nats a target.
    """
    asked = list(dict.fromkeys((point, request.doc_id) for point, request in hf))
    sides = [
        [[side[(point, r)] for r in task.document_requests(doc)] for point, doc in asked]
        for side in (outputs, hf)
    ]
    ours, theirs = (
        [task.score(doc, out).values for (_, doc), out in zip(asked, side, strict=True)]
        for side in sides
    )
    texts = [[[output.text for output in out] for out in side] for side in sides]
    metric = next(iter(theirs[0]))
    apart = [abs(outputs[job].logprob - hf[job].logprob) for job in hf if job[1].target]
    return {
        "answers": len(asked),
        "metric": metric[1],
        "value": task.aggregate(metric, [values[metric] for values in ours]).value,
        "hf_value": task.aggregate(metric, [values[metric] for values in theirs]).value,
        "same_scores": float(np.mean([a == b for a, b in zip(ours, theirs, strict=True)])),
        "same_texts": float(np.mean([a == b for a, b in zip(*texts, strict=True)])),
        "logprob_difference": float(np.mean(apart)) if apart else None,
    }


def table_rows(key: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row of an entry in the table."""
    agrees, itself = entry.get("agreement"), entry.get("hf_with_itself")
    prompt, gib, tokens = entry["prompt_tokens"], entry["peak_gib"], entry["answer_tokens"]
    shares = [
        f"{100 * x['same_scores']:.1f}" + f" ({100 * x['same_texts']:.0f})" * bool(tokens)
        if x
        else "-"
        for x in (agrees, itself)
    ]
    hf = dict.fromkeys(("HF batch", "HF sample", "HF s", "ratio"), "")
    if "ratio" in entry:
        hf = {
            "HF batch": f"{entry['hf_batch_size']}",
            "HF sample": f"{entry['hf_sample']}: {entry['hf_seconds']:.1f} s",
            "HF s": f"{entry['hf_seconds_for_all']:,.0f}"
            + " (extrapolated)" * entry["extrapolated"],
            "ratio": f"{entry['ratio']:.1f}",
        }
    score = agrees and f"{100 * agrees['value']:.1f} ({100 * agrees['hf_value']:.1f})"
    return [
        {
            "entry": key,
            "points": entry["points"],
            "documents": f"{entry['documents']}",
            "prompt tokens (max)": f"{prompt['mean']:.0f} ({prompt['max']})",
            "answer tokens": f"{tokens:.0f}" if tokens else "",
            "s": f"{entry['seconds']:.1f}",
            "answers/s": f"{entry['answers_per_second']:.1f}",
            "tokens/s": f"{entry['tokens_per_second']:,.0f}" if tokens else "",
            "peak GiB": f"{gib:.1f}" if gib else "",
            **hf,
            "score % (HF)": score or "",
            "agrees %": " / ".join(shares) if agrees else "",
            "matmul TFLOP/s": f"{entry['matmul_flops'] / 1e12:.3g}",
        }
    ]


def main(options: Options) -> int:
    """1 where an entry failed, else 0. Raises UserError for what cannot be measured."""
    check(options)
    if options.shape is not None or options.run is not None:
        accelerator = make_accelerator()
        measure = measure_shape if options.run is None else measure_run
        measured = measure(options, accelerator)
        if not accelerator.is_main_process:
            return 0
        for key, entry in measured.items():
            entries = merge_entry(Path(options.output), "sweep", key, entry)
        print(write_table(Path(options.output), "sweep", entries, table_rows, NOTE))
        return 0
    return run_each(__file__, ENTRIES, as_arguments(options))


if __name__ == "__main__":
    run_script(main, __doc__, Options)
