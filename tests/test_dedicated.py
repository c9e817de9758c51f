"""Equivalent ranks, excess over dedicated LoRAs, cost, and losses over rates."""

import dataclasses
import math

import numpy as np
import pytest

from matryoshka_lora.config import Config
from matryoshka_lora.evaluation.rows import Row
from matryoshka_lora.reporting import rank_tables, write_report
from matryoshka_lora.reporting.dedicated import comparisons, equivalent_rank, rank_at_loss
from matryoshka_lora.reporting.rates import rate_lines
from matryoshka_lora.runs.record import Record

RANKS = [1, 2, 4]


def record(method, rank, losses, *, lr=1e-3, seed=1, rule="trained", tokens=100.0, error=None,
           task="gsm8k", epochs=3.0):  # fmt: skip
    """losses: by rank."""
    config = Config()
    config.method.name, config.adapter.rank, config.adapter.scaling = method, rank, "none"
    config.trainer.lr, config.trainer.epochs, config.seed = lr, epochs, seed
    generator = np.random.default_rng(seed)
    rows = []
    for at, loss in losses.items():
        noise = generator.normal(size=50)
        scores = [float(f"{s:.6g}") for s in loss + 0.01 * (noise - noise.mean())]
        row = Row(task, 0, None, None, at, rule, "loss", float(np.mean(scores)), None, 50)
        rows.append(dataclasses.replace(row, scores=scores))
    return Record(
        status="failed" if error else "finished",
        name=f"{method}-{rank}-{lr}-{seed}-{rule}-{epochs}",
        config=dataclasses.asdict(config),
        run_hash="00000000",
        model={},
        data={"fingerprint": "0"},
        training={"tokens": tokens},
        error=error,
        rows=rows,
    )


def test_the_rank_at_a_loss_is_on_the_monotone_envelope():
    assert rank_at_loss([1, 2, 4], [0.8, 0.6, 0.5], 0.7) == pytest.approx(2**0.5)
    assert rank_at_loss([1, 2, 4], [0.8, 0.6, 0.5], 0.8) == 1
    assert rank_at_loss([1, 2, 4], [0.8, 0.6, 0.5], 0.5) == 4
    assert rank_at_loss([1, 2, 4], [0.8, 0.6, 0.5], 0.9) == 0
    assert math.isinf(rank_at_loss([1, 2, 4], [0.8, 0.6, 0.5], 0.4))
    # Rank 4 is worse than rank 2: what is as good as rank 2 has its rank, what is better, none.
    assert rank_at_loss([1, 2, 4], [0.8, 0.6, 0.7], 0.6) == 2
    assert math.isinf(rank_at_loss([1, 2, 4], [0.8, 0.6, 0.7], 0.59))


def test_an_equivalent_rank_has_an_interval_that_may_leave_the_curve():
    generator = np.random.default_rng(0)
    shared = generator.normal(size=40)
    dedicated = {
        r: loss + 0.3 * shared[None] for r, loss in zip(RANKS, (0.8, 0.6, 0.5), strict=True)
    }
    paired = equivalent_rank(dedicated, 0.7 + 0.3 * shared[None], samples=200)
    assert paired.text() == "1.4 [1.4, 1.4]", "the same documents are drawn for all"
    seeds = np.array([[0.9], [0.45]]) + np.zeros((2, 40))
    wide = equivalent_rank(dedicated, seeds - seeds.mean() + 0.7, samples=200)
    assert (wide.low, wide.high) == (0, math.inf) and wide.text().endswith("[<1, >4]")


def test_curves_are_compared_with_the_lora_of_each_rank():
    dedicated = [
        record("lora", r, {r: loss}) for r, loss in zip(RANKS, (0.8, 0.6, 0.5), strict=True)
    ]
    nested = [
        record("nested_dropout", 4, {1: 0.88, 2: 0.6, 4: 0.5}, seed=seed, tokens=150.0)
        for seed in (1, 2)
    ]
    svd = record("lora", 4, {1: 1.2, 2: 0.7, 4: 0.49}, rule="svd", lr=2e-3)
    records = [*dedicated, *nested, svd]
    (table,) = rank_tables(records)
    whole = next(row for row in table.rows if row.kind == "dedicated" and row.rank == 4)
    assert whole.lr == 1e-3 and not table.missing
    found = {one.curve.method_name: one for one in comparisons(table, records)}
    assert set(found) == {"lora", "nested_dropout"}
    nested_one = found["nested_dropout"]
    assert nested_one.excess == pytest.approx({1: 10, 2: 0, 4: 0}, abs=1e-3)
    assert nested_one.cost == 1.5 and nested_one.curve.seeds == 2
    assert nested_one.equivalent[1].value == 0
    assert math.isinf(found["lora"].equivalent[4].value)


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
    assert lines[2].best == 2e-3 and "epochs=3.0" in lines[2].label
    paths = write_report("t-search", searched, tmp_path)
    assert {path.name for path in paths} >= {"t-search-rates.md", "t-search-rates.png"}
    text = (tmp_path / "tables" / "t-search-rates.md").read_text()
    assert "0.001: 0.8000, **0.002: 0.6000**, 0.004: diverged" in text
