"""Which rank and rule a finished run is used at: choose_rank.py, the default rule, and export."""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from matryoshka_lora import at_rank, export, load_run
from matryoshka_lora.cli import parse_options
from matryoshka_lora.config import Config
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.rows import Row, encode_scores
from matryoshka_lora.loading import read_run
from matryoshka_lora.models import EMBEDDED
from matryoshka_lora.pipeline import run
from matryoshka_lora.reporting.choosing import measured, rule_for
from matryoshka_lora.runs.record import read_record, write_record


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a real run on the embedded model and data."""
    config = Config()
    config.output_dir = str(tmp_path_factory.mktemp("trained"))
    config.method.name, config.dataset.limit = "matryoshka", 100
    config.adapter.rank, config.trainer.max_steps = 4, 4
    config.eval.limit, config.eval.tasks = 20, ["arithmetic_word_problems:0"]
    config.eval.ranks, config.eval.rules = [2, 4], ["trained", "svd", "global"]
    run(config)
    (record,) = (ROOT / config.output_dir).rglob("record.json")
    return record.parent


def command(name, *arguments):
    """`python scripts/NAME.py ARGUMENTS` in this process."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.main(parse_options(module.Options, arguments))


def with_scores(trained, folder, scores, metric="exact_match", **changes):
    """A copy of the run whose record holds these scores: (rank, rule) -> documents."""
    shutil.copytree(trained, folder)
    record = read_record(folder / "record.json")
    rows = [
        Row(
            *("made_up", 0, None, None, rank, rule, metric),
            *(float(np.mean(own)), None, len(own)),
            scores=encode_scores(own) if changes.get("kept", True) else None,
        )
        for (rank, rule), own in scores.items()
    ]
    status = changes.get("status", "finished")
    write_record(folder / "record.json", dataclasses.replace(record, rows=rows, status=status))
    return folder


def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(12)[None]).logits


def first(right, of=400):
    """Scores of documents of which the first `right` are answered well."""
    return [1.0] * right + [0.0] * (of - right)


SCORES = {
    (1, "svd"): first(100),
    (2, "prefix"): first(0),
    (2, "trained"): first(299),
    (2, "svd"): first(300),
    (4, "trained"): first(301),
}


def chosen(capsys):
    """What the command that it recommends exports, and the lines before it."""
    *table, last = capsys.readouterr().out.splitlines()
    assert last.startswith("python scripts/export.py ")
    options = dict(part.split("=", 1) for part in shlex.split(last)[2:])
    return (int(options["rank"]), options["rule"]), options, table


def test_a_real_run_is_chosen_from_and_the_recommended_line_exports_it(
    trained, tmp_path, monkeypatch, capsys
):
    command("choose_rank", f"run={trained}", "metric=loss")
    (rank, rule), options, table = chosen(capsys)
    assert "loss" in table[0] and "20 documents" in table[0]
    marked = [line.split() for line in table if line.startswith(">")]
    assert [cells[1:3] for cells in marked] == [[str(rank), rule]]
    monkeypatch.chdir(tmp_path)
    command("export", *(f"{key}={value}" for key, value in options.items()))
    written = load_file(tmp_path / options["out"] / "adapter_model.safetensors")
    parameters = sum(tensor.numel() for tensor in written.values())
    assert marked[0][3] == f"{parameters:,}"
    # Layers of a rank of their own are counted as they are, too.
    line = next(text.split() for text in table if " global " in text)
    command("export", f"run={trained}", f"rank={line[0]}", "rule=global", "out=of_layers")
    written = load_file("of_layers/adapter_model.safetensors")
    assert f"{sum(tensor.numel() for tensor in written.values()):,}" == line[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (2, "svd")),  # a document of 400 behind, at most 3 at the end of the interval
        (["tolerance=0.1"], (4, "trained")),
        (["tolerance=0"], (4, "trained")),
        (["tolerance=60"], (1, "svd")),
        (["budget_mb=0.13"], (2, "svd")),  # 30,208 parameters of 4 bytes
        (["budget_mb=0.12"], (1, "svd")),
        (["budget_params=30208"], (2, "svd")),
        (["budget_params=30207"], (1, "svd")),
        (["budget_mb=0.13", "tolerance=60"], (1, "svd")),
        (["budget_mb=100"], (4, "trained")),
    ],
)
def test_the_smallest_within_the_tolerance_or_the_best_of_a_budget(
    trained, tmp_path, capsys, arguments, expected
):
    folder = with_scores(trained, tmp_path / "run", SCORES)
    command("choose_rank", f"run={folder}", *arguments)
    assert chosen(capsys)[0] == expected


def test_a_wide_interval_does_not_let_a_smaller_rank_pass(trained, tmp_path, capsys):
    """Nearly the same mean, but of other documents: the paired difference is not known well."""
    for name, rank_2 in (("other", first(200)[::-1]), ("same", first(200))):
        scores = {(2, "svd"): rank_2, (4, "svd"): first(201)}
        command("choose_rank", f"run={with_scores(trained, tmp_path / name, scores)}")
        assert chosen(capsys)[0] == (4 if name == "other" else 2, "svd")


@pytest.mark.parametrize(
    ("documents", "base", "arguments", "messages"),
    [
        (30, 0.1, [], ["30 documents, .* 11.6 points apart, more than the tolerance of 1;"]),
        (30, 0.1, ["tolerance=12"], []),
        (30, 0.1, ["budget_mb=inf"], []),
        (400, 0.1, [], []),
        (400, 0.5, [], ["no reading is better than the model without the adapter: 50.0 against"]),
    ],
)
def test_what_the_record_does_not_show_is_said(
    trained, tmp_path, caplog, documents, base, arguments, messages
):
    own = first(documents // 2, documents)
    scores = {(1, "svd"): own, (2, "svd"): own, (4, "svd"): own}
    folder = with_scores(trained, tmp_path / "run", scores)
    record = read_record(folder / "record.json")
    row = Row("made_up", 0, None, None, 0, "base", "exact_match", base, None, documents)
    write_record(folder / "record.json", dataclasses.replace(record, rows=[row, *record.rows]))
    command("choose_rank", f"run={folder}", *arguments)
    assert caplog.text.count("WARNING") == len(messages)
    assert all(re.search(message, caplog.text) for message in messages)


@pytest.mark.parametrize(("tolerance", "rank"), [(1, 4), (3, 2)])
def test_the_tolerance_of_a_loss_is_percent(trained, tmp_path, capsys, tolerance, rank):
    losses = np.linspace(1, 3, 50)
    scores = {(2, "svd"): list(losses * 1.02), (4, "svd"): list(losses)}
    folder = with_scores(trained, tmp_path / "run", scores, "loss")
    command("choose_rank", f"run={folder}", f"tolerance={tolerance}")
    assert chosen(capsys)[0] == (rank, "svd")


def test_a_metric_with_scores_of_documents_goes_first(trained, tmp_path, capsys):
    """Not the held-out loss of a search, which keeps none, whatever it is called."""
    folder = with_scores(trained, tmp_path / "run", SCORES)
    record = read_record(folder / "record.json")
    held_out = Row("a_validation", 0, None, None, 1, "svd", "loss", 0.1, None, 300)
    write_record(folder / "record.json", dataclasses.replace(record, rows=[held_out, *record.rows]))
    command("choose_rank", f"run={folder}")
    assert chosen(capsys)[0] == (2, "svd")
    assert rule_for(record, read_run(trained).spec, 1) == "svd"
    with pytest.raises(UserError, match="no scores of single documents by a_validation"):
        command("choose_rank", f"run={folder}", "metric=a_validation")


@pytest.mark.parametrize(
    ("scores", "changes", "arguments", "message"),
    [
        (SCORES, {"status": "evaluating"}, [], "has not finished .*status evaluating"),
        (SCORES, {"kept": False}, [], "no scores of single documents .*metric="),
        ({(1, "svd"): first(3, 10)}, {}, [], "holds 10 documents .*needs 20"),
        (SCORES | {(1, "svd"): first(3, 30)}, {}, [], "different numbers of documents .*30, 400"),
        ({}, {}, [], "no scores at any rank.*evaluate.py"),
        (SCORES, {}, ["budget_params=10"], "nothing fits 10 parameters .*rank 1 by svd, has"),
        (SCORES, {}, ["budget_mb=1", "budget_params=10"], "not both"),
        (SCORES, {}, ["budget_mb=0"], "must be above 0"),
        (SCORES, {}, ["tolerance=-1"], "must be 0 or more"),
        (SCORES, {}, ["metric=bleu"], "there is: made_up 0-shot, exact_match"),
    ],
)
def test_what_cannot_be_chosen_from(trained, tmp_path, scores, changes, arguments, message):
    folder = with_scores(trained, tmp_path / "run", scores, **changes)
    with pytest.raises(UserError, match=message) as caught:
        command("choose_rank", f"run={folder}", *arguments)
    assert "\n" not in str(caught.value)


def test_export_reads_each_rank_by_the_rule_that_its_record_shows_best(trained, tmp_path, caplog):
    scores = {
        (1, "prefix"): first(0),
        (1, "svd"): first(180),
        (2, "trained"): first(220),
        (2, "svd"): first(210),
    }
    folder = with_scores(trained, tmp_path / "run", scores)
    caplog.set_level("INFO", "matryoshka_lora")
    loaded = load_run(folder)
    for rank, rule, why in (
        (1, "svd", "rule=svd is the best at rank 1 by made_up .*prefix 0.0, svd 45.0; unit %"),
        (2, "trained", "rule=trained is the best at rank 2 "),
        (4, "trained", "rule=trained: the record holds no scores at rank 4"),
    ):
        caplog.clear()
        command("export", f"run={folder}", f"rank={rank}", f"out={tmp_path / str(rank)}")
        assert re.search(why, caplog.text)
        assert provenance(tmp_path / str(rank))["rule"] == rule
        caplog.clear()
        with loaded.at_rank(rank):
            found = logits(loaded.model)
        assert re.search(why, caplog.text)
        with at_rank(loaded.model, rank, rule):
            assert torch.equal(found, logits(loaded.model))
    with loaded.at_rank(0), at_rank(loaded.model, 0):
        logits(loaded.model)
    caplog.clear()
    with loaded.at_rank(2):  # known from before
        logits(loaded.model)
    assert not caplog.text
    for rank, message in ((-1, "rank -1 is not"), (5, "rank 5 is above")):
        with pytest.raises(UserError, match=message), loaded.at_rank(rank):
            pass


def test_a_task_that_was_added_later_does_not_decide(trained, tmp_path):
    record = read_record(
        with_scores(trained, tmp_path / "run", {(2, "svd"): first(9)}) / "record.json"
    )
    config = record.config | {"eval": record.config["eval"] | {"tasks": ["made_up:0"]}}
    added = Row("added", 0, None, None, 2, "trained", "acc", 0.5, None, 20)
    scored = dataclasses.replace(added, scores=encode_scores(first(10, 20)))
    record = dataclasses.replace(record, config=config, rows=[scored, *record.rows])
    assert measured(record).metric.task == "made_up"
    assert rule_for(record, read_run(trained).spec, 2) == "svd"


def test_of_rules_that_score_alike_the_one_of_training_is_taken(trained, tmp_path):
    alike = {(2, "prefix"): first(0), (2, "trained"): first(0), (2, "svd"): first(0)}
    record = read_record(with_scores(trained, tmp_path / "run", alike) / "record.json")
    assert rule_for(record, read_run(trained).spec, 2) == "trained"


@pytest.mark.parametrize(("asked", "worse"), [("prefix", True), ("trained", False), ("svd", False)])
def test_a_significantly_worse_rule_is_taken_with_a_warning(
    trained, tmp_path, caplog, asked, worse
):
    scores = {
        (2, "prefix"): first(0),
        (2, "trained"): first(182)[::-1],  # two less, but on other documents: it may be chance
        (2, "svd"): first(184),
    }
    folder = with_scores(trained, tmp_path / "run", scores)
    command("export", f"run={folder}", "rank=2", f"rule={asked}", f"out={tmp_path / 'out'}")
    assert provenance(tmp_path / "out")["rule"] == asked
    message = r"rule=prefix is significantly worse than rule=svd at rank 2 .* 0\.0 against 46\.0"
    assert bool(re.search(message, caplog.text)) == worse and caplog.text.count("\n") == worse


def test_an_adapter_without_an_order_is_read_by_svd_where_nothing_is_known(trained):
    spec = dataclasses.replace(read_run(trained).spec, ordered=False)
    record = dataclasses.replace(read_record(trained / "record.json"), rows=[])
    assert rule_for(record, spec, 2) == "svd" and rule_for(record, spec, 4) == "trained"


def test_all_ranks_at_once(trained, tmp_path, capsys, caplog):
    """Each folder is that of its rank alone, and serves itself: card, and vLLM's command."""
    out = tmp_path / "all of them"
    command("export", f"run={trained}", "rank=all", f"out={out}")
    *wrote, serve = capsys.readouterr().out.splitlines()
    assert wrote == [f"wrote {out}/r{rank}" for rank in (1, 2, 4)]
    modules = [f"r{rank}={out}/r{rank}" for rank in (1, 2, 4)]
    expected = ["vllm", "serve", str(EMBEDDED), "--enable-lora", "--max-lora-rank", "8"]
    assert shlex.split(serve) == [*expected, "--lora-modules", *modules]
    record = read_record(trained / "record.json")
    command("export", f"run={trained}", "rank=2", f"out={tmp_path / 'alone'}")
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (out / "r2" / path.name).read_bytes()
    for rank in (1, 2, 4):
        assert {path.suffix for path in (out / f"r{rank}").iterdir()} == {
            *(".safetensors", ".json", ".md")
        }
        card = (out / f"r{rank}" / "README.md").read_text()
        rule = provenance(out / f"r{rank}")["rule"]
        losses = {(row.rank, row.rule): row.value for row in record.rows if row.metric == "loss"}
        if rank > 1:
            line = f"nats/token | 20 | {losses[0, 'base']:.3f} | {losses[rank, rule]:.3f} |"
            assert line in card
        else:
            assert "holds no scores at this rank" in card
        assert f"at rank {rank} by the rule `{rule}`" in card and str(EMBEDDED) in card


def test_all_ranks_or_none(trained, tmp_path, monkeypatch):
    """Nothing is left where one rank fails, and nothing that was there is touched."""
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is unknown; allowed"):
        command("export", f"run={trained}", "rank=all", "rule=best", f"out={out}")

    def fails_at_4(run, rank, *others):
        if rank == 4:
            raise UserError("no room")
        export.export_peft(run, rank, *others)

    with pytest.raises(UserError, match="no room"):
        export.export_each(read_run(trained), [1, 4], "svd", out, fails_at_4)
    assert list(tmp_path.iterdir()) == []
    (out / "r2").mkdir(parents=True)
    (out / "r2" / "adapter_config.json").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        command("export", f"run={trained}", "rank=all", f"out={out}")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "r2", "adapter_config.json"]
    assert (out / "r2" / "adapter_config.json").read_text() == "mine"


def test_all_ranks_merged(trained, tmp_path, capsys):
    arguments = [f"run={trained}", "rank=all", "format=merged", f"out={tmp_path / 'out'}"]
    command("export", *arguments)
    assert "vllm" not in capsys.readouterr().out
    card = (tmp_path / "out/r2/README.md").read_text()
    assert "library_name: transformers" in card and "PeftModel" not in card


@pytest.mark.parametrize(
    ("ranks", "needed"), [([1], 1), ([2, 9], 16), ([257], 320), ([321], 512), ([600], None)]
)
def test_the_rank_that_vllm_needs(tmp_path, caplog, ranks, needed):
    """The largest of a layer, which `rank_pattern` may set above `r`."""
    pattern = {f"model.layers.{i}.q_proj": rank for i, rank in enumerate(ranks)}
    config = {"r": ranks[0], "rank_pattern": pattern, "base_model_name_or_path": "base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = export.vllm_command([tmp_path])
    if needed is None:
        assert found is None and "at most, and a layer has 600" in caplog.text
    else:
        assert found is not None and f"--max-lora-rank {needed} " in found
