"""The methods' diagonals and draws."""

import dataclasses

import numpy as np
import pytest
import torch

from matryoshka_lora.config import Config, adapter_spec_of, build_method, run_hash
from matryoshka_lora.core.diagonals import matryoshka_diagonal, prefix_diagonal
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import AdapterView, evaluated_as, read
from matryoshka_lora.methods import METHODS, Method
from matryoshka_lora.methods.base import single


def config_of(name: str, rank: int = 8, **method) -> Config:
    config = Config()
    config.adapter.rank, config.method.name = rank, name
    for key, value in method.items():
        setattr(config.method, key, value)
    return config


def test_the_diagonals_of_the_methods():
    assert list(METHODS) == [
        *("lora", "dylora", "nested_dropout", "matryoshka"),
        *("nested_matryoshka", "adalora", "sora", "imported"),
    ]
    assert build_method(config_of("lora")).p_full.tolist() == [1] * 8
    expected = matryoshka_diagonal([1, 2, 4, 8], 8, "none")
    assert torch.equal(build_method(config_of("matryoshka")).p_full, expected)
    mean = build_method(config_of("matryoshka", normalise="mean")).p_full
    assert torch.equal(mean, expected / 4)
    for name in ("dylora", "nested_dropout"):
        method = build_method(config_of(name))
        assert method.ranks == (1, 2, 4, 8)
        for rank, p in zip(method.ranks, method.diagonals, strict=True):
            assert torch.equal(p, prefix_diagonal(rank, 8, "none"))


@pytest.mark.parametrize(
    ("decay", "p_full"),
    [(None, [4, 3, 2, 2, 1, 1, 1, 1]), (0.5, [(8 / i) ** 0.5 for i in range(1, 9)])],
)
def test_nested_matryoshka_cuts_p_to_the_drawn_rank(decay, p_full):
    method = build_method(config_of("nested_matryoshka", decay=decay))
    assert method.p_full.tolist() == pytest.approx(p_full)
    for rank, p in zip(method.ranks, method.diagonals, strict=True):
        assert torch.equal(p[:rank], method.p_full[:rank]) and not p[rank:].any()
    # What is read at a rank is just what was trained, and P is folded in where all of it is.
    spec = adapter_spec_of(config_of("nested_matryoshka", decay=decay))
    for rank, p in zip(method.ranks, method.diagonals, strict=True):
        assert torch.equal(read(AdapterView(spec), rank, "trained").p, p)


@pytest.mark.parametrize(
    ("train_ranks", "odds"), [([8], [1]), ([2, 8], [2, 4]), ([1, 2, 4, 8], [2, 1, 1, 4])]
)
def test_odds_of_nested_matryoshka(train_ranks, odds):
    config = config_of("nested_matryoshka")
    config.adapter.train_ranks = train_ranks
    assert build_method(config).weights == tuple(odds)
    config.method.weights = [3.0] * len(odds)
    assert build_method(config).weights == (3.0,) * len(odds)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean matryoshka"):
        build_method(config_of("matroshka"))


def test_draws_are_shared_as_asked():
    step = build_method(config_of("dylora")).choose(0, 5, 32, None)
    assert len(set(step.tolist())) == 1
    micro = build_method(config_of("dylora", draw="micro_batch")).choose(0, 5, 32, 8)
    assert all(len(set(part.tolist())) == 1 for part in micro.reshape(4, 8))
    sample = build_method(config_of("nested_dropout")).choose(0, 5, 32, None)
    # Systematic sampling: 32 samples over 4 equally likely ranks give exactly 8 each.
    assert np.bincount(sample).tolist() == [8] * 4


def test_draws_depend_on_seed_and_step_alone():
    method = build_method(config_of("nested_dropout"))
    first = method.choose(1, 7, 30, None)
    assert np.array_equal(first, method.choose(1, 7, 30, 4))
    assert not np.array_equal(first, method.choose(1, 8, 30, None))
    assert not np.array_equal(first, method.choose(2, 7, 30, None))


@pytest.mark.parametrize("samples", [1, 7, 32])
def test_weighted_draws_are_within_one_of_their_expectation(samples):
    weights = [0.5, 0.0, 0.2, 0.3]
    method = build_method(config_of("nested_dropout", weights=weights))
    total = np.zeros(4)
    for step in range(300):
        counts = np.bincount(method.choose(0, step, samples, None), minlength=4)
        assert (abs(counts - samples * np.array(weights)) < 1).all()
        total += counts
    np.testing.assert_allclose(total / total.sum(), weights, atol=0.06)


def test_independent_draws_know_nothing_of_each_other():
    """The released code draws a rank for each forward; counts of a step then vary."""
    config = config_of("dylora", draw="micro_batch", independent=True)
    method = build_method(config)
    choices = np.stack([method.choose(0, step, 32, 8).reshape(4, 8) for step in range(500)])
    assert (choices == choices[:, :, :1]).all()  # one rank a forward
    drawn = choices[:, :, 0]
    np.testing.assert_allclose(np.bincount(drawn.ravel()) / drawn.size, 0.25, atol=0.04)
    # Of four draws from four ranks, 4!/4^4 = 9 % are all different; stratified ones always are.
    different = np.mean([len(set(row)) == 4 for row in drawn.tolist()])
    assert different == pytest.approx(0.094, abs=0.03)
    stratified = build_method(config_of("dylora", draw="micro_batch")).choose(0, 5, 32, 8)
    assert sorted(stratified[::8].tolist()) == [0, 1, 2, 3]
    # Two draws of a step are equal as often as chance has it.
    assert np.mean(drawn[:, 0] == drawn[:, 1]) == pytest.approx(0.25, abs=0.06)
    assert np.array_equal(method.choose(0, 7, 32, 8), method.choose(0, 7, 32, 8))
    one = config_of("dylora", draw="step", independent=True)
    for step in range(20):
        expected = build_method(config_of("dylora")).choose(0, step, 32, 8)
        assert np.array_equal(build_method(one).choose(0, step, 32, 8), expected)


def test_diagonals_without_weights_are_all_drawn():
    p = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]])
    method = Method(diagonals=p, ranks=(1, 2, 3), p_full=p[-1], draw="sample")
    for step in range(5):
        assert np.bincount(method.choose(0, step, 12, None)).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diagonals": torch.ones(3)}, r"must be \(K, R\) and p_full \(R,\), got \(3,\)"),
        ({"p_full": torch.ones(2)}, r"got \(2, 3\) and \(2,\)"),
        ({"p_full": torch.ones(1, 3)}, r"got \(2, 3\) and \(1, 3\)"),
        ({"diagonals": torch.full((2, 3), torch.nan)}, "not finite"),
        ({"p_full": torch.full((3,), torch.inf)}, "not finite"),
        ({"ranks": (3,)}, "2 diagonals, but ranks for 1"),
        ({"weights": (1.0,)}, "1 values for the 2"),
        ({"weights": (1.0, -1.0)}, "must be >= 0"),
        ({"draw": "row"}, "method.draw=row is unknown; allowed: step, micro_batch, sample"),
    ],
)
def test_a_method_whose_parts_do_not_fit_is_refused(changes, message):
    parts = {"diagonals": torch.ones(2, 3), "ranks": (1, 3), "p_full": torch.ones(3)}
    Method(**parts)
    with pytest.raises(UserError, match=message):
        Method(**(parts | changes))


def test_rules_that_are_one_function_share_a_point():
    lora, matryoshka, dylora = (
        AdapterView(adapter_spec_of(config_of(name))) for name in ("lora", "matryoshka", "dylora")
    )
    assert evaluated_as(lora, 4, "trained") == (4, "prefix")
    assert evaluated_as(matryoshka, 4, "trained") == (4, "trained")
    assert evaluated_as(matryoshka, 8, "svd") == (8, "trained")
    assert evaluated_as(matryoshka, 4, "svd") == (4, "svd")
    assert evaluated_as(dylora, 4, "trained") == (4, "prefix")
    config = config_of("dylora")
    config.adapter.scaling = "rank"
    view = AdapterView(adapter_spec_of(config))
    assert torch.equal(read(view, 4, "trained").p, prefix_diagonal(4, 8, "rank"))


def test_an_edited_diagonal_is_another_run(monkeypatch):
    config = config_of("lora")
    before = run_hash(config, {"name": "m"}, "data")
    info = METHODS["lora"]

    def edited(shape, settings):
        return single(0.7 * info.build(shape, settings).p_full)

    monkeypatch.setitem(METHODS, "lora", dataclasses.replace(info, build=edited))
    assert run_hash(config, {"name": "m"}, "data") != before
