"""Two processes, started as a user would, equal one."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_pipeline import SMALL, records, train
from test_training import eventful, factors
from test_training import train as fit_here

from matryoshka_lora import processes as processes_module
from matryoshka_lora.config import build_method
from matryoshka_lora.methods import TRAINED
from matryoshka_lora.processes import tell_who_ended

CPU2 = ROOT / "configs" / "accelerate" / "cpu2.yaml"


def command(folder, *overrides):
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(CPU2), str(ROOT / "train.py")),
        *(f"output_dir={folder}", *SMALL, *overrides),
    ]


def launch(folder, *overrides):
    return subprocess.run(command(folder, *overrides), capture_output=True, text=True, timeout=400)


def losses(path: Path):
    return [json.loads(line)["loss"] for line in (path / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["matryoshka", "nested_dropout"])
def test_two_processes_equal_one(tmp_path, method):
    options = (f"method={method}", "trainer.max_steps=8", "trainer.lr=6e-3")
    options += ("dataset.validation=0.4",)  # 40 records: two forwards, one a process
    done = launch(tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr
    train(tmp_path / "one", *options)
    ((path, two),) = records(tmp_path / "two").items()
    ((reference, one),) = records(tmp_path / "one").items()
    assert tuple(r.training_device["processes"] for r in (two, one)) == (2, 1)
    np.testing.assert_allclose(losses(path.parent), losses(reference.parent), rtol=1e-5)
    assert two.training["same_on_all_processes"] and "same_on_all_processes" not in one.training
    on_the_way = [r.training["validation"]["losses"] for r in (two, one)]
    np.testing.assert_allclose(*on_the_way, rtol=1e-5)
    ours, theirs = (
        torch.cat([t.flatten() for t in load_file(p.parent / "adapter.safetensors").values()])
        for p in (path, reference)
    )
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    ranks = [
        [json.loads(line)["ranks"] for line in (p.parent / "train.jsonl").read_text().splitlines()]
        for p in (path, reference)
    ]
    assert ranks[0] == ranks[1]
    assert [row.key for row in two.rows] == [row.key for row in one.rows]
    for row, other in zip(two.rows, one.rows, strict=True):
        assert row.value == pytest.approx(other.value, rel=1e-3)
    # One process writes: no sample is there twice.
    lines = (path.parent / "samples" / "arithmetic_word_problems-0.jsonl").read_text().splitlines()
    keys = [(s["rank"], s["rule"], s["doc_id"]) for s in map(json.loads, lines)]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_make(tmp_path):
    done = launch(tmp_path, "trainer.effective_batch=7")
    assert done.returncode != 0
    assert "cannot be made of 2 process(es); process counts that fit: [1, 7]" in done.stderr


def kill_one(rank, folder, started, *overrides):
    """Start, kill -9 the process of this rank when `started` is true; what was said, in seconds."""
    process = subprocess.Popen(
        command(folder, *overrides),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not started():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == str(rank):
            child.kill()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    return errors, time.monotonic() - began


@pytest.mark.slow
def test_a_killed_process_ends_all_and_loses_nothing_that_was_finished(tmp_path):
    options = ("trainer.max_steps=30", "trainer.save_every=5", "eval.limit=60")
    assert launch(tmp_path / "whole", *options).returncode == 0
    folder = tmp_path / "killed"
    for rank, what in ((0, "runs/**/checkpoints/step-*.pt"), (1, "runs/**/samples/*.jsonl")):
        errors, seconds = kill_one(
            rank,
            folder,
            lambda what=what: any(p.stat().st_size for p in folder.glob(what)),
            *options,
        )
        assert seconds < 20
        said = [line for line in errors.splitlines() if line.startswith("stopped: ")]
        assert len(said) == 1 and f"process {rank} of 2 has ended" in said[0], errors
        assert "a bug or the environment" not in errors, errors
        if "checkpoints" in what:
            (newest,) = sorted(folder.glob(what))[-1:]
    (samples,) = folder.glob(what)
    kept = samples.read_text()
    done = launch(folder, *options)
    assert done.returncode == 0 and "training is finished" in done.stdout
    assert samples.read_text().startswith(kept) and len(kept.splitlines()) > 0
    ((path, ours),) = records(folder).items()
    ((reference, theirs),) = records(tmp_path / "whole").items()
    assert ours.phases[1]["first_step"] == int(newest.stem.removeprefix("step-"))
    mine, expected = (load_file(p.parent / "adapter.safetensors") for p in (path, reference))
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert [row.key for row in ours.rows] == [row.key for row in theirs.rows]
    for row, other in zip(ours.rows, theirs.rows, strict=True):
        assert row.value == pytest.approx(other.value, rel=1e-4)
    keys = [(s["rank"], s["rule"], s["doc_id"]) for s in map(json.loads, samples.open())]
    assert len(keys) == len(set(keys))  # nothing was asked twice


def forked(function):
    """The exit code of a process that runs `function`; 0: it ran to its end."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(30)
    return process.exitcode


def test_a_process_outlives_the_helpers_that_it_ends(monkeypatch):
    """As `datasets` ends those of its pool, and graders theirs."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(processes_module, "LEAVE_SECONDS", 0.0)

    def run():
        tell_who_ended()
        fork = multiprocessing.get_context("fork")
        started = fork.Event()
        helper = fork.Process(target=lambda: (started.set(), time.sleep(30)))
        helper.start()
        assert started.wait(20)
        helper.terminate()
        helper.join(20)
        time.sleep(0.2)  # in which the signal would reach this process
        assert helper.exitcode == -signal.SIGTERM

    assert forked(run) == 0
    assert forked(lambda: (tell_who_ended(), os.kill(os.getpid(), 15), time.sleep(20))) == 128 + 15


def test_a_handler_that_is_there_stays():
    """Such as that of submitit, which puts a job back into the queue."""
    arrived = []

    def run():
        signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
        tell_who_ended()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert arrived

    assert forked(run) == 0


def all_print_equal(tmp_path, program, processes=2):
    """Run `program` on gloo processes, with tests/ and `tmp_path` as arguments."""
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={processes}", str(script), str(ROOT / "tests"), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == processes


SLOW_MAIN = """
import sys, time
from datetime import timedelta
import torch
from matryoshka_lora.processes import make_accelerator, on_main

torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=0.5))
accelerator = make_accelerator()
called = []

def slow(value):
    called.append(value)
    time.sleep(1.5)
    return value

assert [on_main(accelerator, lambda: slow(value)) for value in ("a", {"b": 2})] == ["a", {"b": 2}]
assert len(called) == 2 * accelerator.is_main_process
print("equal")
"""


def test_processes_wait_for_the_main_one_longer_than_for_a_collective(tmp_path):
    """It may hash a base of 140 GB."""
    all_print_equal(tmp_path, SLOW_MAIN)


SHARDED = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import TARGETS, small_llama
from test_training import factors, make_config, make_examples, make_model
from pathlib import Path
from accelerate import Accelerator
from accelerate.utils import DistributedType
from matryoshka_lora.core.adapter import at_rank
from matryoshka_lora.config import build_method
from matryoshka_lora.evaluation.engines.batched.engine import BatchedEngine
from matryoshka_lora.evaluation.engines.hf import HFEngine
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.evaluation.sweep import run_sweep
from matryoshka_lora.evaluation.tasks import load_tasks
from matryoshka_lora.config import Config
from matryoshka_lora.ops.sharded import mesh_of
from matryoshka_lora.processes import build_adapted_model, shard_base
from matryoshka_lora.training.loop import fit
import tiny_lm

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
config = make_config("nested_dropout", max_tokens=40)
tokens = torch.arange(12)[None]

def trained(folder, sharded):
    model = make_model(config)
    if sharded:
        shard_base(model, mesh_of(accelerator.device))
        weight = model.model.layers[0].mlp.up_proj.weight
        assert weight.to_local().shape[0] == weight.shape[0] // 2
        # What accelerate calls a launch with fsdp.yaml; on CPUs it cannot be launched so.
        accelerator.state.distributed_type = DistributedType.FSDP
    folder.mkdir(parents=True, exist_ok=True)
    fit(model, make_examples(), build_method(config), config, folder, accelerator)
    with torch.no_grad(), at_rank(model, 2, "svd"):
        return factors(model), model(tokens).logits

folder = Path(sys.argv[2]) / str(accelerator.process_index)
whole, logits = trained(folder / "whole", False)
shards, sharded_logits = trained(folder / "sharded", True)
assert ((whole - shards).norm() / whole.norm()) < 1e-5
torch.testing.assert_close(sharded_logits, logits, rtol=1e-4, atol=1e-5)

# The embedded model from its files, in the environment that a launch with fsdp.yaml makes, where
# transformers 5.17 (not 5.23) leaves out the weights of all processes but the first.
accelerator.state.distributed_type = DistributedType.MULTI_CPU
expected = build_adapted_model(Config(), accelerator)(tokens).logits
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
accelerator.state.distributed_type = DistributedType.FSDP
found = build_adapted_model(Config(), accelerator)(tokens).logits
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

data = Path(sys.argv[2]) / "data"
if accelerator.is_main_process:
    tiny_lm.write_data(data)
accelerator.wait_for_everyone()
found = {}
for kind in ("whole", "batched", "hf"):
    tasks = load_tasks([("gsm8k", 2), ("arc_challenge", 3)], data_path=data, limit=3)
    model, tokenizer = tiny_lm.adapt(tiny_lm.model()), tiny_lm.tokenizer()
    if kind != "whole":
        shard_base(model, mesh_of(accelerator.device))
    lockstep = kind != "whole"
    if kind == "hf":
        engine = HFEngine(model, tokenizer, 4, lockstep)
    else:
        engine = BatchedEngine(model, tokenizer, lockstep=lockstep)
    plan = plan_points(tiny_lm.view(), [2, 4], ["prefix", "svd"], [1, 2, 4])
    rows = run_sweep(
        model, tokenizer, tasks, plan, engine, Path(sys.argv[2]) / kind,
        processes=accelerator,
    )
    found[kind] = {row.key: row.value for row in rows}
if accelerator.is_main_process:
    assert len(found["whole"]) > 20
    for kind in ("batched", "hf"):
        assert found[kind].keys() == found["whole"].keys()
        for key, value in found["whole"].items():
            assert abs(found[kind][key] - value) <= 1e-4 * max(1, abs(value)), (kind, key)
print("equal")
"""


@pytest.mark.slow
def test_a_sharded_base_trains_and_reads_the_same(tmp_path):
    """FSDP2 with two gloo processes; NCCL and accelerate's own launch need GPUs."""
    all_print_equal(tmp_path, SHARDED)


SAME_TOKENS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from accelerate import Accelerator
from accelerate.utils import gather_object
from matryoshka_lora.evaluation.engines.batched.engine import BatchedEngine
from matryoshka_lora.evaluation.engines.hf import HFEngine, harness_lm
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.evaluation.tasks import load_tasks
from matryoshka_lora.ops.sharded import mesh_of
from matryoshka_lora.processes import shard_base
import tiny_lm

accelerator = Accelerator(cpu=True)
data = Path(sys.argv[2]) / "data"
if accelerator.is_main_process:
    tiny_lm.write_data(data)
accelerator.wait_for_everyone()
model, tokenizer = tiny_lm.adapt(tiny_lm.model()), tiny_lm.tokenizer()
(task,) = load_tasks([("gsm8k", 0)], data_path=data, limit=6)
requests = [r for r in task.requests(harness_lm(model, tokenizer)) if r.kind == "generate"]
(point,) = plan_points(tiny_lm.view(), [4], ["prefix"], [1, 2, 4]).points[-1:]
jobs = [(point, request) for request in requests]

def texts(engine):
    return gather_object([{index: output.text for index, output in engine.run(jobs)}])

def batched(lockstep):
    return BatchedEngine(model, tokenizer, lockstep=lockstep, max_rows=2)

expected = texts(batched(False))[0]
if not accelerator.is_main_process:  # as if its rounding ended each answer at once
    end = torch.tensor(tokenizer.eos_token_id)
    model.lm_head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(-1, end, 1e4))
ones_own = texts(batched(False))
assert ones_own[0] == expected != ones_own[1]
assert texts(batched(True)) == [expected, expected]
# Here each goes on with its own, and all run as many forwards as the longest answer takes.
shard_base(model, mesh_of(accelerator.device))
assert texts(HFEngine(model, tokenizer, 2, lockstep=True))[0] == expected
print("equal")
"""


@pytest.mark.slow
def test_processes_in_lockstep_go_on_with_the_tokens_of_the_first(tmp_path):
    all_print_equal(tmp_path, SAME_TOKENS)


MOVED = """
import json, shutil, sys, torch
sys.path.insert(0, sys.argv[1])
from test_training import factors, make_config, make_examples
from pathlib import Path
from accelerate import Accelerator
from accelerate.utils import DistributedType
from matryoshka_lora.config import build_method
from matryoshka_lora.processes import build_adapted_model
from matryoshka_lora.training.loop import fit

accelerator = Accelerator(cpu=True)
accelerator.state.distributed_type = DistributedType.FSDP
folder = Path(sys.argv[2])
config = make_config("nested_dropout", max_tokens=40, save_every=4, gradient_checkpointing=True)
model = build_adapted_model(config, accelerator)
fit(model, make_examples(), build_method(config), config, folder, accelerator)
accelerator.wait_for_everyone()
log, known = folder / "train.jsonl", folder / f"losses-{accelerator.process_index}.pt"
assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004.pt"]
found = torch.tensor([json.loads(line)["loss"] for line in log.read_text().splitlines()])
if accelerator.num_processes == 4:
    assert len(found) == 6
    torch.save((found, factors(model)), known)
else:
    losses, trained = torch.load(known)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
    assert torch.equal(found[:4], losses[:4]), "the first steps are not made again"
    assert (factors(model) - trained).norm() / trained.norm() < 1e-4
print("equal")
"""


@pytest.mark.slow
def test_a_sharded_training_of_four_processes_goes_on_with_two(tmp_path):
    all_print_equal(tmp_path, MOVED, 4)
    all_print_equal(tmp_path, MOVED, 2)


WHOLE_RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import pytest
from test_pipeline import small_config
from pathlib import Path
from accelerate.utils import DistributedType
from matryoshka_lora import pipeline

make_accelerator = pipeline.make_accelerator

def made_sharded():
    accelerator = make_accelerator()
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator

found = {}
for kind in ("whole", "sharded"):
    folder = Path(sys.argv[2]) / kind
    config = small_config(folder, trainer__lr=6e-3, trainer__gradient_checkpointing=True)
    config.dataset.validation, config.eval.rules = 0.2, ["prefix", "svd"]
    if kind == "sharded":
        pipeline.make_accelerator = made_sharded
        config.trainer.dry_run = True
        pipeline.run(config)
        config.trainer.dry_run = False
    found[kind] = pipeline.run(config)
if found["whole"] is not None:
    rows, losses = [], []
    for kind, record in found.items():
        log = Path(sys.argv[2]) / kind / "runs" / record.name / "train.jsonl"
        rows.append({row.key: row.value for row in record.rows})
        losses.append([json.loads(line)["loss"] for line in log.read_text().splitlines()])
    assert rows[0] and rows[1] == pytest.approx(rows[0], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_a_whole_run_with_a_sharded_base_gives_the_rows_of_one_without(tmp_path):
    all_print_equal(tmp_path, WHOLE_RUN)


RESUMED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_training import eventful, factors, make_examples, make_model, relative
from pathlib import Path
from accelerate import Accelerator
from matryoshka_lora.config import build_method
from matryoshka_lora.methods import TRAINED
from matryoshka_lora.training.gradients import are_same_on_all_processes
from matryoshka_lora.training.loop import fit

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2

def fitted(folder, config):
    model, method = make_model(config), build_method(config)
    folder.mkdir(parents=True, exist_ok=True)
    fit(model, make_examples(), method, config, folder, accelerator)
    return torch.cat([factors(model), *(x.double() for x in method.hooks.importance().values())])

for name in TRAINED:
    config = eventful(name)
    folder = Path(sys.argv[2]) / name
    whole = fitted(folder / "whole", config)
    other = whole.clone()
    torch.distributed.broadcast(other, 0)
    parameters = {"x": torch.nn.Parameter(whole + 1e-9 * accelerator.process_index)}
    assert not are_same_on_all_processes(parameters, accelerator)
    assert torch.equal(whole, other), name
    assert relative(whole, torch.load(folder / "alone" / "factors.pt")) < 1e-4, name
    checkpoints = sorted((folder / "whole" / "checkpoints").glob("*.pt"))
    assert [path.name for path in checkpoints] == ["step-00000006.pt", "step-00000008.pt"]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints[-1].unlink()  # as if it had been killed after step 6
    accelerator.wait_for_everyone()
    assert torch.equal(fitted(folder / "whole", config), whole), name
print("equal")
"""


@pytest.mark.slow
def test_every_method_on_two_processes_is_that_of_one_and_resumes_bit_for_bit(tmp_path):
    for name in TRAINED:
        config, folder = eventful(name), tmp_path / name / "alone"
        hooks = build_method(config).hooks
        model, _, _ = fit_here(folder, config, hooks=hooks)
        importance = [x.double() for x in hooks.importance().values()]
        torch.save(torch.cat([factors(model), *importance]), folder / "factors.pt")
    all_print_equal(tmp_path, RESUMED)
