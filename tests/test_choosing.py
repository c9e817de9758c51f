"""Which rank and rule a finished run is used at: choose_rank.py, the default rule, and export."""

import dataclasses
import importlib.util
import shlex
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from safetensors.torch import load_file

from matryoshka_lora.cli import parse_options
from matryoshka_lora.config import Config
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.rows import Row, encode_scores
from matryoshka_lora.pipeline import run
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


@pytest.mark.parametrize(("tolerance", "rank"), [(1, 4), (3, 2)])
def test_the_tolerance_of_a_loss_is_percent(trained, tmp_path, capsys, tolerance, rank):
    losses = np.linspace(1, 3, 50)
    scores = {(2, "svd"): list(losses * 1.02), (4, "svd"): list(losses)}
    folder = with_scores(trained, tmp_path / "run", scores, "loss")
    command("choose_rank", f"run={folder}", f"tolerance={tolerance}")
    assert chosen(capsys)[0] == (rank, "svd")


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
