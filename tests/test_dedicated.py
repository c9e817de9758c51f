"""Equivalent ranks, excess over dedicated LoRAs, cost, and losses over rates."""

import dataclasses
import math

import numpy as np
import pytest

from matryoshka_lora.config import Config
from matryoshka_lora.evaluation.rows import Row
from matryoshka_lora.reporting import rank_tables, write_report
from matryoshka_lora.reporting.dedicated import compare, rank_at_loss, write_comparisons
from matryoshka_lora.reporting.rates import rate_lines
from matryoshka_lora.runs.record import Record

RANKS = [1, 2, 4]


def record(method, rank, losses, *, lr=1e-3, seed=1, rule="trained", tokens=100.0, error=None,
           task="gsm8k", epochs=3.0, scaling="none", data="0", noise=None):  # fmt: skip
    """losses: by rank. noise: what is added for the problems; its mean is taken away."""
    config = Config()
    config.method.name, config.adapter.rank, config.adapter.scaling = method, rank, scaling
    config.trainer.lr, config.trainer.epochs, config.seed = lr, epochs, seed
    generator = np.random.default_rng(seed)
    rows = []
    for at, loss in losses.items():
        added = 0.01 * generator.normal(size=50) if noise is None else noise + np.zeros(50)
        scores = [float(f"{s:.6g}") for s in loss + added - added.mean()]
        read = rule if at else "base"
        row = Row(task, 0, None, None, at, read, "loss", float(np.mean(scores)), None, 50)
        rows.append(dataclasses.replace(row, scores=scores))
    return Record(
        status="failed" if error else "finished",
        name=f"{method}-{rank}-{lr}-{seed}-{rule}-{epochs}-{scaling}",
        config=dataclasses.asdict(config),
        run_hash="00000000",
        model={},
        data={"fingerprint": data},
        training={"tokens": tokens},
        error=error,
        rows=rows,
    )


def at_loss(losses, loss):
    return float(rank_at_loss(RANKS, losses, loss))


def test_the_rank_at_a_loss_is_on_the_monotone_envelope():
    # A dedicated LoRA read at its own R has its R; halfway between neighbours is half a doubling.
    assert [at_loss([0.8, 0.6, 0.5], loss) for loss in (0.8, 0.6, 0.5)] == [1, 2, 4]
    assert at_loss([0.8, 0.6, 0.5], 0.7) == pytest.approx(2**0.5)
    assert at_loss([0.8, 0.6, 0.5], 0.55) == pytest.approx(2**1.5)
    assert at_loss([0.8, 0.6, 0.5], 0.9) == 0
    assert math.isinf(at_loss([0.8, 0.6, 0.5], 0.4))
    # Rank 4 is worse than rank 2: what is as good as rank 2 has its rank, what is better, none.
    assert at_loss([0.8, 0.6, 0.7], 0.6) == 2
    assert math.isinf(at_loss([0.8, 0.6, 0.7], 0.59))
    assert at_loss([0.6, 0.6, 0.6], 0.6) == 1
    # The last axis is the resamples.
    curves = np.array([[0.8, 0.8], [0.6, 0.7], [0.5, 0.7]])
    assert rank_at_loss(RANKS, curves, np.array([0.5, 0.75])) == pytest.approx([4, 2**0.5])


def only(records):
    """The one comparison of the one table."""
    (table,) = rank_tables(records)
    found = compare(table, records)
    assert len(found) <= 1
    return found[0] if found else None


def dedicated(*losses, **changes):
    return [
        record("lora", r, {r: loss}, tokens=100.0 + r, **changes)
        for r, loss in zip(RANKS, losses, strict=True)
    ]


def test_intervals_by_hand():
    """All problems alike, so that only seeds are drawn: of .9 and .45 a pair has the mean .9, .675
    or .45, with the odds 1 2 1, and the interval goes from the best to the worst. For two seeds
    Student's 12.706 replaces 1.96, and the root of 2 / (2 - 1) makes up for the drawing; both widen
    the ratio to the mean, so that no loss is below 0 and no excess below -100 %."""
    seeds = [
        record("nested_dropout", 4, {1: loss}, seed=s, noise=0.0)
        for s, loss in ((1, 0.9), (2, 0.45))
    ]
    found = only([*dedicated(0.8, 0.6, 0.5, noise=0.0), *seeds])
    (one,) = found.curves
    equivalent, excess = one.equivalent[1], one.excess[1]
    # .675 lies at (.8 - .675) / (.8 - .6) = 5/8 of the way from rank 1 to 2.
    assert equivalent.value == pytest.approx(2**0.625)
    assert (equivalent.low, equivalent.high) == (0, math.inf)
    assert found.rank_text(equivalent) == "1.5 [<1, >4]"
    width = math.sqrt(2) * 12.7062 / 1.95996
    low, high = (0.675 * (loss / 0.675) ** width for loss in (0.45, 0.9))
    expected = (-15.625, 100 * (low / 0.8 - 1), 100 * (high / 0.8 - 1))
    assert (excess.value, excess.low, excess.high) == pytest.approx(expected, rel=1e-5)


def test_problems_are_drawn_for_all_rows_alike():
    """The same for every row, the spread over problems is in no interval."""
    generator = np.random.default_rng(0)
    shared = 0.3 * generator.normal(size=50)
    found = only(
        [
            *dedicated(0.8, 0.6, 0.5, noise=shared),
            record("nested_dropout", 4, {2: 0.7, 4: 0.6}, noise=shared),
        ]
    )
    (one,) = found.curves
    assert found.rank_text(one.equivalent[2]) == "1.4 [1.4, 1.4]"
    assert found.rank_text(one.equivalent[4]) == "2.0 [2.0, 2.0]"


def test_a_dedicated_lora_has_its_own_rank():
    """With an interval: seeds of one row are drawn once, whatever its name."""
    whole = [
        record("lora", 4, {1: 1.2, 4: loss}, rule="svd", seed=seed)
        for seed, loss in ((1, 0.46), (2, 0.45))
    ]
    found = only([*dedicated(0.8, 0.6, 0.5)[:2], *whole, *[]])
    assert [*found.dedicated] == RANKS
    (one,) = found.curves
    assert found.rank_text(one.equivalent[1]) == "<1"
    assert found.rank_text(one.equivalent[4]) == "4.0 [4.0, 4.0]"
    assert vars(one.excess[4]) == {"value": 0, "low": 0, "high": 0}


def test_curves_are_compared_with_the_lora_of_each_rank(tmp_path):
    nested = [
        record("nested_dropout", 4, {1: 0.88, 2: 0.6, 4: 0.5}, seed=seed, tokens=150.0)
        for seed in (1, 2)
    ]
    svd = record("lora", 4, {1: 1.2, 2: 0.7, 4: 0.49}, rule="svd", lr=2e-3)
    records = [*dedicated(0.8, 0.6, 0.5, epochs=2.0), *nested, svd]
    (table,) = rank_tables(records)
    whole = next(row for row in table.rows if row.kind == "dedicated" and row.rank == 4)
    assert whole.lr == 1e-3 and not table.missing
    found = only(records)
    by_name = {one.curve.method_name: one for one in found.curves}
    assert set(by_name) == {"lora", "nested_dropout"}
    one = by_name["nested_dropout"]
    assert {r: e.value for r, e in one.excess.items()} == pytest.approx(
        {1: 10, 2: 0, 4: 0}, abs=1e-3
    )
    # The LoRA run of three epochs is 1.
    assert (one.cost, found.cost, found.unit) == (1.5, pytest.approx(3.07), 3)
    assert one.curve.seeds == 2 and one.equivalent[1].value == 0
    assert math.isinf(by_name["lora"].equivalent[4].value)


def test_each_set_of_training_records_has_its_own_dedicated_loras(tmp_path):
    """The fewer records of set 1 give worse adapters, which are as near to its own LoRAs."""
    sets = {"0": 1.0, "1": 1.5}
    records = [
        one
        for data, factor in sets.items()
        for one in (
            *dedicated(*(factor * loss for loss in (0.8, 0.6, 0.5)), data=data),
            record(
                *("nested_matryoshka", 4),
                {1: 0.88 * factor, 2: 0.6 * factor, 4: 0.5 * factor},
                data=data,
            ),
        )
    ]
    for number, one in enumerate(records):
        one.run_hash, one.name = f"{number:08d}", f"{one.name}-{number}"
    (table,) = rank_tables(records)
    found = compare(table, records)
    assert [one.dedicated[1].cells[1].mean for one in found] == pytest.approx([0.8, 1.2])
    for one in found:
        (compared,) = one.curves
        assert compared.excess[1].value == pytest.approx(10, abs=1e-3)
        assert one.cost == pytest.approx((101 + 102 + 104) / 104)
    write_report("both", records[:4], tmp_path)
    assert len([*tmp_path.glob("*/both-answer.*")]) == 4
    # An answer on several sets would not say which; that of the first report is removed.
    write_report("both", records, tmp_path)
    assert not [*tmp_path.glob("*/both-answer.*")]
    text = (tmp_path / "tables" / "both-dedicated.md").read_text()
    assert "loss, training set 1 of 2" in text and "loss, training set 2 of 2" in text


def test_what_is_not_compared():
    nested = record("nested_dropout", 4, {1: 0.88, 4: 0.5})
    three = dedicated(0.8, 0.6, 0.5)
    assert only([*three[1:], nested]) is None, "too few dedicated LoRAs"
    assert only([*three, record("nested_dropout", 4, {1: 0.88}, data="1")]) is None
    accuracy = [
        dataclasses.replace(one, rows=[dataclasses.replace(r, metric="acc") for r in one.rows])
        for one in (*three, nested)
    ]
    assert only(accuracy) is None, "no loss"
    for one in (*three, nested):
        one.rows = [dataclasses.replace(r, scores=None) for r in one.rows]
    found = only([*three, nested])
    assert not found.scored and found.curves[0].excess[1].low is None
    assert found.curves[0].excess[1].value == pytest.approx(10, abs=1e-3)


def test_the_answer_is_short(tmp_path):
    """The best training of each row of ROWS, in any scaling; same records, same bytes."""
    runs = [
        *dedicated(0.8, 0.6, 0.5),
        *dedicated(0.82, 0.61, 0.5, seed=2),
        record("lora", 4, {0: 1.5, 1: 1.2, 2: 0.7, 4: 0.49}, rule="svd", lr=2e-3),
        record("nested_matryoshka", 4, {1: 0.8, 2: 0.6, 4: 0.5}),
        record("nested_dropout", 4, {1: 0.8, 2: 0.6, 4: 0.5}),
        record("matryoshka", 4, {1: 1.4, 2: 1.3, 4: 0.9}, rule="prefix"),
        record("matryoshka", 4, {1: 1.3, 2: 1.2, 4: 0.8}, rule="prefix", scaling="sqrt"),
    ]
    paths = write_report("t", runs, tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in paths} >= {
        "tables/t-dedicated.csv", "tables/t-dedicated.md", "tables/t-dedicated.tex",
        "tables/t-answer.md", "tables/t-answer.tex", "figures/t-answer.png", "figures/t-answer.pdf",
    }  # fmt: skip
    for path in write_comparisons(
        [only(runs[::-1])], tmp_path / "again", "t: against dedicated LoRAs"
    ):
        first = tmp_path / "tables" / path.name.replace("again", "t-dedicated")
        assert path.read_bytes() == first.read_bytes(), path.name
    text = (tmp_path / "tables/t-answer.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == [
        "MatryoshkaLoRA, as published, scaling 1/sqrt(r)",
        "LoRA, cut by SVD",
        "nested MatryoshkaLoRA",
        "a LoRA for each rank alone",
        "untrained model",
    ]
    assert rows[0][6].startswith("1.300<br>+60.5 [")
    assert "n = 50 problems" in text and rows[0][6].endswith("<br>r <1")
    assert rows[3][4:6] == ["2", "3.1"] and rows[3][6].startswith("0.810 ± 0.014")


def test_rates_are_never_pooled_over_variants_and_name_what_diverged(tmp_path):
    searched = [
        record("matryoshka", 4, {1: 0.9, 4: 0.7}, lr=1e-3, task="validation"),
        record("matryoshka", 4, {1: 0.7, 4: 0.5}, lr=2e-3, task="validation"),
        record("matryoshka", 4, {}, lr=4e-3, error="FloatingPointError: nan", task="validation"),
        record("matryoshka", 4, {1: 0.8, 4: 0.6}, lr=1e-3, epochs=2.0, task="validation"),
        record("lora", 4, {1: 5.0, 4: 0.6}, lr=1e-3, task="validation"),
    ]
    lines = rate_lines(searched)
    assert [(line.method, dict(line.losses)) for line in lines] == [
        ("lora", {1e-3: pytest.approx(0.6)}),
        ("matryoshka", {1e-3: pytest.approx(0.7)}),
        ("matryoshka", {1e-3: pytest.approx(0.8), 2e-3: pytest.approx(0.6), 4e-3: None}),
    ]
    assert lines[2].best == 2e-3 and lines[2].epochs == 3
    paths = write_report("t-search", searched, tmp_path)
    assert {path.name for path in paths} >= {"t-search-rates.md", "t-search-rates.png"}
    text = (tmp_path / "tables" / "t-search-rates.md").read_text()
    assert "| 0.002 | 0.001: 0.8000, 0.002: 0.6000, 0.004: diverged" in text
