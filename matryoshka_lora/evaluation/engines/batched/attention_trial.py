"""A trial of the fast attention on the device at hand, before the batched engine relies on it."""

import logging
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from matryoshka_lora.evaluation.engines.batched.kv_cache import KVShape
from matryoshka_lora.evaluation.engines.batched.prefill import document_bounds
from matryoshka_lora.ops.attention import FLASH_DTYPES, packed
from matryoshka_lora.ops.kernels import AVAILABLE

logger = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Relative difference allowed between two attentions in half precision; bf16 rounds by 0.004."""


@torch.no_grad()
def attention_agrees(
    model: PreTrainedModel, shapes: Sequence[KVShape], device: torch.device, decoding: bool
) -> bool:
    """Whether the fast attention of prefills, or of decoding, gives what the plain functions give.

    Tried on random keys of these shapes, and used as the engine uses it: documents that share the
    keys of a context; few and many rows of a KV cache. torch's interface differs between versions,
    and a wrong answer would be silent.
    """
    if decoding and not AVAILABLE and any(shape.dtype in FLASH_DTYPES for shape in shapes):
        logger.warning("Triton is not installed, so decoding is slower")
        return False
    config = model.config.get_text_config()
    generator = torch.Generator(device).manual_seed(0)
    cases: list[tuple[int, tuple[int, int], dict[str, Any]]] = []
    """(queries, (rows, tokens of a row) of the keys, arguments of the attention)"""
    if decoding:
        size = 640
        for rows in (3, 200):
            lengths = torch.randint(1, size + 1, (rows,), generator=generator, device=device)
            case = {"max_length_k": size, "kv_lengths": lengths.int()}
            cases.append((rows, (rows, size), case))
    else:
        lengths_q, lengths_k = [300, 5, 1, 70], [300, 305, 301, 70]
        case = {
            "cu_seq_lens_q": document_bounds(lengths_q, device),
            "cu_seq_lens_k": document_bounds(lengths_k, device),
            "max_length_q": max(lengths_q),
            "max_length_k": max(lengths_k),
        }
        cases.append((sum(lengths_q), (1, sum(lengths_k)), case))
    windows = {None, getattr(config, "sliding_window", None)}
    for shape, (tokens, (rows, size), case), window in product(set(shapes), cases, windows):
        if shape.dtype not in FLASH_DTYPES:
            continue
        query, key, value = (
            torch.randn(*sizes, dtype=shape.dtype, generator=generator, device=device)
            for sizes in (
                (1, config.num_attention_heads, tokens, shape.key[1]),
                (rows, shape.key[0], size, shape.key[1]),
                (rows, shape.value[0], size, shape.value[1]),
            )
        )
        options = case | {"sliding_window": window}
        try:
            found, expected = (
                packed(model, query, key, value, None, reference=plain, **options)[0].float()
                for plain in (False, True)
            )
        except Exception as reason:  # a compiler has errors of its own
            logger.warning("fast attention does not run here, using a slower one: %s", reason)
            return False
        error = float((found - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            logger.warning("fast attention is off by %.3g here, using a slower one", error)
            return False
    return True
