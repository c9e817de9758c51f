"""What methods share that train the prefix diagonals themselves."""

from collections.abc import Sequence

import torch

from matryoshka_lora.core.diagonals import prefix_diagonal
from matryoshka_lora.methods.base import AdapterShape, Method
from matryoshka_lora.methods.hooks import Hooks


def prefix_choices(
    shape: AdapterShape, weights: Sequence[float] | None, draw: str, hooks: Hooks | None = None
) -> Method:
    """p = prefix(r), one r of S for each step, micro-batch or sample, as `draw` says."""
    return Method(
        diagonals=torch.stack(
            [prefix_diagonal(r, shape.rank, shape.scaling) for r in shape.train_ranks]
        ),
        ranks=shape.train_ranks,
        p_full=prefix_diagonal(shape.rank, shape.rank, shape.scaling),
        weights=None if weights is None else tuple(weights),
        draw=draw,
        trains_prefixes=True,
        hooks=hooks or Hooks(),
    )
