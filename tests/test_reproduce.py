"""The grids of the tables: what is planned, searched, resumed, published and refused."""

import dataclasses
import math
import re
import shutil
from pathlib import Path

import estimate
import evidence
import grid
import pytest
import rates
import reproduce
import reproduce_options
import tiny_lm
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from publish import for_its_rules
from test_launcher import environment, write_fake_slurm

from hydra_plugins.gpu_queue.jobs import Job, Outcome
from matryoshka_lora.cli import one_line, parse_options
from matryoshka_lora.config import Config, build_config, wanted_points
from matryoshka_lora.config import reading as settings_of_config
from matryoshka_lora.inputs import prepare
from matryoshka_lora.methods import METHODS
from matryoshka_lora.reporting import write_report
from matryoshka_lora.runs.record import Record, Row, find_records, read_record, write_record

ROOT = Path(__file__).parents[1]
GRID = ["table2", "model=llama3_1b", "lrs=0.006", "scalings=none", "ranks=32", "recipe=default"]


def main(arguments: list[str]) -> int:
    """`python scripts/reproduce.py ARGUMENTS` in this process."""
    return reproduce.main(parse_options(reproduce.Options, arguments))


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> list[str]:
    """Overrides that take model and data from a temporary folder."""
    folder = tmp_path_factory.mktemp("local")
    tiny_lm.model().save_pretrained(folder / "model")
    tiny_lm.tokenizer().save_pretrained(folder / "model")
    tiny_lm.write_jsonl(folder / "data" / "train.jsonl", tiny_lm.word_problems(20, 0))
    # The task is the embedded one, because the content of its test set is asked for.
    return [f"model.path={folder}/model", f"dataset.path={folder}/data", "eval=arithmetic"]


@pytest.fixture
def trained(monkeypatch):
    """Jobs write a record instead of training; returns their overrides, and what is to fail.

    The held-out loss is lowest at lr 3e-4; a job fails if its overrides hold a key of `fails`.
    """
    ran: list[tuple[str, ...]] = []
    fails: dict[str, str] = {}

    def run_jobs(jobs, slots, script, logs, *, show=False, more=None):
        assert script == ROOT / "train.py"
        jobs, outcomes = list(jobs), []
        for job in jobs:
            outcomes.append(run_job(job, logs))
            jobs += more(outcomes[-1]) if more else []
        return outcomes

    def run_job(job: Job, logs: Path) -> Outcome:
        ran.append(job.overrides)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = build_config(compose("train", list(job.overrides)))
        inputs = prepare(config)
        fingerprints = inputs.fingerprints | content_of_tasks(config)
        errors = [fails[text] for text in job.overrides if text in fails]
        loss = abs(math.log(config.trainer.lr / 3e-4))
        row = Row("validation", 0, None, None, 1, "svd", "loss", loss, None, 1, None)
        rows = [
            dataclasses.replace(row, rank=rank, rule=rule)
            for rule in config.eval.rules or ["prefix", "trained", "svd"]
            for rank in config.eval_ranks
        ]
        if config.eval.tasks:
            value = config.seed / 1e4
            rows = [dataclasses.replace(r, task="t", metric="acc", value=value) for r in rows]
        record = Record(
            status="failed" if errors else "finished",
            name=str(inputs.folder.relative_to(Path(config.output_dir) / "runs")),
            config=dataclasses.asdict(config),
            run_hash=inputs.run_hash,
            phases=[{"phase": "training", "device": {"kind": "cpu", "name": "this one"}}],
            model=inputs.model,
            data=inputs.data,
            training={"seconds": 60.0, "steps": 3},
            evaluation={"seconds": 30.0, "finished": wanted_points(config, fingerprints)},
            error=errors[0] if errors else None,
            rows=[] if errors else rows,
        )
        write_record(inputs.folder / "record.json", record)
        return Outcome(job, logs / "a.log", 1.0, "exit code 1" if errors else None)

    def content_of_tasks(config):  # the data of some is on the hub
        return dict.fromkeys(config.eval.tasks, "content")

    monkeypatch.setattr(grid, "_task_fingerprints", content_of_tasks)
    monkeypatch.setattr(reproduce, "run_jobs", run_jobs)
    monkeypatch.setattr(
        estimate, "environment", lambda: {"device": {"kind": "cpu", "name": "this one"}}
    )
    return ran, fails


def test_a_grid_is_its_methods_and_seeds(local, tmp_path, trained, capsys):
    arguments = [*GRID, *local, f"output_dir={tmp_path}"]
    assert main([*arguments, "dry=1"]) == 0
    shown = capsys.readouterr().out
    assert "12 runs, 0 finished, 12 to do" in shown and "estimated time: unknown" in shown
    ran, _ = trained
    assert ran == []
    assert not (tmp_path / "records").exists()

    assert main([*arguments, "methods=lora,dylora"]) == 0
    assert len(ran) == 6
    capsys.readouterr()
    assert main([*arguments, "dry=1"]) == 0
    shown = capsys.readouterr().out
    # 6 runs and their 90 s each are known from lora and dylora.
    assert "12 runs, 6 finished, 6 to do" in shown and "estimated time: 9 min" in shown

    assert main(arguments) == 0
    assert len(ran) == 12
    settings = [dict(text.split("=", 1) for text in overrides) for overrides in ran]
    assert {s["seed"] for s in settings} == {"42", "666", "2408"}
    assert {s["method"] for s in settings} == {"lora", "dylora", "matryoshka", "nested_dropout"}
    assert all(s["trainer.lr"] == "0.006" and s["adapter.scaling"] == "none" for s in settings)
    assert len(find_records(tmp_path / "records" / "table2-llama3_1b", "*.json")) == 12
    for path in (
        "tables/table2-llama3_1b.csv",
        "tables/table2-llama3_1b.md",
        "tables/table2-llama3_1b.tex",
    ):
        assert (tmp_path / path).is_file()
    assert (tmp_path / "figures/table2-llama3_1b.png").is_file()
    assert "tables/table2-llama3_1b.md" in capsys.readouterr().out

    assert main(arguments) == 0
    assert len(ran) == 12, "finished runs are not run again"


def test_a_failed_job_leaves_a_hole_and_is_the_only_one_to_run_again(
    local, tmp_path, trained, capsys
):
    ran, fails = trained
    arguments = [*GRID, *local, f"output_dir={tmp_path}"]
    arguments += ["methods=lora,matryoshka", "seeds=42,666"]
    fails["method=matryoshka"] = "OutOfMemoryError: no memory"
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert len(ran) == 4
    assert shown.err.count("OutOfMemoryError: no memory") == 2 and "a.log" in shown.err
    table = (tmp_path / "tables" / "table2-llama3_1b.md").read_text()
    assert "missing: MatryoshkaLoRA" in table and "seed 666" in table
    records = find_records(tmp_path / "records" / "table2-llama3_1b", "*.json")
    assert len(records) == 2
    fails.clear()
    assert main(arguments) == 0
    assert len(ran) == 6
    assert "missing" not in (tmp_path / "tables" / "table2-llama3_1b.md").read_text()


def test_other_seeds_of_the_grid_stay_and_are_reported(local, tmp_path, trained, caplog, capsys):
    arguments = [*GRID, *local, f"output_dir={tmp_path}"]
    folder = tmp_path / "records" / "table2-llama3_1b"
    assert main([*arguments, "methods=matryoshka", "seeds=42,666"]) == 0
    before = {path: path.read_bytes() for path in find_records(folder, "*.json")}
    assert main([*arguments, "methods=matryoshka,lora", "seeds=2408"]) == 0
    there = find_records(folder, "*.json")
    assert len(there) == 4
    assert all(path.read_bytes() == content for path, content in before.items())
    table = (tmp_path / "tables" / "table2-llama3_1b.md").read_text()
    assert "| MatryoshkaLoRA | prefix | 0.006 | 3 |" in re.sub(" +", " ", table)
    assert "not of this grid" not in caplog.text
    assert "2 more records of this grid" in capsys.readouterr().out
    # The same as `make report` writes.
    paths = write_report(
        "table2-llama3_1b", [read_record(path) for path in there], tmp_path / "again"
    )
    assert paths[1].read_text() == table or table in {
        p.read_text() for p in paths if p.suffix == ".md"
    }


def test_records_of_other_grids_are_removed_only_when_told(local, tmp_path, trained, caplog):
    arguments = [*GRID, *local, f"output_dir={tmp_path}", "methods=matryoshka"]
    folder = tmp_path / "records" / "table2-llama3_1b"
    assert main([*arguments, "seeds=42", "trainer.max_steps=7"]) == 0
    (other,) = find_records(folder, "*.json")
    (broken := folder / "broken.json").write_text("{")
    assert main([*arguments, "seeds=42,666"]) == 0
    assert len(find_records(folder, "*.json")) == 4 and broken.read_text() == "{"
    assert "2 records are not of this grid; they stay" in caplog.text and other.name in caplog.text
    table = re.sub(" +", " ", (tmp_path / "tables" / "table2-llama3_1b.md").read_text())
    assert "| MatryoshkaLoRA | prefix | 0.006 | 2 |" in table and "max_steps" not in table
    assert main([*arguments, "seeds=666", "prune=1"]) == 0
    assert {read_record(path).config["seed"] for path in find_records(folder, "*.json")} == {
        42,
        666,
    }
    assert not other.exists() and not broken.exists()


def test_a_record_under_an_older_name_gives_way_to_that_of_the_same_run(
    local, tmp_path, trained, caplog
):
    arguments = [*GRID, *local, f"output_dir={tmp_path}", "methods=matryoshka"]
    folder = tmp_path / "records" / "table2-llama3_1b"
    assert main([*arguments, "seeds=42,666"]) == 0
    for path in find_records(folder, "*.json"):
        record = dataclasses.replace(read_record(path), run_hash="01234567")
        write_record(path.with_name(path.name[:-13] + "01234567.json"), record)
        path.unlink()
    assert main([*arguments, "seeds=42"]) == 0
    names = [path.name for path in find_records(folder, "*.json")]
    assert len(names) == 2 and ["01234567" in name for name in names] == [False, True]
    assert "seed42-01234567.json: the record of the same run has a new name" in caplog.text


def test_several_learning_rates_are_searched_on_held_out_records(local, tmp_path, trained, capsys):
    ran, fails = trained
    arguments = ["table2", "model=llama3_1b", *local, f"output_dir={tmp_path}", "ranks=4"]
    arguments += ["scalings=none", "methods=lora,matryoshka", "seeds=42,666"]
    fails["trainer.lr=0.001"] = "FloatingPointError: loss is nan at step 3"
    assert main(arguments) == 0, "a training that diverges has lost, and no more"
    settings = [dict(text.split("=", 1) for text in overrides) for overrides in ran]
    search, final = settings[:8], settings[8:]
    assert {s["seed"] for s in search} == {"42"} and len(final) == 4
    assert {s["trainer.lr"] for s in search} == {"0.0001", "0.0003", "0.001", "0.003"}
    for s in search:
        assert s["dataset.validation"] == "0.05" and s["eval.tasks"] == "[]"
        # recipe=paper reads by `prefix` alone, so that decides.
        assert s["eval.rules"] == "[prefix]"
        assert s["eval.ranks"] == ("[4]" if s["method"] == "lora" else "[1,2,4]")
    assert {s["trainer.lr"] for s in final} == {"0.0003"}
    assert not any("dataset.validation" in s for s in final)
    # Those that diverged are published, too.
    for table, number in (("table2-llama3_1b", 4), ("table2-llama3_1b-search", 8)):
        assert len(find_records(tmp_path / "records" / table, "*.json")) == number
        assert (tmp_path / "tables" / f"{table}.md").is_file()
    ran.clear()
    assert main(arguments) == 0 and ran == []


def test_a_search_that_is_not_complete_chooses_nothing(local, tmp_path, trained, capsys):
    ran, fails = trained
    arguments = ["table2", "model=llama3_1b", *local, f"output_dir={tmp_path}", "ranks=4"]
    arguments += ["scalings=none", "methods=lora,dylora", "seeds=42", "recipe=default"]
    fails["method=lora"] = "OSError: no space left"
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert "lora R=4 none: no learning rate could be chosen" in shown
    assert "no space left" in shown
    assert len(ran) == 9
    table = (tmp_path / "tables" / "table2-llama3_1b.md").read_text()
    assert "missing: LoRA" in table and "DyLoRA" in table
    rules = {text for overrides in ran for text in overrides if text.startswith("eval.rules")}
    assert rules == {"eval.rules=[trained]"}


def test_the_grids_of_the_paper(local, tmp_path, capsys, trained):
    common = [*local, f"output_dir={tmp_path}"]
    assert len(reproduce_options.PAPER_LRS) == 23 and 7e-4 not in reproduce_options.PAPER_LRS
    assert sorted(reproduce_options.PAPER_LRS) == reproduce_options.PAPER_LRS
    assert main(["table2", "model=llama3_8b", "dry=1", *common]) == 0
    # 4 methods x 2 ranks x 3 scalings, 4 learning rates and 3 seeds.
    assert "168 runs, 0 finished" in capsys.readouterr().out
    small = ["seeds=42", "methods=lora", "ranks=32", "scalings=none", "dry=1"]
    assert main(["table2", "model=llama3_8b", "lrs=paper", *small, *common]) == 0
    assert "24 runs" in capsys.readouterr().out
    assert main(["table2", "model=llama3_8b", "lrs=1e-4", *small, *common]) == 0
    shown = capsys.readouterr().out
    assert "1 runs" in shown and "search" not in shown


def test_without_a_hub_a_dry_plan_is_still_shown(tmp_path, capsys, monkeypatch):
    asked = []

    def prepare(config):
        asked.append(config)
        raise ValueError("the hub cannot be reached")

    monkeypatch.setattr(grid, "prepare", prepare)
    arguments = ["table3", f"output_dir={tmp_path}"]
    assert main([*arguments, "dry=1"]) == 0
    shown = capsys.readouterr().out
    assert "336 runs" in shown and "unknown, because the hub cannot be reached" in shown
    assert "table3-llama3_1b:" in shown and "table3-llama3_8b:" in shown
    assert len(asked) == 1 and asked[0].dataset.name == "platypus"
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        main(arguments)


def test_slurm_jobs_are_products_of_exactly_the_pending_runs(local, tmp_path, monkeypatch):
    fake = write_fake_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(fake), prepend=":")
    options = parse_options(
        reproduce.Options,
        ["table2", "model=tiny", "launcher=submitit_slurm", "hydra.launcher.partition=gpu"],
    )
    runs = [
        {"model": "tiny", "method": m, "trainer.lr": lr, "seed": s, "adapter.rank": "4",
         "adapter.scaling": "none"}
        for m, lr in (("lora", "0.1"), ("dylora", "0.1"), ("matryoshka", "0.2"))
        for s in "123"
    ]  # fmt: skip
    jobs = reproduce.slurm_jobs([grid.Run(settings, None, None) for settings in runs[1:]], options)
    swept = []
    for job in jobs:
        assert job.overrides[:2] == ("-m", "hydra/launcher=submitit_slurm")
        assert "hydra.launcher.partition=gpu" in job.overrides
        assert "hydra.launcher.gpus_per_node=1" in job.overrides
        given = dict(text.split("=", 1) for text in job.overrides[2:])
        swept += [
            (method, lr, seed)
            for method in given["method"].split(",")
            for lr in given["trainer.lr"].split(",")
            for seed in given["seed"].split(",")
        ]
    assert sorted(swept) == sorted((r["method"], r["trainer.lr"], r["seed"]) for r in runs[1:])
    assert len(jobs) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tabel2"],
            "table=tabel2 is unknown; allowed: .* smollm2, .*did you mean table2",
        ),
        (["table2", "model=tinny"], "model=tinny is unknown.*did you mean tiny"),
        (["table2", "seeds=42,x"], "seeds=42,x: 'x' is not an integer"),
        (["table2", "seeds=1,1"], "each once"),
        (["table2", "name=../x"], "name=../x must be the name of a folder"),
        (["table3", "model=tiny", "rows=lora-svd"], "rows=lora-svd: table3 .*is a grid; give meth"),
        (["table2", "lrs=fast"], "'fast' is not a number"),
        (["table2", "limit=0"], "limit=0 must be a positive integer"),
        (["table2", "gpus=two"], "gpus=two: 'two' is not an integer"),
        (["table2", "dry=maybe"], "dry=maybe must be true or false .or 1 or 0"),
        (["table2", "launcher=slurm"], "launcher=slurm is unknown.*submitit_slurm"),
        (["table2", "launcher=submitit_slurm"], "no sbatch or srun here"),
        (["table2", "hydra.launcher.partition=gpu"], "needs launcher=submitit_slurm"),
        (["table2", "seed=1"], "give seeds="),
        (["table2", "method=lora"], "give methods="),
        (["table2", "force=true"], "move the run's folder away"),
        (["table2", "sedes=1"], "'sedes' is unknown.*did you mean seeds"),
        (["table2", "tiny"], "'tiny' is not key=value"),
        (["table2", "limit=1", "limit=2"], "given twice"),
        ([*GRID[:2], "limit=3", "scalings=cube"], "adapter.scaling=cube is unknown"),
        ([*GRID[:2], "limit=3", "seeds=-1"], "seed=-1 must be"),
        ([*GRID[:2], "limit=3", "lrs=0"], "trainer.lr=0.0 must be a positive number"),
        ([*GRID[:2], "limit=3", "ranks=0"], "adapter.rank=0"),
        ([*GRID, "dataset.path=nowhere"], "nowhere is not a folder"),
        (["table2", "model=llama3_1b,llama3_8b", "model.path=x"], "model.path= is for one model"),
    ],
)
def test_a_mistake_is_one_error_before_anything_starts(
    tmp_path, trained, arguments, message, monkeypatch
):
    monkeypatch.setattr(reproduce_options.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=message):
        main([*arguments, f"output_dir={tmp_path}"])
    assert trained[0] == []


EVIDENCE = """
model: tiny
seeds: [42, 666]
epochs: [2, 3]
settings: {adapter.rank: 4}
rows:
  - {name: one, rules: [trained], rates: [1e-3, 2e-3], ranks: [1], seeds: 2,
     settings: {method: lora, adapter.rank: 1}}
  - {name: prefix, rules: [prefix], rates: [1e-3], seeds: 1, epochs: [3],
     settings: {method: matryoshka}}
  - {name: svd, rules: [svd, trained], rates: [2e-3], seeds: 2, epochs: [3],
     settings: {method: matryoshka}}
"""


def test_rows_share_trainings_and_go_on_beyond_the_end_of_their_rates(
    local, tmp_path, trained, monkeypatch, capsys
):
    ran, fails = trained
    (tmp_path / "evidence").mkdir()
    (path := tmp_path / "evidence" / "table2_tiny.yaml").write_text(EVIDENCE)
    monkeypatch.setattr(evidence, "CONFIGS", tmp_path)
    arguments = ["table2", "model=tiny", *local, f"output_dir={tmp_path / 'out'}"]
    fails["trainer.lr=0.002"] = "FloatingPointError: loss is nan at step 3"
    assert main([*arguments, "only=search", "rows=one"]) == 0
    searched = [dict(text.split("=", 1) for text in overrides) for overrides in ran]
    tried = {(s["trainer.epochs"], s["trainer.lr"]) for s in searched}
    assert {lr for epochs, lr in tried if epochs == "3.0"} == {"0.002", "0.001"} | {
        "0.0005", "0.00025", "0.00013"}  # fmt: skip
    assert {lr for epochs, lr in tried if epochs == "2.0"} == {"0.00025", "0.0005"}
    ran.clear()
    fails.clear()
    assert main(arguments) == 0
    settings = [dict(text.split("=", 1) for text in overrides) for overrides in ran]
    search = [s for s in settings if "dataset.validation" in s]
    final = [s for s in settings if "dataset.validation" not in s]
    # Both rows of one training are searched in one run, the baseline's search was over.
    assert {s["method"] for s in search} == {"matryoshka"}
    assert all(s["eval.rules"] == "[prefix,svd]" for s in search)
    assert len({s["trainer.lr"] for s in search}) == len(search) == 5
    assert sorted((s["method"], s["trainer.lr"], s["seed"], s["eval.rules"]) for s in final) == [
        ("lora", "0.00025", "42", "[trained]"),
        ("lora", "0.00025", "666", "[trained]"),
        ("matryoshka", "0.00025", "42", "[prefix,trained,svd]"),
        ("matryoshka", "0.00025", "666", "[svd,trained]"),
    ]
    tables = tmp_path / "out" / "tables"
    assert "diverged" in (tables / "table2-tiny-search-rates.md").read_text()
    # What is published is finished, also where the runs are gone.
    ran.clear()
    shutil.rmtree(tmp_path / "out" / "runs")
    assert main(arguments) == 0 and ran == []
    # At the default 3 epochs, of the first row with the method and R.
    monkeypatch.setattr(rates, "CONFIGS", tmp_path)
    written = tmp_path / "rates.yaml"
    for tiny, fallback in (("", ""), ("tiny: {sora: {1: 0.2}, '*': 0.3}\n", "  '*': 0.3\n")):
        written.write_text(f"# kept\nother: {{'*': 0.1}}\n{tiny}")
        rates.main(rates.Options(str(tmp_path / "out" / "records"), str(written)))
        assert written.read_text() == (
            "# kept\nother:\n  '*': 0.1\n"
            f"tiny:\n  lora:\n    1: 0.00025\n  matryoshka:\n    4: 0.00025\n{fallback}"
        )
    for other, message in (
        ("rows=won", "rows=won is unknown.*did you mean one"),
        ("methods=lora", "methods= is of a grid; give rows="),
    ):
        with pytest.raises(ValueError, match=message):
            main([*arguments, other])
    path.write_text(EVIDENCE.replace("rates: [2e-3]", "rate: [2e-3]"))
    with pytest.raises(ValueError, match="table2_tiny.yaml: Key 'rate' not in"):
        main(arguments)


ABLATIONS = """
model: tiny
seeds: [42]
final: false
settings: {adapter.rank: 4, eval.tasks: []}
rows:
  - {name: parent, rules: [prefix, svd], rates: [1e-3], settings: {method: matryoshka}}
  - {name: mine, rules: [prefix], rates: [1e-3],
     settings: {method: matryoshka, method.decay: 0.5, adapter.scaling: sqrt}}
"""
ALSO = """
model: tiny
seeds: [42, 666]
settings: {adapter.rank: 4, eval.tasks: ["gsm8k:0"]}
rows:
  - {name: a, rules: [prefix], rates: [1e-3], also: ["gsm8k:3"], settings: {method: matryoshka}}
  - {name: b, rules: [svd], rates: [1e-3], also: ["gsm8k:3"], settings: {method: matryoshka}}
"""


def test_rows_of_a_search_alone_have_names_and_the_first_seed_more_tasks(
    local, tmp_path, trained, monkeypatch
):
    ran, _ = trained
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "smollm2_ablations.yaml").write_text(ABLATIONS)
    (tmp_path / "evidence" / "smollm2.yaml").write_text(ALSO)
    monkeypatch.setattr(evidence, "CONFIGS", tmp_path)
    rest = [*local, f"output_dir={tmp_path / 'out'}"]
    assert main(["smollm2_ablations", *rest]) == 0
    assert len(ran) == 2 and all("dataset.validation=0.05" in overrides for overrides in ran)
    assert "eval.rules=[prefix,svd]" in {text for overrides in ran for text in overrides}
    text = (tmp_path / "out" / "tables" / "smollm2-ablations.md").read_text()
    # A table for each rule, whatever the scaling; the name is the label, and nothing is a hole.
    for line in ("parent | none | prefix", "parent | svd", "mine | sqrt | prefix"):
        assert text.count(f"| {line} |") == 1
    assert "missing" not in text
    assert not list((tmp_path / "out" / "tables").glob("*rates*"))
    # The parent, read by both rules there, is a finished candidate here.
    ran.clear()
    assert main(["smollm2", "only=search", *rest]) == 0 and ran == []
    assert main(["smollm2", "only=final", *rest]) == 0
    assert [("seed=42" in o, "eval.rules=[prefix,svd]" in o) for o in ran] == [
        (True, True),
        (False, True),
    ]
    ran.clear()
    assert main(["smollm2", *rest]) == 0
    (more,) = ran
    assert {"seed=42", "eval.tasks=[gsm8k:0,gsm8k:3]", "eval.rules=[prefix,svd]"} <= set(more)
    # What is published has them, and is finished without its run.
    ran.clear()
    shutil.rmtree(tmp_path / "out" / "runs")
    assert main(["smollm2", *rest]) == 0 and ran == []


class Candidate:
    def __init__(self, loss: float | None) -> None:
        self.loss = loss

    def held_out_loss(self, rule, ranks) -> float | None:
        return self.loss


def test_fewer_epochs_are_tried_at_the_best_rate_and_above():
    """The longest training settles first; the shorter begins there and only goes up."""
    losses = {(3, 1e-3): 0.7, (3, 2e-3): 0.5, (3, 4e-3): 0.6, (2, 2e-3): 0.5, (2, 4e-3): 0.4,
              (2, 8e-3): 0.45, (2, 1e-3): 0.1}  # fmt: skip
    ended: set[tuple[int, float]] = set()
    longest, shorter = (
        grid.Rates(tried, lambda lr, n=n: Candidate(losses[n, lr] if (n, lr) in ended else None))
        for n, tried in ((3, [1e-3, 2e-3]), (2, []))
    )
    group = grid.Group("row", [42], [longest, shorter], lambda training, lr: [], extends=True)
    table = grid.Table("table", [group], lambda record: True)
    seen = []
    for _ in range(5):
        table.settle()
        seen.append((list(longest.tried), list(shorter.tried), group.lr))
        ended |= {(3, lr) for lr in longest.tried} | {(2, lr) for lr in shorter.tried}
    assert seen == [
        ([1e-3, 2e-3], [], None),
        ([1e-3, 2e-3, 4e-3], [], None),
        ([1e-3, 2e-3, 4e-3], [2e-3, 4e-3], None),
        ([1e-3, 2e-3, 4e-3], [2e-3, 4e-3, 8e-3], None),
        ([1e-3, 2e-3, 4e-3], [2e-3, 4e-3, 8e-3], 4e-3),
    ]
    assert group.training == 1


def test_committed_rows_compose_and_name_known_rates():
    for path in sorted((ROOT / "configs" / "evidence").glob("*.yaml")):
        given = evidence.read_evidence(path)
        rows = {"gemma3_270m": 5, "smollm2_svd": 3}.get(path.stem, 18)
        assert len(given.rows) == rows or (given.rows and not given.final)
        assert (ROOT / f"configs/model/{given.model}.yaml").is_file()
        for row in given.rows:
            assert (ROOT / f"configs/method/{row.settings['method']}.yaml").is_file() or (
                row.settings["method"] not in METHODS
            )


def test_rates_come_from_the_file_unless_given(tmp_path, monkeypatch):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compositions = {
            key: compose("train", key.split()) for key in
            ("model=tiny", "model=llama3_8b", "model=tiny trainer.lr=0.5",
             "model=tiny method=lora adapter.rank=3", "model.name=other trainer.lr=null",
             "model=tiny method=matryoshka")
        }  # fmt: skip
    llama = compositions["model=llama3_8b"]
    committed = yaml.safe_load((ROOT / "configs/rates.yaml").read_text())
    assert build_config(llama).trainer.lr == committed[llama.model.name]["*"]
    assert build_config(compositions["model=tiny trainer.lr=0.5"]).trainer.lr == 0.5
    with pytest.raises(ValueError, match="no rate for model other; give trainer.lr"):
        build_config(compositions["model.name=other trainer.lr=null"])
    (known := tmp_path / "rates.yaml").write_text("tiny: {lora: {1: 0.2, 4: 0.1, 32: 0.01}}")
    monkeypatch.setattr(settings_of_config, "RATES", known)
    nearest = compositions["model=tiny method=lora adapter.rank=3"]
    assert build_config(nearest).trainer.lr == 0.1
    with pytest.raises(ValueError, match="no rate for method matryoshka on model tiny"):
        build_config(compositions["model=tiny method=matryoshka"])


def test_unknown_keys_and_corrupt_records_are_named(local, tmp_path, trained):
    arguments = [*GRID, *local, f"output_dir={tmp_path}", "methods=matryoshka"]
    with pytest.raises(ConfigCompositionException) as caught:
        main([*arguments, "trainer.epohcs=2"])
    assert "epohcs" in one_line(caught.value) and "did you mean epochs" in one_line(caught.value)
    assert main([*arguments, "seeds=42"]) == 0
    (path,) = find_records(tmp_path / "runs", "record.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"record\.json is not a valid run record"):
        main(arguments)
    assert path.read_text() == "{" and len(trained[0]) == 1


def test_table3_on_the_embedded_model_ends_in_a_table(local, tmp_path, monkeypatch, capfd):
    """The whole path as `make reproduce-table3 MODEL=tiny LIMIT=20` takes it, made short."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    arguments = ["table3", "model=tiny", "limit=20", "gpus=2", local[0], f"output_dir={tmp_path}"]
    arguments += ["methods=matryoshka", "seeds=42", "trainer.max_steps=2"]
    arguments += ["eval.tasks=[arc_challenge:25,hellaswag:10]"]
    assert main([*arguments, "eval.ranks=[32]", "eval.rules=[prefix]"]) == 0
    table = (tmp_path / "tables" / "table3-tiny-limit20.md").read_text()
    assert "## arc_challenge 25-shot, first 20 documents, acc" in table
    assert "## hellaswag 10-shot, first 20 documents, acc_norm" in table
    assert table.splitlines()[0] in capfd.readouterr().out
    (path,) = find_records(tmp_path / "records", "*.json")
    assert {row.n for row in read_record(path).rows} == {20}


def test_a_place_for_the_rates_is_checked_first(tmp_path):
    (tmp_path / "file").write_text("")
    for output, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "cannot be writ")):
        with pytest.raises(ValueError, match=message):
            rates.main(rates.Options(output=str(output)))


def test_a_rule_is_published_at_the_rate_of_its_own_row():
    """Of three rows of one method, two at one rate, each reads the rules that chose that rate."""

    def run(lr, rules, **settings):
        config = Config()
        config.trainer.lr, config.eval.rules = lr, rules
        texts = {"method": "matryoshka", "trainer.lr": str(lr), "eval.rules": str(rules)}
        return grid.Run(texts | settings, config, None)

    both, svd = run(2e-3, ["prefix", "trained"]), run(1e-3, ["svd", "global"])
    other = run(1e-3, ["prefix"], **{"adapter.init": "paper"})
    row = Row("gsm8k", 0, None, None, 1, "base", "loss", 1.0, None, 1)
    rules = ["prefix", "trained", "svd", "global"]
    full = Record(
        "finished", "run", {}, "0" * 8, {}, {},
        evaluation={"finished": [f"gsm8k:0 limit=None abc {rule}@1" for rule in rules]},
        rows=[row, *(dataclasses.replace(row, rule=rule) for rule in rules)],
    )  # fmt: skip

    def published(of, *plan):
        found = for_its_rules(full, of, plan)
        points = [point.rpartition(" ")[2] for point in found.evaluation["finished"]]
        assert [f"{row.rule}@1" for row in found.rows] == ["base@1", *points]
        return [row.rule for row in found.rows[1:]]

    plan = (both, svd, other)
    assert published(both, *plan) == ["prefix", "trained"]
    assert published(svd, *plan) == ["svd", "global"]
    # Another row's rule of other settings is its own, and without the rows nothing is known.
    assert published(other, *plan) == rules
    assert published(both, both) == rules
    svd.config.dataset.validation = 0.05
    assert published(svd, *plan) == rules, "a candidate of a search is read by whoever tries it"
