import itertools

import numpy as np
import pytest

from matryoshka_lora.reporting import bootstrap
from matryoshka_lora.reporting.aurac import aurac, trapezoid_weights
from matryoshka_lora.reporting.bootstrap import bootstrap_intervals


def test_aurac_by_hand():
    # log2: x = 0 1 2 3, areas 15 + 30 + 40 = 85, width 3.
    assert aurac([1, 2, 4, 8], [10, 20, 40, 40]) == pytest.approx(85 / 3)
    # linear: areas 15 + 60 + 160 = 235, width 7.
    assert aurac([1, 2, 4, 8], [10, 20, 40, 40], axis="linear") == pytest.approx(235 / 7)


@pytest.mark.parametrize("axis", ["log2", "linear"])
def test_aurac_of_simple_curves(axis):
    assert aurac([16], [42.0], axis=axis) == 42.0
    assert aurac([3, 5, 6, 32], [7.0] * 4, axis=axis) == pytest.approx(7.0)
    assert aurac([2, 8], [0.0, 1.0], axis=axis) == pytest.approx(0.5)


def test_weights_are_the_aurac_of_unit_curves():
    rng = np.random.default_rng(0)
    for axis in ("log2", "linear"):
        ranks = sorted(rng.choice(np.arange(1, 65), size=6, replace=False).tolist())
        scores = rng.normal(size=6)
        x = np.log2(ranks) if axis == "log2" else np.array(ranks, dtype=float)
        brute = sum((x[i + 1] - x[i]) * (scores[i] + scores[i + 1]) / 2 for i in range(5))
        weights = trapezoid_weights(ranks, axis)
        assert weights.sum() == pytest.approx(1)
        assert weights @ scores == pytest.approx(brute / (x[-1] - x[0]))
        assert aurac(ranks, scores.tolist(), axis) == pytest.approx(brute / (x[-1] - x[0]))


@pytest.mark.parametrize(
    ("ranks", "scores", "axis", "words"),
    [
        ([1, 2], [1.0], "log2", "one score a rank"),
        ([], [], "log2", "non-empty"),
        ([2, 1], [1.0, 2.0], "log2", "ascending"),
        ([1, 1, 2], [1.0, 2.0, 3.0], "log2", "without repeats"),
        ([0, 1], [1.0, 2.0], "log2", "positive"),
        ([-2, 1], [1.0, 2.0], "linear", "positive"),
        ([1, 2], [1.0, 2.0], "log10", "unknown AURAC axis 'log10'"),
        ([1, 2], [1.0, float("nan")], "log2", "finite"),
    ],
)
def test_aurac_refuses(ranks, scores, axis, words):
    with pytest.raises(ValueError, match=words):
        aurac(ranks, scores, axis=axis)


def test_bootstrap_against_brute_force():
    """Resample columns with the same draws, average every rank, and integrate each curve."""
    ranks, samples = [1, 2, 8], 300
    ours, theirs = np.random.default_rng(1).integers(0, 2, size=(2, 3, 20)).astype(float)
    rng = np.random.default_rng(5)
    areas = []
    for _ in range(samples):
        drawn = rng.integers(0, 20, 20)
        area, other = (aurac(ranks, x[:, drawn].mean(axis=1).tolist()) for x in (ours, theirs))
        areas.append([area, area - other])
    expected = np.quantile(areas, [0.05, 0.95], axis=0).T
    weights = trapezoid_weights(ranks)
    values = [weights @ ours, weights @ (ours - theirs)]
    got = bootstrap_intervals(values, confidence=0.9, samples=samples, seed=5)
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("documents", [7, 500])
def test_bootstrap_draws_one_resample_after_the_other(documents, monkeypatch):
    """The bits are those of a loop over the resamples, however many are drawn at a time."""
    values = np.random.default_rng(3).normal(size=(4, documents))
    rng = np.random.default_rng(0)
    means = [
        values @ np.bincount(rng.integers(0, documents, documents), minlength=documents) / documents
        for _ in range(200)
    ]
    expected = np.quantile(means, [0.25, 0.75], axis=0).T
    for counts in (1, 33 * documents, 2**20):
        monkeypatch.setattr(bootstrap, "_COUNTS", counts)
        got = bootstrap.bootstrap_intervals(values, confidence=0.5, samples=200)
        assert (got == expected).all()


def test_bootstrap_against_all_resamples():
    """Three documents have 27 equally likely resamples; many draws come to their quantiles."""
    ranks = [1, 4]
    scores = np.array([[0.0, 1.0, 5.0], [2.0, 1.0, 0.0]])
    areas = [
        aurac(ranks, scores[:, list(drawn)].mean(axis=1).tolist(), "linear")
        for drawn in itertools.product(range(3), repeat=3)
    ]
    expected = np.quantile(areas, [0.1, 0.9])
    values = [trapezoid_weights(ranks, "linear") @ scores]
    (got,) = bootstrap_intervals(values, confidence=0.8, samples=5000)
    assert got == pytest.approx(expected, abs=1e-9)


def test_a_constant_difference_has_no_spread():
    better = np.random.default_rng(2).integers(0, 2, size=200).astype(float)
    got = bootstrap_intervals([(better + 0.25) - better, better])
    assert got[0] == pytest.approx([0.25, 0.25]) and got[1, 0] < better.mean() < got[1, 1]


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([1.0, 2.0, 3.0], {}, "shape"),
        ([[], []], {}, "shape"),
        ([[1.0, float("nan")]], {}, "finite"),
        ([[1.0]], {"confidence": 95}, "confidence"),
        ([[1.0]], {"samples": 0}, "at least one"),
    ],
)
def test_bootstrap_refuses(values, options, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_intervals(values, **options)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_intervals_over_few_seeds_cover_the_truth(seeds, spread):
    """300 experiments whose true mean is 0; the seeds' deviation is `spread` times the documents'.

    Without widening, 3 seeds that spread far cover it in 87 % of these experiments.
    """
    rng, documents, covered = np.random.default_rng(7), 100, 0
    for number in range(300):
        own = rng.normal(0, spread / np.sqrt(documents), (seeds, 1))
        line = rng.normal(size=documents) + own + rng.normal(0, 0.3, (seeds, documents))
        low, high = bootstrap.interval(bootstrap.resampled_means([line], seed=number)[0])
        covered += low <= 0 <= high
    assert covered / 300 > 0.93


def test_one_seed_is_resampled_over_documents_alone():
    scores = np.arange(12.0)[None]
    drawn = bootstrap.resampled_means([scores], samples=4000)[0]
    np.testing.assert_allclose(bootstrap.interval(drawn), bootstrap_intervals(scores)[0], atol=0.15)
