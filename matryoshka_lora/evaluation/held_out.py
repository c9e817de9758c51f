"""The loss on records that were held out of training, at every point of a plan."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from matryoshka_lora.config import VALIDATION
from matryoshka_lora.core.adapter import adapter_view, use_factors
from matryoshka_lora.core.rules import FACTOR_SETS, Reading, trained
from matryoshka_lora.data.examples import Example
from matryoshka_lora.data.loss import batch_loss
from matryoshka_lora.evaluation.engines.protocol import Point
from matryoshka_lora.evaluation.readings import Plan
from matryoshka_lora.evaluation.rows import Row
from matryoshka_lora.ops.attention import packed_attention

BATCH, LARGE_BATCH = 32, 64
"""Examples of one forward. In larger ones a small model's few readings take less time."""
LOGITS = 2**29
"""Numbers in the logits of one forward, about: a large vocabulary takes fewer examples."""


def held_out_rows(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plan: Plan,
    packed: bool,
    accelerator: Accelerator,
    fingerprint: str,
) -> list[Row]:
    """Loss in nats a label token on `examples`, a row for each reading of `plan`.

    packed: forwards over packed rows, as in training. fingerprint: of the records. Every process
    gets all rows.
    """
    losses = _losses(model, examples, plan.points, packed, accelerator, BATCH)
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


def loss_at_full_rank(
    model: PreTrainedModel, examples: Sequence[Example], packed: bool, accelerator: Accelerator
) -> float:
    """Loss in nats a label token on `examples`, read at R as training left the factors.

    The row of that reading has the same number, but for rounding. Every process gets it.
    """
    adapter = adapter_view(model)
    reading = trained(adapter, adapter.spec.rank)
    (loss,) = _losses(model, examples, [reading], packed, accelerator, LARGE_BATCH)
    return loss


@torch.no_grad()
def _losses(
    model: PreTrainedModel,
    examples: Sequence[Example],
    readings: Sequence[Point | Reading],
    packed: bool,
    accelerator: Accelerator,
    batch: int,
) -> list[float]:
    """Loss in nats a label token, of each reading, in forwards of at most `batch` examples.

    Each process takes its share of the examples; where the base is sharded all must run the same
    forwards, and each takes all of them.
    """
    labels = sum(example.labels for example in examples)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    batch = max(min(batch, LOGITS * len(examples) // (labels * vocabulary)), 1)
    batches = [examples[i : i + batch] for i in range(0, len(examples), batch)]
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if not sharded:
        batches = batches[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(len(readings), dtype=torch.float64, device=model.device)
    for factors in FACTOR_SETS:
        with use_factors(model, factors), packed_attention(model) if packed else nullcontext():
            for index, reading in enumerate(readings):
                if reading.factors == factors:
                    for part in batches:
                        sums[index] += batch_loss(model, part, reading.p, packed=packed)
    total = sums if sharded else accelerator.reduce(sums, "sum")
    return (total / labels).tolist()
