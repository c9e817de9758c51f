"""The training benchmark: its inputs, its clock, its arithmetic, and one run of all systems."""

import json
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from benchmark_common import (
    gsm8k_lengths,
    merge_entry,
    run_each,
    settings_of,
    training_flops,
    write_table,
)
from conftest import ROOT, TARGETS, small_llama

from matryoshka_lora.cli import exit_with_one_line, parse_options, run_script
from matryoshka_lora.config import Config
from matryoshka_lora.core.adapter import add_adapters
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.data.examples import Example
from matryoshka_lora.ops.graphs import Graphs
from matryoshka_lora.runs.provenance import environment
from matryoshka_lora.training import forwards
from matryoshka_lora.training.forwards import packed_backward
from matryoshka_lora.training.plan import split_into_forwards

sys.path.insert(0, str(ROOT / "scripts"))
import benchmark_scaling as scaling  # noqa: E402
import benchmark_sweep as sweep_script  # noqa: E402
import benchmark_training as script  # noqa: E402
import project_scaling as projection  # noqa: E402


def main(arguments):
    return script.main(parse_options(script.Options, arguments))


def test_drawn_lengths_are_those_of_gsm8k():
    lengths = gsm8k_lengths(7473)
    both = lengths.sum(1)
    np.testing.assert_allclose(lengths.mean(0), (63, 101), rtol=0.02)
    np.testing.assert_allclose([np.median(both), np.quantile(both, 0.95)], (154, 275), rtol=0.05)
    assert both.max() <= 464 and lengths.min() > 0
    assert np.array_equal(lengths[:9], gsm8k_lengths(7473)[:9])


def test_operations_are_counted_as_by_hand():
    model = small_llama()
    add_adapters(model, AdapterSpec(4, "none", (1.0,) * 4, False), TARGETS)
    examples = [Example(tuple(range(10)), 4), Example(tuple(range(6)), 4)]
    # Two layers of width 32, keys and values of 16, MLP of 48; 64 tokens in the vocabulary.
    frozen = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    factors = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    head = 64 * 32 * (6 + 2) / 16
    attention = 6 * 32 * 2 * (100 + 36) / 16
    expected = 4 * frozen + 6 * factors + 4 * head + attention
    assert training_flops(model, examples) == pytest.approx(expected)


def test_the_clock_leaves_out_the_first_steps(monkeypatch):
    now = iter([100.0, 103.0, 105.5, 106.0])
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(now))
    clock = script.Clock(torch.device("cpu"), [1, 1, 7, 8, 9], warmup=2, seconds=5.0, began=90.0)
    assert [clock.tick(queued) for queued in (1, 2, 3)] == [None] * 3
    assert clock.tick(4) == {
        "tokens_per_second": (7 + 8) / 6,
        "warmup": 2,
        "steps": 2,
        "seconds": 6.0,
        "start_seconds": 10.0 - 2 * 3.0,  # two steps of it are no warm-up
        "peak_gib": None,
    }


def test_no_graph_is_captured_in_measured_steps(monkeypatch):
    """Against what the processes' own forwards capture."""
    processes, steps = 2, 6
    generator = np.random.default_rng(0)
    lengths = [2 * ids_per_label for ids_per_label in generator.integers(20, 160, 40)]
    examples = [Example(tuple(range(n)), n // 2) for n in lengths]
    batches = [generator.choice(40, 6, replace=False) for _ in range(60)]
    config = Config()
    monkeypatch.setattr(forwards, "packed_loss", lambda *rest: torch.zeros((), requires_grad=True))
    begun, captures = [], []

    def capture(function, pool):
        captures.append(len(begun) - 1)
        return function

    model = small_llama()
    backward = [
        packed_backward(model, torch.ones(1, 4), config, Graphs(capture)) for _ in range(processes)
    ]
    for ids in batches:
        begun.append(ids)
        batch = [examples[i] for i in ids]
        for process in range(processes):
            tokens = [len(example.tokens) for example in batch]
            for own in split_into_forwards(tokens, process, processes, None, 16384):
                backward[process]([batch[i] for i in own], np.zeros(1, dtype=int), 1.0)
    found = script.first_without_captures(examples, batches, config.trainer, processes, 3, steps)
    assert captures and set(captures).isdisjoint(range(found, found + steps))
    for earlier in range(3, found):
        assert set(captures) & set(range(earlier, earlier + steps)), earlier
    assert found > 3
    with pytest.raises(UserError, match="fewer steps"):
        script.first_without_captures(examples, batches, config.trainer, processes, 3, 60)


def test_shapes_are_measured_into_one_record_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "SAMPLES", 12)
    monkeypatch.setattr(script, "EFFECTIVE_BATCH", 2)
    monkeypatch.setitem(script.BASELINES, "peft 1x2", (1, 2, False))
    monkeypatch.setitem(script.BASELINES, "free", (2, 1, True))
    monkeypatch.setattr(script, "REFERENCE", "peft 1x2")
    monkeypatch.setattr(script, "matmul_rate", lambda *_: 1e12)
    options = ["shape=tiny", "seconds=0.2", "others=0.1", "warmup=1", f"output={tmp_path}"]
    assert main([*options, "rank=2", "methods=[lora]", "baselines=[]"]) == 0
    chosen = ["methods=[lora,nested_dropout]", "baselines=[peft 1x2,free]"]
    assert main([*options, "rank=4", *chosen]) == 0
    device = environment()["device"]["name"]
    found = json.loads((tmp_path / "training.json").read_text())["entries"]
    assert list(found) == [f"tiny-r2 on {device}", f"tiny-r4 on {device}"]
    entries = dict(zip(("tiny-r2", "tiny-r4"), found.values(), strict=True))
    systems = entries["tiny-r4"]["systems"]
    assert list(systems) == ["lora", "nested_dropout", "peft 1x2", "free"]
    assert all(x["tokens_per_second"] > 0 and x["steps"] > 0 for x in systems.values())
    table = (tmp_path / "training.md").read_text()
    assert table.count("tiny-r4") == 4 and table.count("tiny-r2") == 1
    (row,) = [r for r in script.table_rows("k", entries["tiny-r4"]) if r["system"] == "lora"]
    speed, reference = (systems[name]["tokens_per_second"] for name in ("lora", "peft 1x2"))
    assert row["x peft 1x2"] == f"{speed / reference:.2f}"
    assert row["MFU"] == f"{100 * speed * entries['tiny-r4']['model_flops'] / 1e12:.0f} %"
    assert table.splitlines()[-1] in capsys.readouterr().out


def test_a_table_names_machine_and_commit(tmp_path):
    where = {"device": {"name": "card"}, "versions": {"torch": "2.11"}}
    commits = [{"sha": "0123456789", "dirty": False}, {"sha": "0123456789", "dirty": True}, None]
    entries = {f"{i} on card": where | {"git": git} for i, git in enumerate(commits)}
    write_table(tmp_path, "training", entries, lambda key, entry: [{"shape": key}], "note")
    lines = (tmp_path / "training.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert cells == [[str(i), "card", "2.11", c] for i, c in enumerate(["0123456", "0123456+", ""])]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shape=llama", "shape=llama is unknown; allowed: llama3_70b"),
        ("methods=[lora,dora]", "methods=dora is unknown"),
        ("seconds=0", "seconds and others above 0"),
        ("sedonds=1", "sedonds"),
    ],
)
def test_mistakes_give_one_line(argument, message, capsys):
    with pytest.raises(SystemExit), exit_with_one_line():
        main([argument])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_help_shows_the_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", "--help"])
    run_script(script.main, script.__doc__, script.Options)
    shown = capsys.readouterr().out
    assert shown.startswith("Training speed") and "seconds" in shown and "[60.0]" in shown
    # What is committed is only written where that is asked for.
    assert "[results/benchmarks-local]" in shown and "results/benchmarks adds to" in shown


def test_each_entry_is_a_process_of_its_own(tmp_path, capfd):
    """It shows a mistake as one line like any command, and the others go on."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, sys\n"
        "print(sys.argv[1:], 'HYDRA_FULL_ERROR' in os.environ)\n"
        "sys.exit(sys.argv[2] == 'a=1')\n"
    )
    entries = {"cpu": ["a=1", "a=2 b=[1,2]"], "cuda": ["a=1", "a=2 b=[1,2]"]}
    with exit_with_one_line():
        assert run_each(str(child), entries, ["output=x"]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines() == ["['output=x', 'a=1'] False", "['output=x', 'a=2', 'b=[1,2]'] False"]
    assert err == "error: these failed: a=1\n"


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"schema": 1, "benchmark": "sweep"}'])
def test_what_is_no_record_is_left_alone(content, tmp_path):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match=r"training\.json is not a record .* move it away"):
        main(["shape=tiny", f"output={tmp_path}"])
    assert (tmp_path / "training.json").read_text() == content


def test_the_efficiency_of_n_cards_is_a_share_of_n_times_one(tmp_path):
    """Of the same card, shape and system; a measurement that failed says why."""
    where = {"git": None, "versions": {"torch": "2"}}

    def entry(card, **systems):
        return {"device": {"name": card}, "systems": systems} | where

    fast = {"tokens_per_second": 1900.0, "peak_gib": 3.0, "steps": 60}
    entries = {
        "big-r32 on A": entry("A", ours={"tokens_per_second": 1000.0}),
        "big-r32-x2 on A": entry("A", ours=fast, other={"error": "no memory. More"}),
        "big-r32-x2 on B": entry("B", ours=fast),
    }
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in scaling.write_scaling(tmp_path, entries).splitlines()[2:]
    ]
    assert [[*line[:5], line[7]] for line in lines] == [
        ["big-r32", "1", "1,000 tokens/s", "1.00", "1.000", ""],
        ["big-r32", "2", "1,900 tokens/s", "1.90", "0.950", ""],
        ["big-r32", "2", "", "", "", "no memory"],
        ["big-r32", "2", "1,900 tokens/s", "", "", ""],
    ]


def test_the_scaling_table_has_every_kind_of_measurement(tmp_path):
    where = {"device": {"name": "A"}, "git": None, "versions": {"torch": "2"}}
    trained = {"ours": {"tokens_per_second": 1000.0}}
    losses = {"training_seconds": 9.0, "same_on_all_processes": None}
    swept = {"answers_per_second": 10.0, "seconds": 8.0, "peak_gib": None}
    entries = {
        "big": {"systems": trained},
        "big-sharded-x4": {"systems": {"ours": {"tokens_per_second": 3000.0}}},
        "losses-x1": losses | {"losses": [2.0, 1.0]},
        "losses-x2": losses | {"losses": [2.0, 1.25], "same_on_all_processes": True},
        "losses-split": losses | {"losses": [2.0, 1.5]},
        "shape-3shot-9": swept | {"answers_sha": "1"},
        "shape-3shot-9-x2": swept | {"answers_per_second": 18.0, "answers_sha": "2"},
        "run-0shot-9": swept | {"values": {"8 prefix acc": 0.5}},
        "run-0shot-9-x2": swept | {"values": {"8 prefix acc": 0.75}},
        "grid-x1": {"runs": 8, "seconds": 70.0},
        "grid-x2": {"runs": 8, "seconds": 40.0},
    }
    entries = {f"{key} on A": entry | where for key, entry in entries.items()}
    table = scaling.write_scaling(tmp_path, entries)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    efficiency = {(line[0], line[1]): (line[4], line[7]) for line in cells[2:]}
    assert efficiency == {
        ("big", "1"): ("1.000", ""),
        ("big-sharded", "4"): ("0.750", ""),
        ("losses", "1"): ("", ""),
        ("losses", "2"): (
            "",
            "losses differ by 2.5e-01 at most; adapter equal on all processes",
        ),
        ("losses-split", "1"): ("", "losses differ by 5.0e-01 at most"),
        ("shape-3shot-9", "1"): ("1.000", ""),
        ("shape-3shot-9", "2"): ("0.900", "some answers differ"),
        ("run-0shot-9", "1"): ("1.000", ""),
        ("run-0shot-9", "2"): ("0.500", "1 rows differ by 2.5e-01 at most"),
        ("grid", "1"): ("1.000", ""),
        ("grid", "2"): ("0.875", ""),
    }


def test_measurements_get_cards_of_their_own_and_what_needs_all_goes_last():
    log, lock = [], threading.Lock()

    def measurement(name, cards, **more):
        def run(ids):
            with lock:
                log.append((name, "began", set(ids)))
            time.sleep(0.05)
            with lock:
                log.append((name, "ended", set(ids)))
            if name == "b":
                raise RuntimeError("no memory")

        return scaling.Measurement(name, cards, run, **more)

    asked = [measurement(name, 1) for name in "ab"]
    asked += [measurement("late", 1, after="a"), measurement("long", 1, is_long=True)]
    asked += [measurement("two", 2), measurement("all", 3)]
    assert scaling.run_all(asked, ["0", "1", "2"]) == ["b: no memory"]
    order = [name for name, what, _ in log if what == "began"]
    assert {*order[:3]} == {"a", "long", "b"} and order[-1] == "all" and len(order) == 6
    held = {}
    for name, what, ids in log:
        if what == "ended":
            del held[name]
            continue
        assert name != "late" or ("a", "ended") in [entry[:2] for entry in log]
        assert not any(ids & others for others in held.values())
        held[name] = ids


def test_what_is_there_with_the_same_options_is_not_measured_again(tmp_path, monkeypatch):
    given = {"gpus": [1, 2], "parts": ["training"], "shapes": ["tiny-r32"]}
    options = scaling.Options(**given, output=str(tmp_path), work=str(tmp_path))

    def names(**changed):
        return [m.name for m in scaling.Bench(replace(options, **changed), False).plan()]

    assert names() == ["tiny-r32 on 1", "tiny-r32 on 2"]
    measured = script.Options(
        shape="tiny", rank=32, methods=["matryoshka"], baselines=[], steps=options.steps
    )
    merge_entry(tmp_path, "training", "x-x2", {"options": settings_of(measured), "processes": 2})
    assert names() == ["tiny-r32 on 1"] and names(again=True) == ["tiny-r32 on 1", "tiny-r32 on 2"]
    assert names(steps=7) == ["tiny-r32 on 1", "tiny-r32 on 2"]
    assert names(parts=["losses", "grid"], gpus=[1, 2, 4]) == [
        *("losses-split", "losses-x1", "losses-x2", "losses-x4", "grid-x1", "grid-x4")
    ]


def test_the_sweep_of_an_older_run_is_not_taken_for_that_of_a_new_one(tmp_path):
    given = {"gpus": [1], "parts": ["losses", "sweep"], "sweeps": ["run"]}
    options = scaling.Options(**given, output=str(tmp_path), work=str(tmp_path))

    def names(**changed):
        return sorted(m.name for m in scaling.Bench(replace(options, **changed), False).plan())

    everything = ["losses-split", "losses-x1", "sweep of run on 1"]
    assert names() == everything
    swept = sweep_script.Options(tasks=["arithmetic_word_problems:0"], baseline=False)
    merge_entry(tmp_path, "sweep", "x", {"options": settings_of(swept), "processes": 1})
    assert names() == everything
    trained = {"overrides": scaling.Bench(options, False)._overrides(300), "smollm2": False}
    trained["overrides"] += ["eval.limit=1"]
    merge_entry(tmp_path, "scaling", "losses-x1", {"options": trained, "processes": 1})
    (tmp_path / "losses-x1").mkdir()
    assert names() == ["losses-split"]
    assert names(loss_steps=20) == everything


def test_a_sharded_run_of_losses_is_not_taken_for_a_whole_one(tmp_path):
    options = scaling.Options(parts=["losses"], output=str(tmp_path), work=str(tmp_path))

    def names():
        return [m.name for m in scaling.Bench(options, True).plan()]

    everything = ["losses-split", "losses-sharded-x4", "losses-x1", "losses-x2", "losses-x4"]
    assert names() == everything
    (plan,) = (m for m in scaling.Bench(options, True).plan() if m.name == "losses-sharded-x4")
    settings = {
        "overrides": ["method=matryoshka", "trainer.max_steps=300", "eval.limit=1"],
        "smollm2": False,
    }
    merge_entry(tmp_path, "scaling", plan.name, {"options": settings, "processes": plan.cards})
    assert names() == [name for name in everything if name != plan.name]


def test_what_takes_too_long_is_ended_with_all_its_processes(tmp_path):
    """A launcher's processes have sessions of their own, so its end alone would leave them."""
    options = scaling.Options(output=str(tmp_path), work=str(tmp_path), seconds=60, limit=2)
    bench = scaling.Bench(options, False)
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "print('error: nobody answers', flush=True)\n"
        "time.sleep(60)"
    )
    with pytest.raises(RuntimeError, match=r"ended after 2 s: nobody answers \(see .*hang\.log"):
        bench.start("hang", ["0"], ["-c", program], 1)
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
    bench.end = 0.0
    with pytest.raises(RuntimeError, match="not begun: no time was left"):
        bench.start("late", ["0"], ["-c", "print(1)"], 1)


def test_what_only_some_cards_can_do_is_asked_of_those_alone(tmp_path, monkeypatch):
    """A base that is too large for fewer, and the launch of a sharded run, which needs GPUs."""

    def names(on_gpus, gib=80, **asked):
        device = {"name": "a card", "memory_gib": gib}
        monkeypatch.setattr(scaling, "environment", lambda: {"device": device})
        options = scaling.Options(**asked, output=str(tmp_path), work=str(tmp_path))
        return [each.name for each in scaling.Bench(options, on_gpus).plan()]

    for gib, counts in ((80, [4]), (140, [2, 4]), (280, [1, 2, 4])):
        assert names(True, gib, parts=["sharded"], shapes=["llama3_70b-r16-sharded"]) == [
            f"llama3_70b-r16{'-sharded' * (count > 1)} on {count}" for count in counts
        ]
        assert names(True, gib, parts=["sweep"], sweeps=["llama3_70b-sharded"]) == [
            f"sweep of llama3_70b-sharded on {count}" for count in counts if count > 1
        ]
    assert names(True, parts=["training"], shapes=["llama3_70b-r16", "tiny-r32"], gpus=[4]) == [
        "tiny-r32 on 4"
    ]
    assert names(True, parts=["sweep"], sweeps=["llama3_70b-sharded", "tiny"], gpus=[1, 4]) == [
        *("sweep of tiny on 1", "sweep of llama3_70b-sharded on 4", "sweep of tiny on 4")
    ]
    sharded = {True: ["losses-sharded-x2"], False: []}
    for on_gpus, more in sharded.items():
        assert names(on_gpus, parts=["losses"], gpus=[1, 2]) == [
            *("losses-split", *more, "losses-x1", "losses-x2")
        ]


@pytest.mark.parametrize("asked", [{"gpus": []}, {"gpus": [0]}, {"gpus": [99]}, {"shapes": []}])
def test_scaling_refuses_what_is_not_there(tmp_path, monkeypatch, asked):
    monkeypatch.setattr(scaling, "visible_gpus", lambda: ["0", "1"])
    options = scaling.Options(**{"gpus": [1], "output": str(tmp_path)} | asked)
    with pytest.raises(UserError, match=next(iter(asked))):
        scaling.main(options)


def test_a_projection_is_the_arithmetic_of_its_note(tmp_path, monkeypatch, capsys):
    """1e9 trainable parameters: 4 GB, of which 4 GPUs move 6 GB over each link in 0.06 s.

    What a shape with a smaller gradient takes longer on 4 says nothing about the link.
    """
    monkeypatch.setattr(
        projection, "gsm8k_lengths", lambda n: np.full((n, 2), 50), raising=True
    )  # 3 epochs of 7473 records are 2,241,900 tokens
    where = {"git": None, "versions": {"torch": "2"}, "device": {"name": "A"}}

    def trained(n, step, gib, base=8e9, trainable=1e9):
        system = {
            "tokens_per_second": n * 5000 / step,
            "steps": 10,
            "seconds": 10 * step,
            "peak_gib": gib,
        }
        counts = {"trainable": int(trainable), "parameters": int(base + trainable)}
        return {"processes": n, "systems": {"matryoshka": system}} | counts | where

    swept = {"points": "9", "answers_per_second": 1.0, "seconds": 240.0} | where
    entries = {
        "training": {
            "big-r8 on A": trained(1, 0.30, 40.0),
            "big-r8-x4 on A": trained(4, 0.36, 40.0),
            "big-r8-sharded-x4 on A": trained(4, 0.50, 30.0),
            "big-r1 on A": trained(1, 0.30, 40.0, trainable=1e8),
            "big-r1-x4 on A": trained(4, 0.40, 40.0, trainable=1e8),
        },
        "sweep": {
            "big-r8-3shot-9 on A": swept,
            "big-r8-3shot-9-x4 on A": swept | {"seconds": 75.0, "processes": 4},
            "big-r2-3shot-9 on A": swept | {"seconds": 9.0},
        },
    }
    for name, found in entries.items():
        content = {"schema": 2, "benchmark": name, "entries": found}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    folders = [f"folder={tmp_path}", f"sweeps={tmp_path}"]
    projection.main(parse_options(projection.Options, [*folders, "networks=[100,10]"]))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()[2:]
    ]
    # 6 GB / 0.06 s = 100 GB/s; 8 GPUs move 7 GB, 64 move 7.875 GB.
    whole = [row[3:6] + row[7:] for row in rows if row[0] == "big-r8"]
    assert [row[:3] for row in whole] == [
        ["100", "0.370", "0.070"],
        ["100", "0.379", "0.079"],
        ["10", "1.087", "0.787"],
    ]
    speed = 8 * 5000 / 0.37
    # Of the sweep 20 s are not shared: 220 / 4 + 20 is 75.
    training, sweep = 2_241_900 / speed, 220 / 8 + 20
    assert whole[0][3:] == [
        f"{speed:,.0f}",
        f"{0.3 / 0.37:.2f} of that of 1",
        "40.0",
        f"{training:.1f}",
        f"{sweep:.1f}",
        f"{sweep / (sweep + training):.0%}",
    ]
    assert [row[4:6] for row in rows if row[0] == "big-r1"][0] == ["0.307", "0.007"]
    # Gathers are 2 * 7/8 * 16 GB at 100 GB/s: less than the step of 4; over 10 GB/s they are more.
    sharded = [row for row in rows if row[0] == "big-r8-sharded"]
    assert [row[4:7] for row in sharded] == [
        [f"{0.5 + 0.01:.3f}", "0.070", "0.280"],
        [f"{0.5 + 0.01875:.3f}", "0.079", "0.315"],
        [f"{3.15 + 0.7875:.3f}", "0.787", "3.150"],
    ]
    held = 30 - 16e9 * (1 / 4 - 1 / 8) / 2**30
    assert sharded[0][9] == f"{held:.1f}"
    assert "Computed, not measured" in (tmp_path / "projection.md").read_text()
