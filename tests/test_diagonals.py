"""The diagonals against the paper's definition, a sum of masked products."""

import random

import pytest
import torch

from matryoshka_lora.core.diagonals import (
    lora_diagonal,
    matryoshka_diagonal,
    powers_of_two,
    prefix_diagonal,
    sub_rank_scale,
)

WORKED_EXAMPLE = {
    "none": [4, 3, 2, 2, 1, 1, 1, 1],
    "sqrt": [2.56066, 1.56066, 0.853553, 0.853553] + [0.353553] * 4,
    "rank": [1.875, 0.875, 0.375, 0.375] + [0.125] * 4,
}


@pytest.mark.parametrize("scaling", WORKED_EXAMPLE)
def test_worked_example(scaling):
    p = matryoshka_diagonal([1, 2, 4, 8], 8, scaling)
    torch.testing.assert_close(p, torch.tensor(WORKED_EXAMPLE[scaling]).float(), atol=1e-5, rtol=0)
    assert p.dtype == torch.float32


def test_ranks_below_the_adapters_leave_zeros():
    assert matryoshka_diagonal([1, 2, 4], 6, "none").tolist() == [3, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("trial", range(30))
def test_matryoshka_is_the_sum_of_the_sub_rank_products(trial):
    draw = random.Random(trial)
    max_rank = draw.randint(1, 20)
    ranks = sorted(draw.sample(range(1, max_rank + 1), draw.randint(1, max_rank)))
    scaling = draw.choice(["none", "sqrt", "rank"])
    generator = torch.Generator().manual_seed(trial)
    A = torch.randn(max_rank, 7, generator=generator, dtype=torch.float64)
    B = torch.randn(5, max_rank, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    scale = {"none": lambda r: 1, "sqrt": lambda r: r**-0.5, "rank": lambda r: 1 / r}[scaling]
    expected = sum(scale(r) * (x @ A[:r].T) @ B[:, :r].T for r in ranks)
    p = matryoshka_diagonal(ranks, max_rank, scaling).double()
    torch.testing.assert_close(((x @ A.T) * p) @ B.T, expected, rtol=1e-6, atol=1e-6)
    rank = draw.randint(1, max_rank)
    prefix = prefix_diagonal(rank, max_rank, scaling).double()
    sliced = scale(rank) * (x @ A[:rank].T) @ B[:, :rank].T
    torch.testing.assert_close(((x @ A.T) * prefix) @ B.T, sliced, rtol=1e-6, atol=1e-6)


def test_lora_is_the_full_prefix():
    assert lora_diagonal(4, "sqrt").tolist() == [0.5] * 4
    assert sub_rank_scale(4, "rank") == 0.25


@pytest.mark.parametrize(("rank", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6])])
def test_powers_of_two(rank, expected):
    assert powers_of_two(rank) == expected


@pytest.mark.parametrize(
    ("ranks", "max_rank", "scaling", "message"),
    [
        ([], 4, "none", "empty"),
        ([1, 1], 4, "none", "strictly increasing"),
        ([2, 1], 4, "none", "strictly increasing"),
        ([0, 1], 4, "none", "not a positive integer"),
        ([-1], 4, "none", "not a positive integer"),
        ([1, 8], 4, "none", "above"),
        ([1], 4, "half", "unknown"),
        ([1.5], 4, "none", "not a positive integer"),
    ],
)
def test_bad_ranks_are_refused(ranks, max_rank, scaling, message):
    with pytest.raises(ValueError, match=message):
        matryoshka_diagonal(ranks, max_rank, scaling)
