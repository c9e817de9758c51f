"""Whole runs through the command a user types, on the embedded model and data."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from safetensors.torch import load_file
from tiny_lm import write_data

from matryoshka_lora import pipeline, processes
from matryoshka_lora.cli import exit_with_one_line
from matryoshka_lora.config import Config, build_config
from matryoshka_lora.core.adapter import adapter_parameters, at_rank
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import RULES
from matryoshka_lora.further_evaluation import evaluate_run
from matryoshka_lora.loading import load_run, read_run
from matryoshka_lora.methods import METHODS
from matryoshka_lora.methods.base import single
from matryoshka_lora.pipeline import run
from matryoshka_lora.runs.folder import RECORD, RunFolder, run_path
from matryoshka_lora.runs.record import read_record, write_record

SMALL = ["adapter.rank=4", "trainer.max_steps=4", "eval.limit=6", "dataset.limit=100"]


def train(folder, *overrides, flags=(), check=True, timeout=300):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *flags,
            f"output_dir={folder}",
            *SMALL,
            *overrides,
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def run_here(folder, *overrides):
    """What `train` does with the same arguments, in this process, which has torch loaded."""
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        node = compose("train", [f"output_dir={folder}", *SMALL, *overrides])
    return run(build_config(node))


def records(folder):
    return {path: read_record(path) for path in sorted((folder / "runs").rglob(RECORD))}


def small_config(folder, **changes):
    config = Config()
    config.output_dir = str(folder)
    config.adapter.rank, config.trainer.max_steps, config.dataset.limit = 4, 4, 100
    config.eval.limit, config.eval.tasks = 6, ["arithmetic_word_problems:0"]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    return config


def test_the_four_methods_run_end_to_end_and_a_second_time_only_show(tmp_path):
    methods = "method=lora,dylora,matryoshka,nested_dropout"
    done = train(tmp_path, methods, flags=["-m"])
    found = records(tmp_path)
    assert {record.config["method"]["name"] for record in found.values()} == {
        *("lora", "dylora", "matryoshka", "nested_dropout")
    }
    for path, record in found.items():
        assert record.status == "finished" and record.training["steps"] == 4
        assert record.data["used"] == 100 and record.data["truncated"] == 0
        readings = {(row.rank, row.rule) for row in record.rows}
        assert readings == {(0, "base")} | {
            (rank, rule) for rank in (1, 2, 4) for rule in ("prefix", "trained", "svd", "global")
        }
        metrics = {(row.metric, row.filter) for row in record.rows}
        assert metrics == {
            *(("exact_match", "strict-match"), ("exact_match", "flexible-extract"), ("loss", None))
        }
        assert all(row.n == 6 and row.value is not None for row in record.rows)
        for name in ("adapter.safetensors", "table.md", "table.csv", "plot.png", "train.jsonl"):
            assert (path.parent / name).stat().st_size > 0
        assert str(path.parent / "table.csv") in done.stdout
    comparison = done.stdout.rpartition("wrote\n")[2]
    for label in ("LoRA", "DyLoRA", "MatryoshkaLoRA", "nested dropout"):
        assert comparison.count(f"\n{label} ") == 3 * len(RULES), label  # of three metrics
    assert not list((tmp_path / "multirun").glob(".runs*"))
    before = {path: path.read_bytes() for path in found}
    again = train(tmp_path, "method=lora,dylora", flags=["-m"])
    assert (again.stderr + again.stdout).count("this run is finished") == 2
    assert {path: path.read_bytes() for path in found} == before


def test_new_evaluation_settings_evaluate_only_what_is_missing(tmp_path):
    run(small_config(tmp_path, eval__rules=["prefix"]))
    ((path, first),) = records(tmp_path).items()
    samples = path.parent / "samples" / "arithmetic_word_problems-0.jsonl"
    lines = samples.read_text().splitlines()
    run(small_config(tmp_path, eval__rules=["prefix", "svd"]))
    ((_, second),) = records(tmp_path).items()
    assert second.training == first.training
    assert samples.read_text().splitlines()[: len(lines)] == lines
    old = {row.key: row for row in first.rows}
    assert all(old[row.key] == row for row in second.rows if row.key in old)
    assert {row.rule for row in second.rows} == {"base", "prefix", "svd"}


def test_more_points_that_fail_leave_a_finished_run_finished(tmp_path, monkeypatch):
    run(small_config(tmp_path, eval__rules=["prefix"]))
    ((_, first),) = records(tmp_path).items()
    more = small_config(tmp_path, eval__rules=["prefix", "svd"])

    def fail(*args):
        raise OSError("device fell off")

    with monkeypatch.context() as context, pytest.raises(OSError, match="device fell off"):
        context.setattr(pipeline, "evaluate", fail)
        run(more)
    ((_, broken),) = records(tmp_path).items()
    assert broken.status == "finished" and "device fell off" in broken.error
    assert broken.rows == first.rows
    run(more)
    ((_, second),) = records(tmp_path).items()
    assert second.status == "finished" and second.error is None
    assert {row.rule for row in second.rows} == {"base", "prefix", "svd"}


def test_both_engines_give_the_same_rows(tmp_path):
    rows = {}
    for engine in ("hf", "batched"):
        config = small_config(tmp_path / engine, eval__engine=engine, trainer__max_steps=20)
        config.trainer.lr = 6e-3
        rows[engine] = run(config).rows
    for ours, reference in zip(rows["batched"], rows["hf"], strict=True):
        assert ours.key == reference.key
        assert ours.value == pytest.approx(reference.value, rel=1e-4)


def test_a_corrupt_record_is_named_and_left_alone(tmp_path):
    config = small_config(tmp_path)
    run(config)
    ((path, _),) = records(tmp_path).items()
    path.write_text(path.read_text()[:200])
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match=r"record.json is not a valid run record.*left alone"):
        run(config)
    assert path.read_bytes() == damaged


def test_a_finished_run_is_loaded_as_it_was_trained(tmp_path):
    config = small_config(tmp_path, eval__tasks=[], dataset__validation=0.2, trainer__lr=6e-3)
    record = run(config)
    folder = RunFolder(tmp_path / "runs" / record.name)
    loaded = load_run(folder.path)
    saved = load_file(folder.adapter)
    found = adapter_parameters(loaded.model)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert loaded.record == read_record(folder.record) and loaded.spec.rank == 4
    tokens = loaded.tokenizer("1 + 2 =", return_tensors="pt").input_ids
    with torch.no_grad():
        adapted = loaded.model(input_ids=tokens).logits
        with at_rank(loaded.model, 0):
            base = loaded.model(input_ids=tokens).logits
    assert not torch.equal(adapted, base)


def test_an_evaluation_reads_the_runs_own_diagonal(tmp_path, monkeypatch):
    """Whatever has become of the method since; and an adapter of other settings is refused."""
    config = small_config(tmp_path, eval__rules=["trained", "svd"], eval__ranks=[2], eval__limit=2)
    before = run(config)
    folder = RunFolder(tmp_path / "runs" / before.name)
    shutil.rmtree(folder.samples)
    write_record(folder.record, dataclasses.replace(before, rows=[], evaluation=None))
    with monkeypatch.context() as context:
        edited = dataclasses.replace(
            METHODS["matryoshka"], build=lambda shape, settings: single(torch.full((4,), 9.0))
        )
        context.setitem(METHODS, "matryoshka", edited)
        after = evaluate_run(folder.path, config)
    assert after.rows == before.rows
    for changes, message in (
        ({"method__name": "lora"}, "its method is matryoshka, the model's adapters have lora"),
        ({"adapter__rank": 8}, "its rank is 4, the model's adapters have 8"),
        ({"adapter__train_ranks": [1, 4]}, r"its train_ranks is \(1, 2, 4\)"),
        ({"adapter__scaling": "sqrt"}, "its scaling is none, the model's adapters have sqrt"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_run(folder.path, small_config(tmp_path, eval__tasks=[], **changes))


def test_a_run_that_is_not_trained_or_has_another_base_is_not_read(tmp_path):
    config = small_config(tmp_path, eval__tasks=[], trainer__max_steps=1)
    with pytest.raises(ValueError, match=r"holds no record\.json, so it is no folder of a run"):
        evaluate_run(tmp_path, config)
    record = run(config)
    folder = RunFolder(tmp_path / "runs" / record.name)
    record.model["weights"] = "0" * 64
    write_record(folder.record, record)
    for read in (load_run, lambda path: evaluate_run(path, config)):
        with pytest.raises(ValueError, match="not the one that .*weights is .* says 0000"):
            read(folder.path)
    folder.adapter.unlink()
    for read in (load_run, read_run, lambda path: evaluate_run(path, config)):
        with pytest.raises(ValueError, match=r"was trained, but its adapter.* is missing"):
            read(folder.path)


def test_a_folder_is_named_after_what_tells_runs_apart(tmp_path):
    config = small_config(tmp_path, model__name="meta-llama/Llama-3.2-1B", trainer__lr=8e-5)
    assert run_path(config, "0123abcd") == (
        tmp_path / "runs/arithmetic/Llama-3.2-1B/matryoshka-r4-none/lr8e-05-seed42-0123abcd"
    )


def test_force_makes_the_run_again(tmp_path):
    config = small_config(tmp_path)
    run(config)
    ((path, record),) = records(tmp_path).items()
    record.training["seconds"] = -1.0
    write_record(path, record)
    config.force = True
    assert run(config).training["seconds"] > 0


@pytest.mark.parametrize(
    ("model", "rank", "count"),
    [("llama3_8b", 32, "83,886,080"), ("llama3_8b", 256, "671,088,640")]
    + [("llama3_1b", 32, "22,544,384"), ("llama3_70b", 16, "207,093,760")],
)
def test_a_dry_run_counts_and_stops(tmp_path, model, rank, count, capsys):
    options = ("dataset=arithmetic", "model.random_weights=true", "trainer.dry_run=true")
    assert run_here(tmp_path, f"model={model}", *options, f"adapter.rank={rank}") is None
    printed = capsys.readouterr().out
    assert f"{count} trainable" in printed and "steps: 4" in printed
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_what_the_method_keeps(tmp_path, capsys):
    """AdaLoRA's M and U, as large as the factors each."""
    options = "dataset=arithmetic trainer.dry_run=true adapter.rank=256"
    memory = {}
    for method in ("adalora", "sora"):
        run_here(tmp_path, f"method={method}", *options.split())
        lines = re.findall(r"memory, (.*): (.*) GiB", capsys.readouterr().out)
        memory[method] = {what: float(size) for what, size in lines}
    kept = memory["adalora"].pop("the method's own state")
    assert kept == pytest.approx(memory["adalora"]["factors, gradients, AdamW"] / 2, abs=0.01)
    assert all(memory[name].keys() == memory["adalora"].keys() for name in memory)


def test_held_out_loss(tmp_path):
    options = {"dataset__validation": 0.2, "eval__tasks": [], "trainer__max_steps": 3}
    record = run(small_config(tmp_path, **options))
    rows = [row for row in record.rows if row.task == "validation"]
    assert record.data["held_out"] == 20 and record.data["used"] == 80
    assert len(rows) == 1 + 3 * 4 and all(row.n == 20 and row.value > 0 for row in rows)
    on_the_way = record.training["validation"]
    assert on_the_way["records"] == 20 and on_the_way["epochs"] == [2 / 3, 1]
    (last,) = (row.value for row in rows if (row.rank, row.rule) == (4, "trained"))
    assert on_the_way["losses"][-1] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.targets=[q_proj,x_proj]", "['x_proj'] match no module"),
        ("dataset.max_length=4", "keeps a label"),
        ("dataset.path=/nowhere", "is not a folder"),
        ("model.path=/nowhere", "is not a folder"),
        ("eval.tasks=['gsm8kk:3']", "gsm8k"),
        ("model.name=nobody/nothing trainer.lr=1e-3", "set model.path=FOLDER"),
        ("model.name=nobody/nothing", "has no rate for model nobody/nothing; give trainer.lr"),
    ],
)
def test_mistakes_give_one_line_before_training(tmp_path, override, message, capsys):
    with pytest.raises(SystemExit) as end, exit_with_one_line():
        run_here(tmp_path, *override.split())
    assert end.value.code == 1
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_the_command_ends_with_one_line(tmp_path):
    done = train(tmp_path, "adapter.targets=[q_proj,x_proj]", check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "['x_proj'] match no module" in line
    assert "Traceback" not in done.stderr


def start_command(*command):
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def start(folder, *overrides):
    return start_command(str(ROOT / "train.py"), f"output_dir={folder}", *SMALL, *overrides)


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until and process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(tmp_path):
    options = ("trainer.max_steps=2000", "trainer.save_every=5")
    process = start(tmp_path, *options)
    wait_for(lambda: list(tmp_path.rglob("step-*.pt")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in errors and "Traceback" not in errors
    ((_, record),) = records(tmp_path).items()
    assert record.status == "training"


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing_that_was_finished(tmp_path):
    """20 kills -9 over a run end in the adapter and the rows of an uninterrupted run."""
    options = ("trainer.max_steps=120", "trainer.save_every=3", "eval.limit=40")
    began = time.monotonic()
    train(tmp_path / "whole", *options)
    whole = time.monotonic() - began
    generator = torch.Generator().manual_seed(0)
    killed = 0
    while killed < 20:
        process = start(tmp_path / "killed", *options)
        try:
            # Past the imports, where there is something to lose.
            share = 0.4 + 0.5 * torch.rand(1, generator=generator).item()
            process.communicate(timeout=whole * share)
            shutil.rmtree(tmp_path / "killed")  # it got through: more to kill
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
            for path in (tmp_path / "killed").rglob("record.json"):
                read_record(path)  # never half-written
    train(tmp_path / "killed", *options)
    ((path, ours),) = records(tmp_path / "killed").items()
    ((reference_path, reference),) = records(tmp_path / "whole").items()
    mine = load_file(path.parent / "adapter.safetensors")
    theirs = load_file(reference_path.parent / "adapter.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [row.key for row in ours.rows] == [row.key for row in reference.rows]
    for row, other in zip(ours.rows, reference.rows, strict=True):
        assert row.value == pytest.approx(other.value, rel=1e-4)
    lines = (path.parent / "samples" / "arithmetic_word_problems-0.jsonl").read_text().splitlines()
    keys = [(s["rank"], s["rule"], s["doc_id"]) for s in map(json.loads, lines)]
    assert len(keys) == len(set(keys))  # no point was evaluated twice


def only_one_goes_on(processes):
    """The one of two commands that has the lock; the other must have said so."""
    until = time.monotonic() + 120
    while all(process.poll() is None for process in processes):
        assert time.monotonic() < until
        time.sleep(0.05)
    first, second = processes
    refused, holder = (first, second) if second.poll() is None else (second, first)
    _, errors = refused.communicate()
    assert refused.returncode == 1 and "Traceback" not in errors
    owner = rf"\(process {holder.pid} on {re.escape(socket.gethostname())}, since 20\d\d-"
    assert re.search(rf"^error: .* is already running {owner}", errors, re.MULTILINE), errors
    return holder


@pytest.mark.slow
def test_of_two_commands_at_once_one_works_and_a_killed_one_leaves_no_lock(tmp_path):
    options = ("trainer.max_steps=3000", "trainer.save_every=5")
    holder = only_one_goes_on([start(tmp_path, *options) for _ in range(2)])
    wait_for(lambda: list(tmp_path.rglob("step-*.pt")), holder)
    holder.kill()
    holder.communicate()
    again = start(tmp_path, *options)
    (lock,) = tmp_path.rglob(".*.lock")
    wait_for(lambda: f"process {again.pid} " in lock.read_text(), again)
    (log,) = (tmp_path / "runs").rglob("train.jsonl")
    before = len(log.read_text().splitlines())
    wait_for(lambda: len(log.read_text().splitlines()) > before, again)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert again.returncode == 130
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(len(steps)))

    record = run(small_config(tmp_path / "evaluated"))
    folder = tmp_path / "evaluated" / "runs" / record.name
    data = write_data(tmp_path / "data")
    commands = [
        [str(ROOT / "scripts" / "evaluate.py"), f"run={folder}", f"eval.tasks=[{task}]"]
        for task in ("gsm8k:0", "arc_challenge:0")
    ]
    started = [start_command(*command, f"eval.data_path={data}") for command in commands]
    holder = only_one_goes_on(started)
    _, errors = holder.communicate(timeout=300)
    assert holder.returncode == 0, errors
    refused = commands[1 - started.index(holder)]
    _, errors = start_command(*refused, f"eval.data_path={data}").communicate(timeout=300)
    found = {row.key for row in read_record(folder / RECORD).rows}
    assert {row.key for row in record.rows} < found
    assert {key[0] for key in found} == {"arithmetic_word_problems", "gsm8k", "arc_challenge"}


def test_attention_is_without_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        processes.make_accelerator()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
