"""The paper's idea: train with the sum of the prefix masks of all sub-ranks as the diagonal.

An adapted layer computes `y = x W0^T + ((x A^T) * p) B^T`; a method is a choice of `p`. With `S`
the trained sub-ranks, `1[i<=r]` the prefix mask (i counts from 1) and `s_r` the scale of rank r:

    lora         p_i = s_R
    prefix(r)    p_i = s_r * 1[i<=r]                  DyLoRA in training; any rank at inference
    matryoshka   p_i = sum of s_r, r in S with r>=i   Algorithm 1 of arXiv 2605.07850

Worked example, R=8, S={1,2,4,8}, scaling "none": matryoshka is 4 3 2 2 1 1 1 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka_lora.core.errors import UserError

SCALINGS = ("none", "sqrt", "rank")


def powers_of_two(max_rank: int) -> list[int]:
    """1, 2, 4, ... up to `max_rank`, which is always included, even if it is not a power of two."""
    check_rank(max_rank, max_rank)
    return sorted({2**k for k in range(max_rank.bit_length())} | {max_rank})


def sub_rank_scale(rank: int, scaling: str) -> float:
    """`s_r`: 1 for "none", 1/sqrt(r) for "sqrt" (rsLoRA, arXiv 2312.03732), 1/r for "rank"."""
    check_rank(rank, rank)
    if scaling not in SCALINGS:
        raise UserError(f"scaling {scaling!r} is unknown; allowed: {', '.join(SCALINGS)}")
    return {"none": 1.0, "sqrt": 1.0 / math.sqrt(rank), "rank": 1.0 / rank}[scaling]


def lora_diagonal(max_rank: int, scaling: str) -> Tensor:
    """`s_R` everywhere, shape (max_rank,): LoRA, with "sqrt" rsLoRA."""
    return prefix_diagonal(max_rank, max_rank, scaling)


def prefix_diagonal(rank: int, max_rank: int, scaling: str) -> Tensor:
    """`s_r` on the first `rank` entries, zero behind them, shape (max_rank,)."""
    check_rank(rank, max_rank)
    p = torch.zeros(max_rank, dtype=torch.float32)
    p[:rank] = sub_rank_scale(rank, scaling)
    return p


def matryoshka_diagonal(train_ranks: Sequence[int], max_rank: int, scaling: str) -> Tensor:
    """The sum of the prefix diagonals of all `train_ranks`, shape (max_rank,).

    Source: Algorithm 1 of arXiv 2605.07850. Example: S=[1,2,4], R=6, "none": 3 2 1 1 0 0.
    """
    check_train_ranks(train_ranks, max_rank)
    return torch.stack([prefix_diagonal(r, max_rank, scaling) for r in train_ranks]).sum(0)


def power_diagonal(decay: float, max_rank: int, scaling: str) -> Tensor:
    """`s_R (R/i)^decay`, i = 1..R, shape (max_rank,): a smooth form of Algorithm 1's steps."""
    places = torch.arange(1, max_rank + 1, dtype=torch.float32)
    return lora_diagonal(max_rank, scaling) * (max_rank / places) ** decay


def check_rank(rank: int, max_rank: int) -> None:
    """Raises UserError unless 1 <= rank <= max_rank."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"rank {rank!r} is not a positive integer")
    if rank > max_rank:
        raise UserError(f"rank {rank} is above the adapter's rank {max_rank}")


def check_train_ranks(train_ranks: Sequence[int], max_rank: int) -> None:
    """Raises UserError unless the sub-ranks are non-empty, strictly increasing, in 1..max_rank."""
    if not train_ranks:
        raise UserError("the set of trained sub-ranks is empty; give at least one rank")
    for rank in train_ranks:
        check_rank(rank, max_rank)
    if list(train_ranks) != sorted(set(train_ranks)):
        raise UserError(
            f"sub-ranks {list(train_ranks)} must be strictly increasing, each given once"
        )
