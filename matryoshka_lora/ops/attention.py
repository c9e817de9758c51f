"""Attention over packed rows: several documents in one row, each seeing only itself.

`"packed"` is registered with transformers' attention interface, so any model that takes its
attention from there runs on packed rows as it is. The documents come as keyword arguments that the
model hands through, under the names of transformers' `FlashAttentionKwargs`: see `packed_inputs`.
transformers builds no mask for an implementation that is not in its mask registry, whatever the
position ids say.

bf16 and fp16 on CUDA use the variable-length flash attention that is part of torch, and in decoding
the kernel of `kernels.py`; everything else uses scaled_dot_product_attention, document by document.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.ops.device import to_device
from matryoshka_lora.ops.kernels import AVAILABLE, decode_attention

PACKED = "packed"
"""The name of `packed` in transformers' interface."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
"""What flash attention and the kernels take."""

# torch 2.11 cannot share a key head among query heads in the backward; 2.12 can.
_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
# Arguments that some models pass to their attention and that are not implemented here.
_REFUSED = ("softcap", "s_aux", "position_bias", "alibi_slopes", "head_mask", "block_table")
_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")


def packed_inputs(
    lengths: Sequence[int], device: torch.device | str, max_length: int | None = None
) -> dict[str, Tensor | int]:
    """What a model is given beside the input ids (1, sum of lengths) to keep the documents apart.

    position_ids (1, T); cu_seq_lens_q and cu_seq_lens_k (documents + 1,) int32: where each document
    starts and ends; max_length_q and max_length_k. `max_length` fixes these two at an upper bound,
    so that compiled layers see a constant.
    """
    longest = max(lengths)
    assert max_length is None or longest <= max_length, (longest, max_length)
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    starts = F.pad(ends, (1, 0)).to(torch.int32)
    positions = torch.arange(int(ends[-1])) - starts[:-1].long().repeat_interleave(sizes)
    bounds = to_device(starts, device)
    return {
        "position_ids": to_device(positions[None], device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max_length or longest,
        "max_length_k": max_length or longest,
    }


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` on packed rows for the length of a block.

    Raises UserError for a model that does not take its attention from transformers' interface or
    whose layers attend in another way than fully or through a sliding window.
    """
    configs = [model.config]
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and all(module.config is not c for c in configs):
            configs.append(module.config)
    for config in configs:
        other = set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES)
        if other or not getattr(model, "_supports_flash_attn", False):
            raise UserError(
                f"{type(model).__name__} cannot run on packed rows: "
                + (f"its layers are {sorted(other)}" if other else "it has no flash attention path")
            )
    before = [config._attn_implementation for config in configs]
    try:
        model.set_attn_implementation(PACKED)
        if any(config._attn_implementation != PACKED for config in configs):
            raise UserError(
                f"{type(model).__name__} does not let its attention be replaced, so it cannot run "
                "on packed rows"
            )
        yield
    finally:
        # The setter reaches into sub-configs, so the outermost goes first.
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    kv_index: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    reference: bool = False,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention of every document to itself; the last query stands at the last key.

    query: (1, heads, T, d), key and value: (1, kv_heads, T_k, d) -> (1, T, heads, d). A document's
    queries may be fewer than its keys: it then continues what the keys begin.

    kv_index (T_k,): the documents' keys are `key[:, :, kv_index]`, so that several may share them.
    kv_lengths (rows,), int32: decoding. There is one query a row; key and value are a KV cache,
    (rows, kv_heads, size, d), of which row i uses the first kv_lengths[i], at most max_length_k.
    That bound saves the plain functions some work.
    reference: use the plain functions where flash attention or the kernel would be used.

    Raises UserError for what a model asks of its attention and this one does not do.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} asks for {name}, which packed attention does not do"
            )
    if dropout:
        raise UserError("packed attention has no dropout; set the model's attention_dropout to 0")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UserError(f"{type(module).__name__} is not causal; packed attention is")
    assert attention_mask is None and query.shape[0] == 1, (
        "a packed row needs no mask and is a batch of one"
    )
    fast = query.is_cuda and query.dtype in FLASH_DTYPES and not reference
    if kv_lengths is not None:
        q = query[0].transpose(0, 1)
        if fast and AVAILABLE:
            return decode_attention(q, key, value, kv_lengths, scaling, sliding_window)[None], None
        assert max_length_k is not None
        out = decode(q, key, value, kv_lengths, max_length_k, scaling, sliding_window)
        return out[None], None
    if kv_index is not None:
        key, value = key[:, :, kv_index], value[:, :, kv_index]
    if cu_seq_lens_q is None or max_length_q is None or max_length_k is None:
        raise UserError("packed attention needs the documents' bounds: pass **packed_inputs(...)")
    if cu_seq_lens_k is None:
        cu_seq_lens_k = cu_seq_lens_q
    if fast:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        bounds, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
        return flash(q, k, v, bounds, longest, scaling, sliding_window)[None], None
    ends = (cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist())
    out = document_by_document(query, key, value, ends, scaling, sliding_window)
    # Some models `view` what attention gives, as they may of flash attention's.
    return out.transpose(1, 2).contiguous(), None


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: tuple[Tensor, Tensor],
    max_lengths: tuple[int, int],
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Flash attention on CUDA; a document's last query stands at its last key.

    query: (T, heads, d), key and value: (T_k, kv_heads, d) -> (T, heads, d). cu_seq_lens and
    max_lengths: of the documents' queries, and of their keys.
    """
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    options: dict[str, Any] = {"scale": scaling, "window_size": window}
    if _VARLEN_HAS_GQA:
        options["enable_gqa"] = True
    elif torch.is_grad_enabled():
        sharing = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(sharing, dim=1) for x in (key, value))
    else:
        return torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            *cu_seq_lens,
            *max_lengths,
            0.0,
            sliding_window is None,
            False,
            scale=scaling,
            window_size_left=window[0],
            window_size_right=window[1],
        )[0]
    out = varlen_attn(query, key, value, *cu_seq_lens, *max_lengths, **options)
    assert isinstance(out, Tensor)
    return out


def document_by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Sequence[int], Sequence[int]],
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """`flash` in plain functions, for any device and dtype -> (1, heads, T, d).

    query: (1, heads, T, d), key and value: (1, kv_heads, T_k, d); bounds: of the documents'
    queries, of their keys.
    """
    out = []
    starts = zip(bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True)
    for q_start, q_end, k_start, k_end in starts:
        n_q, n_k = q_end - q_start, k_end - k_start
        mask = None
        if n_q != n_k or (sliding_window is not None and sliding_window < n_k):
            mask = query.new_ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
            if sliding_window is not None:
                mask = mask.triu(n_k - n_q - sliding_window + 1)
        out.append(
            F.scaled_dot_product_attention(
                query[:, :, q_start:q_end],
                key[:, :, k_start:k_end],
                value[:, :, k_start:k_end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(out, dim=2)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lengths: Tensor,
    max_length: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """`decode_attention` in plain functions, for any device and dtype -> (rows, heads, d).

    query: (rows, heads, d), key and value: (rows, kv_heads, size, d). The query heads that share a
    key head become its queries, so that no keys are copied.
    """
    q = query.unflatten(1, (key.shape[1], -1))
    k, v = key[:, :, :max_length], value[:, :, :max_length]
    position = torch.arange(max_length, device=query.device)
    mask = position < kv_lengths[:, None]
    if sliding_window is not None:
        mask &= position >= kv_lengths[:, None] - sliding_window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=scaling)
    return out.flatten(1, 2)


AttentionInterface.register(PACKED, packed)
