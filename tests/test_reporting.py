import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from matryoshka_lora.evaluation.rows import Row
from matryoshka_lora.reporting import (
    format_multirun,
    format_run_table,
    plot_tables,
    rank_table,
    rank_tables,
    run_tables,
    table_frame,
    write_report,
    write_tables,
)
from matryoshka_lora.reporting.differences import differences, references
from matryoshka_lora.reporting.frame import tidy_frame
from matryoshka_lora.reporting.plots import _drawn, _figure, _style
from matryoshka_lora.runs.record import Record, read_record, write_record

ROOT = Path(__file__).parent.parent


def config(method="dylora", rank=4, seed=1, **changes):
    settings = {
        "model": {"name": "tiny"},
        "dataset": {"name": "arithmetic"},
        "method": {"name": method, "draw": "step"},
        "adapter": {"rank": rank, "scaling": "none"},
        "trainer": {"lr": 1e-3, "epochs": 3.0, "micro_batch": 8},
        "seed": seed,
        "eval": {"limit": None},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings[section][name] = value
    return settings


def row(rank, value, rule="prefix", metric="exact_match", **changes):
    kind = "base" if rank == 0 else rule
    filter = "strict-match" if metric == "exact_match" else None
    made = Row("toy", 0, None, filter, rank, kind, metric, value, None, 10)
    return dataclasses.replace(made, **changes)


def record(rows, status="finished", error=None, settings=None, **changes):
    settings = settings or config(**changes)
    name = f"{settings['method']['name']}-r{settings['adapter']['rank']}-seed{settings['seed']}"
    return Record(status, name, settings, "0" * 8, {}, {}, error=error, rows=rows)


def write(path, one):
    write_record(path, dataclasses.replace(one, model={"name": "tiny", "revision": None}))


def curve(values, **changes):
    return [row(rank, value, **changes) for rank, value in zip((1, 2, 4), values, strict=True)]


@pytest.fixture
def grid():
    """Two seeds of DyLoRA, one of LoRA, and a LoRA dedicated to rank 1."""
    return [
        record([row(0, 0.05), *curve([0.1, 0.2, 0.4])], seed=1),
        record([row(0, 0.05), *curve([0.3, 0.4, 0.4])], seed=2),
        record(
            [
                row(0, 0.05),
                row(1, 0.1, trained_rank=False),
                row(2, 0.2, trained_rank=False),
                row(4, 0.5, trained_rank=True),
            ],
            method="lora",
        ),
        record([row(0, 0.05), row(1, 0.35), row(1, 0.35, "svd")], method="lora", rank=1),
    ]


EXPECTED_MD = r"""# table2-toy

## toy 0-shot, exact_match (strict-match)

model tiny, dataset arithmetic, R 4, scaling none, epochs 3, 10 documents, unit %, mean ± standard deviation over seeds.

| method | rule | lr | seeds | 0 | 1 | 2 | 4 | AURAC log2 | AURAC linear |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| base |  |  |  | 5.0 |  |  |  |  |  |
| LoRA | prefix | 0.001 | 1 |  | 10.0\* | 20.0\* | 50.0 | 25.0 | 28.3 |
| DyLoRA | prefix | 0.001 | 2 |  | 20.0 ± 14.1 | 30.0 ± 14.1 | 40.0 ± 0.0 | 30.0 ± 10.6 | 31.7 ± 9.4 |
| LoRA dedicated R=1 |  | 0.001 | 1 |  | 35.0 |  |  |  |  |

\* rank outside the trained sub-ranks
"""  # noqa: E501


def test_the_table_by_hand(grid, tmp_path):
    """The DyLoRA seeds (10 20 40) and (30 40 40) have AURAC log2 45/2 and 75/2, so 30 ± 10.6, and
    linear 75/3 and 115/3, so 31.7 ± 9.4."""
    write_tables(rank_tables(grid), tmp_path / "table2-toy", "table2-toy")
    assert (tmp_path / "table2-toy.md").read_text() == EXPECTED_MD


@pytest.fixture
def scored():
    """Four documents; two seeds of DyLoRA and one of LoRA, by its prefixes and its SVD."""

    def rows(scores, rule="prefix", same=None):
        return [
            row(rank, s.count("1") / 4, rule, scores=s, n=4, same_as=same and f"{same}@{rank}")
            for rank, s in zip((1, 4), scores, strict=False)
        ]

    lora = [*rows(["0000", "1100"]), *rows(["0100", "1100"], "svd")]
    lora += [row(r, v, "svd", "loss", scores=[v] * 4, n=4) for r, v in ((1, 2.0), (4, 1.0))]
    losses = [row(r, v, metric="loss", scores=[v] * 4, n=4) for r, v in ((1, 1.5), (4, 1.25))]
    return [
        record(rows(["0110", "1110"]) + rows(["0110", "1110"], "trained", "prefix")),
        record(rows(["0100", "1111"]) + losses, seed=2),
        record(lora, method="lora"),
        record(rows(["1111"], "svd"), method="lora", rank=1),
    ]


def test_differences_from_the_svd_of_lora(scored, tmp_path):
    table, losses = rank_tables(scored)
    svd, alone = references(table)
    (lora, of_lora), (dylora, of_dylora), (_, of_same), (_, dedicated) = differences(table, svd)
    assert (lora.method, lora.rule, dylora.method) == ("LoRA", "prefix", "DyLoRA")
    assert list(of_same) == [1, 4, "log2", "linear"]
    # Seeds averaged minus LoRA's SVD: 0 1 .5 0 - 0 1 0 0 at rank 1, 1 1 1 .5 - 1 1 0 0 at rank 4.
    gaps = {1: np.array([0, 0, 0.5, 0]), 4: np.array([0, 0, 1, 0.5])}
    gaps |= dict.fromkeys(("log2", "linear"), (gaps[1] + gaps[4]) / 2)
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, 4, 4) for _ in range(10_000)]
    for column, gap in gaps.items():
        low, high = np.quantile([100 * gap[d].mean() for d in drawn], [0.025, 0.975])
        found = of_dylora[column]
        assert (found.mean, found.low, found.high) == pytest.approx((100 * gap.mean(), low, high))
    assert not of_dylora[1].holds and not of_dylora[4].holds and dedicated[1].holds
    assert (of_lora[1].mean, of_lora[4].mean) == pytest.approx((-25, 0))
    assert dedicated.keys() == {1} and dedicated[1].mean == pytest.approx(75)
    write_tables([table, losses], tmp_path / "t", "t")
    text = (tmp_path / "t.md").read_text().partition("Minus LoRA svd (seeds: 1)")[2]
    # Losses of all documents alike: no spread. log2 is the mean of both ranks.
    loss = "-0.500 [-0.500, -0.500] ★ | +0.250 [0.250, 0.250] ★ | -0.125 [-0.125, -0.125] ★ |"
    assert f"| DyLoRA | prefix | 0.001 | 1/2 | {loss}" in text
    assert "| DyLoRA | prefix | 0.001 | 2 | +12.5 [0.0, 37.5] | +37.5 [0.0, 75.0] |" in text
    assert "| LoRA | prefix | 0.001 | 1 | -25.0 [-75.0, 0.0] | +0.0 [0.0, 0.0] |" in text
    # Against the LoRA of rank 1, and at 4 against the LoRA of R=4, which is what was trained there.
    of_alone = {(row.method, row.rule): cells for row, cells in differences(table, alone)}
    assert of_alone["LoRA", "svd"][1].mean == pytest.approx(-75)
    assert of_alone["DyLoRA", "prefix"].keys() == {1, 4}
    assert "Minus the LoRA trained for the rank alone" in text


def test_a_difference_holds_over_problems_and_over_seeds(tmp_path):
    """Seeds of .5 and 1.6 against 1: +.05 for every problem, but a seed alone may be below 1."""

    def rows(*losses, rule="prefix"):
        pairs = zip((1, 4), losses, strict=True)
        return [row(r, v, rule, "loss", scores=[v] * 4, n=4) for r, v in pairs]

    records = [
        record(rows(1.0, 1.0, rule="svd"), method="lora"),
        record(rows(0.5, 0.5), seed=1),
        record(rows(1.6, 0.52), seed=2),
    ]
    (table,) = rank_tables(records)
    (svd,) = references(table)
    ((_, cells),) = differences(table, svd)
    assert [(cells[r].low, cells[r].high) for r in (1, 4)] == [
        pytest.approx((0.05, 0.05)),
        pytest.approx((-0.49, -0.49)),
    ]
    assert (cells[1].holds, cells[4].holds) == (False, True)
    write_tables([table], tmp_path / "t", "t")
    text = (tmp_path / "t.md").read_text()
    assert "| DyLoRA | prefix | 0.001 | 2 | 1.050 ± 0.778 | 0.510 ± 0.014 ★ |" in text
    assert "\n★ differs from LoRA svd (seeds: 1): see the differences below\n" in text
    tex = (tmp_path / "t.tex").read_text()
    assert r"& 0.510 $\pm$ 0.014 $^\star$ &" in tex and "-0.490 [-0.490, -0.490] $^" in tex
    assert "**" not in text and "textbf" not in tex


def test_other_training_data_are_not_compared(scored):
    scored[1].data["fingerprint"] = "another"
    table, losses = rank_tables(scored)
    svd, _ = references(table)
    assert [row.method for row, _ in differences(table, svd) if row.method_name == "dylora"] == [
        "DyLoRA (data=null)"
    ] * 2
    assert not differences(losses, references(losses)[0])


def test_differences_need_scores_of_the_same_documents_and_one_reference(grid, scored, tmp_path):
    (table,) = rank_tables(grid)
    assert not references(table) or not differences(table, references(table)[0])
    # No scores, or a value that is not their mean.
    first = scored[1].rows[0]
    for changes in ({"scores": None}, {"value": 0.5}):
        scored[1].rows[0] = dataclasses.replace(first, **changes)
        again = rank_tables(scored)[0]
        _, (dylora, cells), *_ = differences(again, references(again)[0])
        assert dylora.method == "DyLoRA" and list(cells) == [4]
    other = record(scored[2].rows, method="lora", trainer__lr=1.0)
    tables = rank_tables([*scored, other])
    assert [reference.mark for reference in references(tables[0])] == ["☆"]
    write_tables(tables, tmp_path / "t", "t")
    text = (tmp_path / "t.md").read_text()
    assert "no differences from LoRA svd: there are 2 such rows" in text
    fewer = [dataclasses.replace(r, scores="110", value=2 / 3, n=3) for r in scored[2].rows]
    table = rank_tables([*scored[:2], record(fewer, method="lora")])[0]
    assert not differences(table, references(table)[0])


def test_the_frame_by_hand(grid):
    frame = table_frame(rank_table(grid, "toy", 0, "exact_match", "strict-match"))
    assert frame["method"].tolist() == ["base", "LoRA", "DyLoRA", "LoRA dedicated R=1"]
    dylora = frame.set_index("method").loc["DyLoRA"]
    assert dylora["1 mean"] == pytest.approx(20) and dylora["4 sd"] == pytest.approx(0)
    assert dylora["1 sd"] == pytest.approx(math.sqrt(200))  # ddof = 1
    assert dylora["AURAC log2 mean"] == pytest.approx(30)
    assert dylora["AURAC log2 sd"] == pytest.approx(15 / math.sqrt(2))
    assert dylora["AURAC linear mean"] == pytest.approx((75 / 3 + 115 / 3) / 2)
    base = frame.set_index("method").loc["base"]
    assert base["0 mean"] == pytest.approx(5) and math.isnan(base["0 sd"])
    assert math.isnan(base["AURAC log2 mean"])


def test_csv_and_latex(grid, tmp_path):
    write_tables(rank_tables(grid), tmp_path / "t", "t")
    frame = pd.read_csv(tmp_path / "t.csv")
    assert frame.loc[2, ["method", "R", "rule", "seeds"]].tolist() == ["DyLoRA", 4, "prefix", 2]
    assert frame.loc[2, "1 mean"] == 20.0 and frame.loc[2, "1 sd"] == 14.1421
    assert frame.loc[1, "lr"] == 0.001 and math.isnan(frame.loc[1, "1 sd"])
    tex = (tmp_path / "t.tex").read_text()
    assert r"& 20.0 $\pm$ 14.1 & 30.0 $\pm$ 14.1 &" in tex
    assert r"LoRA & prefix & 0.001 & 1 &  & 10.0$^*$ &" in tex
    assert "exact\\_match" in tex and "\\toprule" in tex and "±" not in tex


def test_loss_is_raw_and_last_and_nothing_is_bold(tmp_path):
    rows = [row(0, 0.1), *curve([0.1, 0.2, 0.3]), *curve([2.0, 1.5, 1.0], metric="loss")]
    other = [row(0, 0.1), *curve([0.1, 0.2, 0.3]), *curve([1.8, 1.6, 1.0], metric="loss")]
    records = [record(rows), record(other, method="lora")]
    tables = rank_tables(records)
    assert [table.metric.metric for table in tables] == ["exact_match", "loss"]
    write_tables(tables, tmp_path / "t", "t")
    text = (tmp_path / "t.md").read_text()
    assert "| 1.800 | 1.600 | 1.000 | 1.500 |" in text and "**" not in text
    assert "1.800  1.600  1.000       1.500" in format_multirun(records)


def test_rules_differ_in_the_legend(grid):
    rows = [*curve([0.1, 0.2, 0.3]), *curve([0.2, 0.3, 0.4], rule="trained")]
    axes = _figure(rank_tables([record(rows)])).axes[0]
    styles = {(line.get_linestyle(), line.get_fillstyle()) for line in axes.get_lines()}
    assert styles == {("-", "full"), ("--", "none")}


def test_holes_are_marked_and_named(grid, tmp_path):
    grid[0] = record([], status="failed", error="RuntimeError: out of memory\nat ...", seed=1)
    grid[2].rows = [row(1, 0.1), row(2, None), row(4, 0.5)]
    planned = [config(seed=s) for s in (1, 2, 3)] + [config("matryoshka"), config("lora", 2)]
    (table,) = rank_tables(grid, planned)
    assert table.missing == (
        "LoRA R=4, scaling none, lr 0.001, seed 1: rule prefix at rank 2",
        "LoRA, rule prefix: AURAC covers only the ranks 1, 4",
        "LoRA dedicated R=2, scaling none, lr 0.001, seed 1: no record",
        "DyLoRA R=4, scaling none, lr 0.001, seed 1: failed: RuntimeError: out of memory",
        "DyLoRA R=4, scaling none, lr 0.001, seed 3: no record",
        "MatryoshkaLoRA R=4, scaling none, lr 0.001, seed 1: no record",
    )
    write_tables([table], tmp_path / "t", "t")
    text = (tmp_path / "t.md").read_text()
    assert "| LoRA | prefix | 0.001 | 1 |  | 10.0 | – | 50.0 | 30.0 | 30.0 |" in text
    assert "| DyLoRA | prefix | 0.001 | 1/3 |  | 30.0 | 40.0 | 40.0 | 37.5 | 38.3 |" in text
    assert "| MatryoshkaLoRA |  | 0.001 | 0/1 |  | – | – | – | – | – |" in text
    assert "| LoRA dedicated R=2 |  | 0.001 | 0/1 |  |  | – |  |  |  |" in text
    assert "missing: LoRA R=4" in text
    assert ",MatryoshkaLoRA,4,none,0.001,3,,0,1,,," in (tmp_path / "t.csv").read_text()


def test_a_point_that_one_seed_lacks(grid):
    grid[0].rows = [r for r in grid[0].rows if r.rank != 2]
    (table,) = rank_tables(grid)
    dylora = next(r for r in table.rows if r.method == "DyLoRA")
    assert dylora.cells[2].mean == pytest.approx(40) and dylora.cells[2].sd is None
    assert dylora.aurac_ranks == (1, 4)
    assert dylora.aurac["log2"].mean == pytest.approx((25 + 35) / 2)


def test_the_tidy_frame(grid):
    """A line a row in the order of the tables, and one for each run without rows."""
    grid[0].status = "training"
    frame = tidy_frame(grid[::-1], planned=[config(seed=2), config("matryoshka")])
    runs = frame.drop_duplicates("run")[["run", "group", "R", "seed", "problem"]]
    assert runs.values.tolist() == [
        ["lora-r4-seed1", 0, 4, 1, None],
        ["lora-r1-seed1", 1, 1, 1, None],
        ["dylora-r4-seed1", 2, 4, 1, "training"],
        ["dylora-r4-seed2", 2, 4, 2, None],
        ["planned run 2", 3, 4, 1, "no record"],
    ]
    assert frame["run"].value_counts().to_dict() == {
        "lora-r4-seed1": 4, "lora-r1-seed1": 3, "dylora-r4-seed1": 1, "dylora-r4-seed2": 4,
        "planned run 2": 1,
    }  # fmt: skip
    line = frame[(frame["run"] == "lora-r4-seed1") & (frame["rank"] == 4)].iloc[0]
    assert (line["value"], line["n"], line["trained_rank"], line["same_as"]) == (
        0.5,
        10,
        True,
        None,
    )
    assert frame["value"].isna().sum() == 2


def test_a_plan_trains_on_the_content_of_the_records(grid):
    """A plan knows no fingerprint, yet its runs are seeds of the row; other data make another."""
    for one in grid[:2]:
        one.data["fingerprint"] = "0123456789"
    (table,) = rank_tables(grid, [config(seed=s) for s in (1, 2, 3)])
    dylora = next(r for r in table.rows if r.method_name == "dylora")
    assert (dylora.method, dylora.seeds, dylora.planned) == ("DyLoRA (data=01234567)", 2, 3)
    grid[1].data["fingerprint"] = "9876543210"
    (table,) = rank_tables(grid)
    names = [r.method for r in table.rows if r.method_name == "dylora"]
    assert names == ["DyLoRA (data=01234567)", "DyLoRA (data=98765432)"]


def test_a_planned_method_without_a_record_is_taken_to_have_the_base_of_the_others(grid):
    for one in grid:
        one.model, one.data["fingerprint"] = one.model | {"weights": "abc"}, "0123456789"
    (table,) = rank_tables(grid, [config("lora"), config("matryoshka")])
    assert [r.method for r in table.rows if r.kind == "curve"] == [
        "LoRA", "DyLoRA", "MatryoshkaLoRA",
    ]  # fmt: skip


def test_a_method_of_another_version(grid):
    """It has its name for a label, stands last, and its seeds are pooled where nothing differs."""
    other = [record(curve([0.2, 0.3, 0.4]), method="later", seed=seed) for seed in (1, 2)]
    other += [record(curve([0.2, 0.3, 0.4]), method="later", method__draw="sample")]
    (table,) = rank_tables([*other, *grid])
    rows = [(r.method, r.seeds) for r in table.rows if r.kind == "curve"]
    assert rows == [
        ("LoRA", 1), ("DyLoRA", 2), ("later (draw=sample)", 1), ("later (draw=step)", 2),
    ]  # fmt: skip


def test_unfinished_runs_do_not_count(grid):
    grid[0].status = "evaluating"
    (table,) = rank_tables(grid)
    dylora = next(r for r in table.rows if r.method == "DyLoRA")
    assert (dylora.seeds, dylora.planned) == (1, 2)
    assert any(line.endswith("seed 1: evaluating") for line in table.missing)


def test_settings_without_a_column_are_not_pooled():
    runs = [
        record(curve([0.1, 0.2, 0.4]), seed=1),
        record(curve([0.2, 0.3, 0.4]), seed=2, trainer__micro_batch=16),  # does not change a run
        record(curve([0.3, 0.4, 0.5]), seed=1, method__draw="sample"),
        record(curve([0.3, 0.4, 0.5]), seed=1, method="matryoshka"),
        record(curve([0.1, 0.1, 0.5]), seed=2, method="matryoshka", method__draw="sample"),
    ]
    (table,) = rank_tables(runs)
    assert [(r.method, r.seeds) for r in table.rows] == [
        ("DyLoRA (draw=sample)", 1),
        ("DyLoRA (draw=step)", 2),
        ("MatryoshkaLoRA", 2),  # which draws nothing
    ]


def test_the_same_run_twice_is_an_error(grid):
    with pytest.raises(ValueError, match="two records hold the same run, 'dylora-r4-seed2'"):
        rank_tables([*grid, grid[1]])


def test_what_cannot_be_reported(grid):
    with pytest.raises(ValueError, match="no finished record has toy 5-shot, acc; there is: toy"):
        rank_table(grid, "toy", 5, "acc")
    with pytest.raises(ValueError, match="nothing to report yet.*failed: no disk"):
        rank_tables([record([], status="failed", error="no disk")])
    with pytest.raises(ValueError, match="nothing to report yet"):
        rank_tables([])
    del grid[0].config["trainer"]["lr"]
    with pytest.raises(ValueError, match="'dylora-r4-seed1' lacks 'trainer.lr'"):
        rank_tables(grid)


def test_blocks():
    """R=4 and R=8 with two scalings; LoRA of R=4 is a run of its own and dedicated in R=8."""
    runs = [
        record(curve([0.1, 0.2, 0.3]), method=method, rank=rank, adapter__scaling=scaling)
        for method in ("lora", "matryoshka")
        for rank in (4, 8)
        for scaling in ("none", "sqrt")
    ]
    tables = rank_tables(runs)
    assert [(t.shared["R"], t.shared["scaling"]) for t in tables] == [
        ("4", "none"), ("8", "none"), ("4", "sqrt"), ("8", "sqrt"),
    ]  # fmt: skip
    assert [r.method for r in tables[1].rows] == ["LoRA", "MatryoshkaLoRA", "LoRA dedicated R=4"]
    assert tables[1].rows[2].cells.keys() == {4}
    whole = rank_table(runs, "toy", 0, "exact_match", "strict-match")
    assert whole.shared == {"model": "tiny", "dataset": "arithmetic", "epochs": "3"}


def test_a_scaling_without_a_lora_stands_beside_the_one_that_has_it():
    runs = [
        record(
            curve([0.1, 0.2, 0.3]), method=method, adapter__scaling=scaling, trainer__epochs=epochs
        )
        for method, scaling, epochs in (
            ("lora", "none", 2.0),
            ("matryoshka", "none", 3.0),
            ("matryoshka", "sqrt", 3.0),
        )
    ]
    (table,) = rank_tables(runs)
    assert [(row.method, row.scaling, row.epochs) for row in table.rows] == [
        ("LoRA", "none", 2.0),
        ("MatryoshkaLoRA", "none", 3.0),
        ("MatryoshkaLoRA", "sqrt", 3.0),
    ]
    assert not {"scaling", "epochs"} & table.shared.keys()


def test_lines_that_coincide_are_drawn_once():
    rows = [
        *curve([0.1, 0.2, 0.3]),
        *[
            row(r, v, "trained", same_as=f"prefix@{r}")
            for r, v in zip((1, 2, 4), (0.1, 0.2, 0.3), strict=True)
        ],
        row(1, 0.2, "svd"),
        row(2, 0.25, "svd"),
        row(4, 0.3, "svd", same_as="trained@4"),
    ]
    (table,) = rank_tables([record(rows)])
    assert [r.same_as for r in table.rows] == [None, "prefix", None]
    assert [rules for _, rules in _drawn(table)] == [["prefix", "trained"], ["svd"]]


def test_no_two_rows_of_a_table_look_alike():
    """LoRA and two methods with variants, of which five have no style of their own."""
    runs = [
        record(curve([0.1, 0.2, value]), settings=settings)
        for value, settings in (
            (0.29, config("lora")),
            (0.30, config("dylora", method__draw="step")),
            (0.31, config("dylora", method__draw="sample")),
            (0.32, config("dylora", method__draw="micro_batch")),
            (0.33, config("matryoshka", adapter__init="lora")),
            (0.34, config("matryoshka", adapter__init="paper")),
            (0.35, config("matryoshka", adapter__scaling="sqrt")),
            (0.36, config("matryoshka", trainer__epochs=6.0)),
        )
    ]
    (table,) = rank_tables([dataclasses.replace(run, name=f"{n}") for n, run in enumerate(runs)])
    assert len({_style(table, row) for row in table.rows}) == len(table.rows) == 8


def test_regeneration_is_byte_identical(grid, tmp_path):
    first = write_report("toy", grid, tmp_path / "a", planned=[config("matryoshka")])
    second = write_report("toy", grid[::-1], tmp_path / "b", planned=[config("matryoshka")])
    names = [str(path.relative_to(tmp_path / "a")) for path in first]
    assert names == [
        "tables/toy.csv", "tables/toy.md", "tables/toy.tex", "figures/toy.png", "figures/toy.pdf",
    ]  # fmt: skip
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    assert b"CreationDate" not in first[-1].read_bytes()


def test_figures_of_odd_tables(tmp_path):
    """Only a base, only a null, and two metrics with a hole: drawn without an error."""
    only_base = record([row(0, 0.1)])
    only_null = record([row(1, None)], seed=2)
    two = record([*curve([0.1, None, 0.3]), *curve([2.0, 1.0, 1.0], metric="loss")], seed=3)
    for number, runs in enumerate([[only_base], [only_null], [only_base, only_null, two]]):
        tables = rank_tables(runs)
        write_tables(tables, tmp_path / f"{number}", "odd")
        (path,) = plot_tables(tables, tmp_path / f"{number}", suffixes=[".png"])
        assert path.read_bytes().startswith(b"\x89PNG")


def test_format_run_table():
    rows = [row(0, 0.05), *curve([0.1, 0.2, 0.4]), *curve([0.3, 0.4, 0.4], rule="svd")]
    rows[1] = dataclasses.replace(rows[1], trained_rank=False)
    rows += [row(0, 3.0, metric="loss"), *curve([2.0, None, 1.0], metric="loss")]
    text = format_run_table(record(rows, status="evaluating"))
    assert text == "\n".join(
        [
            "toy 0-shot, exact_match (strict-match) [%], 10 documents, base model 5.0",
            "rule     r=1    r=2    r=4  AURAC  linear",
            "prefix  10.0*  20.0   40.0   22.5    25.0",
            "svd     30.0   40.0   40.0   37.5    38.3",
            "* rank outside the trained sub-ranks",
            "",
            "toy 0-shot, loss [nats/token], 10 documents, base model 3.000",
            "rule      r=1  r=2     r=4  AURAC  linear",
            "prefix  2.000    -   1.000      -       -",
        ]
    )


def test_format_run_table_before_any_result():
    assert "nothing evaluated yet (training)" in format_run_table(record([], status="training"))
    assert run_tables(record([])) == []


def report(*arguments, cwd):
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_script(grid, tmp_path):
    folder = tmp_path / "results" / "records" / "toy"
    for number, one in enumerate(grid):
        write(folder / f"run{number}" / "record.json", one)
    done = report(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = write_report("toy", [read_record(p) for p in folder.rglob("*.json")], tmp_path)
    assert len(done.stdout.split()) == 5
    for path in expected:
        made = tmp_path / "results" / path.relative_to(tmp_path)
        assert made.read_bytes() == path.read_bytes()
    corrupt = folder / "run0" / "record.json"
    corrupt.write_text('{"schema": 1')
    done = report("results/records", cwd=tmp_path)
    assert done.returncode == 1 and "run0/record.json is not a valid" in done.stderr
    assert "Traceback" not in done.stderr
    assert corrupt.read_text() == '{"schema": 1'


def test_the_script_on_ones_own_runs(grid, tmp_path):
    """All runs below a folder make one table; JSON of other tools in a run's folder is left out."""
    runs = tmp_path / "results" / "runs"
    for number, one in enumerate(grid):
        folder = runs / "arithmetic" / f"tiny{number % 2}" / f"lr{number}"
        (folder / "wandb" / "files").mkdir(parents=True)
        (folder / "wandb" / "files" / "wandb-summary.json").write_text("{}")
        (folder / "config.yaml").touch()
        write(folder / "record.json", one)
    (runs / "stopped" / "wandb").mkdir(parents=True)  # before its first record
    (runs / "stopped" / "config.yaml").touch()
    (runs / "stopped" / "wandb" / "wandb-metadata.json").write_text("{}")
    done = report("records=results/runs", "output=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = write_report("runs", grid, tmp_path / "expected")
    for path in expected:
        made = tmp_path / "out" / path.relative_to(tmp_path / "expected")
        assert made.read_bytes() == path.read_bytes()
    # Whole runs beside committed records are a table like any other.
    write(tmp_path / "results" / "flat" / "one.json", grid[0])
    done = report("results", "output=out", cwd=tmp_path)
    assert done.returncode == 0 and "out/tables/flat.md" in done.stdout, done.stderr


def test_the_script_says_what_it_takes(tmp_path):
    done = report("--help", cwd=tmp_path)
    assert done.returncode == 0 and "[results/records]" in done.stdout and "output" in done.stdout
    done = report("outptu=x", cwd=tmp_path)
    assert done.returncode == 1 and "did you mean output" in done.stderr


def test_the_script_without_records(tmp_path):
    done = report("nowhere", cwd=tmp_path)
    assert done.returncode == 1 and "nowhere is not a folder" in done.stderr
    (tmp_path / "empty").mkdir()
    done = report("empty", cwd=tmp_path)
    assert done.returncode == 1 and "no records below empty" in done.stderr


def test_a_run_lacks_only_the_tasks_that_it_was_asked_for():
    """One seed is evaluated on a second task; of two runs that were asked for it one lacks it."""
    both, one = ["toy:0", "more:0"], ["toy:0"]
    more = curve([0.1, 0.2, 0.4], task="more")
    grid = [
        record([*curve([0.1, 0.2, 0.4]), *more], eval__tasks=both),
        record(curve([0.3, 0.4, 0.4]), seed=2, eval__tasks=one),
        record(curve([0.3, 0.4, 0.4]), method="lora", eval__tasks=one),
    ]
    second, first = rank_tables(grid)
    assert (second.metric.task, first.metric.task) == ("more", "toy")
    assert [(row.method, row.seeds) for row in second.rows] == [("DyLoRA", 1)]
    assert second.missing == first.missing == ()
    lacking = record(curve([0.3, 0.4, 0.4]), seed=3, eval__tasks=both)
    assert "seed 3: not evaluated" in rank_tables([*grid, lacking])[0].missing[0]
