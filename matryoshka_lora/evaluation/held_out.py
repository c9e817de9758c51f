"""The loss on records that were held out of training, at every point of a plan."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from matryoshka_lora.config import VALIDATION
from matryoshka_lora.core.adapter import use_factors
from matryoshka_lora.core.rules import FACTOR_SETS
from matryoshka_lora.data.examples import Example
from matryoshka_lora.data.loss import batch_loss
from matryoshka_lora.evaluation.readings import Plan
from matryoshka_lora.evaluation.rows import Row
from matryoshka_lora.ops.attention import packed_attention

BATCH = 32
"""Examples of one forward."""


@torch.no_grad()
def held_out_rows(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plan: Plan,
    packed: bool,
    accelerator: Accelerator,
    fingerprint: str,
) -> list[Row]:
    """Loss in nats a label token on `examples`, a row for each reading of `plan`.

    packed: forwards over packed rows, as in training. fingerprint: of the records. Every
    process gets all rows. Each takes its share of the examples; where the base is sharded all must
    run the same forwards, and each takes all of them.
    """
    labels = sum(example.labels for example in examples)
    batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if not sharded:
        batches = batches[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(len(plan.points), dtype=torch.float64, device=model.device)
    for factors in FACTOR_SETS:
        with use_factors(model, factors), packed_attention(model) if packed else nullcontext():
            for index, point in enumerate(plan.points):
                if point.factors == factors:
                    for batch in batches:
                        sums[index] += batch_loss(model, batch, point.p, packed=packed)
    total = sums if sharded else accelerator.reduce(sums, "sum")
    losses = (total / labels).tolist()
    return [
        Row(
            task=VALIDATION,
            shots=0,
            limit=None,
            filter=None,
            metric="loss",
            value=loss,
            stderr=None,
            n=len(examples),
            fingerprint=fingerprint,
            **reading,
        )
        for point, loss in zip(plan.points, losses, strict=True)
        for reading in plan.readings_of(point)
    ]
