"""Triton kernels of the batched engine, for half precision on CUDA.

`decode_attention`: a decode step's attention, one new query a row over the keys that the row has in
the KV cache. Flash attention works on tiles of 128 queries; here only the few heads that share a
key head can fill one, so it would spend its time on the empty rest and not on reading the keys. The
tiles of this kernel have 16 queries. `attention.decode` is the same in plain functions.

`rms_norm`, `rotate` and `gated_silu`: one pass over memory for what transformers computes in two to
nine. They round where transformers rounds, so that greedy answers do not change.
"""

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without CUDA brings none
    triton = None

AVAILABLE = triton is not None
MIN_SIDE = 16
"""Sides of a matrix product in Triton have at least this length."""
BLOCK_KEYS = 32
"""Keys in a block of `decode_attention`. More are no faster, and at d = 256 do not fit the shared
memory of every card."""
BLOCK = 2048
"""Numbers that one program of an elementwise kernel works on."""


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lengths: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """One query a row over the first kv_lengths[row] keys of the row, softmax in float32.

    query: (rows, heads, d), key and value: (rows, kv_heads, size, d), kv_lengths: (rows,) ->
    (rows, heads, d).
    """
    rows, heads, width = query.shape
    kv_heads, value_width = key.shape[1], value.shape[3]
    out = query.new_empty(rows, heads, value_width)
    assert query.stride(2) == key.stride(3) == value.stride(3) == 1, "d is the innermost axis"
    scaling = 1 / math.sqrt(width) if scaling is None else scaling
    _attend[(rows * kv_heads,)](
        *(query, key, value, out, kv_lengths),
        scaling / math.log(2),
        *(query.stride()[:2] + key.stride()[:3] + value.stride()[:3] + out.stride()[:2]),
        KEY_HEADS=kv_heads,
        SHARING=heads // kv_heads,
        QUERIES=max(triton.next_power_of_2(heads // kv_heads), MIN_SIDE),
        BLOCK_KEYS=BLOCK_KEYS,
        WINDOW=sliding_window or 0,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        WIDTH_2=max(triton.next_power_of_2(width), MIN_SIDE),
        VALUE_WIDTH_2=max(triton.next_power_of_2(value_width), MIN_SIDE),
        num_warps=4,
        num_stages=3,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * (x / rms(x))`, the quotient rounded to x's dtype; x: (..., d), weight: (d,)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _norm[(x.numel() // width,)](
        *(x, weight, out, eps),
        WIDTH=width,
        num_warps=1,
        enable_fp_fusion=False,  # a fused multiply-add does not round the product
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys, `x * cos + rotate_half(x) * sin`.

    x: (1, heads, T, d), cos and sin: (1, T, d), all of the same dtype -> like x.
    """
    _, heads, tokens, width = x.shape
    out = torch.empty_like(x)
    assert x.stride(3) == out.stride(3) == cos.stride(2) == sin.stride(2) == 1, "d is innermost"
    _rotate[(tokens,)](
        *(x, cos, sin, out),
        *(x.stride(2), x.stride(1), cos.stride(1), sin.stride(1), out.stride(2), out.stride(1)),
        HEADS=heads,
        HALF=width // 2,
        HEADS_2=triton.next_power_of_2(heads),
        HALF_2=triton.next_power_of_2(width // 2),
        enable_fp_fusion=False,  # a fused multiply-add does not round the product
    )
    return out


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, written over `gate`; both contiguous and of the same shape and dtype."""
    assert gate.is_contiguous() and up.is_contiguous() and gate.shape == up.shape
    _gate[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, gate.numel(), BLOCK=BLOCK)
    return gate


if triton is not None:

    @triton.jit
    def _attend(  # type: ignore[no-untyped-def]
        query,
        key,
        value,
        out,
        lengths,
        scale,
        query_row,
        query_head,
        key_row,
        key_head,
        key_token,
        value_row,
        value_head,
        value_token,
        out_row,
        out_head,
        KEY_HEADS: tl.constexpr,
        SHARING: tl.constexpr,
        QUERIES: tl.constexpr,
        BLOCK_KEYS: tl.constexpr,
        WINDOW: tl.constexpr,
        WIDTH: tl.constexpr,
        VALUE_WIDTH: tl.constexpr,
        WIDTH_2: tl.constexpr,
        VALUE_WIDTH_2: tl.constexpr,
    ):
        """One program for each row and key head, which SHARING query heads share.

        scale: for powers of 2; WINDOW: of a sliding window, 0 for none.
        """
        program = tl.program_id(0).to(tl.int64)
        head, row = program % KEY_HEADS, program // KEY_HEADS
        heads = head * SHARING + tl.arange(0, QUERIES)
        real = tl.arange(0, QUERIES)[:, None] < SHARING
        columns, value_columns = tl.arange(0, WIDTH_2), tl.arange(0, VALUE_WIDTH_2)
        inside, value_inside = columns[None, :] < WIDTH, value_columns[None, :] < VALUE_WIDTH
        q = tl.load(
            query + row * query_row + heads[:, None] * query_head + columns[None, :],
            mask=real & inside,
            other=0.0,
        )
        length = tl.load(lengths + row)
        first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
        key += row * key_row + head * key_head
        value += row * value_row + head * value_head
        most = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        mean = tl.zeros((QUERIES, VALUE_WIDTH_2), tl.float32)
        for start in range(first, length, BLOCK_KEYS):
            at = start + tl.arange(0, BLOCK_KEYS)
            seen = at < length
            k = tl.load(
                key + at[:, None] * key_token + columns[None, :],
                mask=seen[:, None] & inside,
                other=0.0,
            )
            scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
            new_most = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - new_most[:, None])
            shrink = tl.exp2(most - new_most)
            v = tl.load(
                value + at[:, None] * value_token + value_columns[None, :],
                mask=seen[:, None] & value_inside,
                other=0.0,
            )
            mean = mean * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
            total = total * shrink + tl.sum(weights, 1)
            most = new_most
        tl.store(
            out + row * out_row + heads[:, None] * out_head + value_columns[None, :],
            (mean / total[:, None]).to(out.dtype.element_ty),
            mask=real & value_inside,
        )

    @triton.jit
    def _norm(x, weight, out, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        """One program, of one warp, for each vector."""
        kind = x.dtype.element_ty
        column = tl.arange(0, 128)
        x += tl.program_id(0).to(tl.int64) * WIDTH
        out += tl.program_id(0).to(tl.int64) * WIDTH
        # Sums in different orders may differ by a rounding, so this adds in the order of torch's
        # mean of 16 or more vectors of 128 to 8,160 numbers, a multiple of 4: a thread adds up
        # every 32nd quadruple element by element, then its four sums, and last the warp adds up
        # those of its threads.
        sums = tl.zeros((128,), tl.float32)
        for start in tl.static_range(0, WIDTH, 128):
            part = tl.load(x + start + column, start + column < WIDTH, 0.0).to(tl.float32)
            sums += part * part
        even, odd = tl.split(tl.reshape(sums, (32, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        mean = tl.sum(((first + second) + third) + fourth, 0) * (1 / WIDTH)
        size = tl.rsqrt(mean + eps)
        for start in tl.static_range(0, WIDTH, 128):
            inside = start + column < WIDTH
            part = tl.load(x + start + column, inside, 0.0).to(tl.float32)
            w = tl.load(weight + start + column, inside, 0.0).to(tl.float32)
            part = (part * size).to(kind).to(tl.float32)
            tl.store(out + start + column, (part * w).to(kind), inside)

    @triton.jit
    def _rotate(  # type: ignore[no-untyped-def]
        x,
        cos,
        sin,
        out,
        x_token,
        x_head,
        cos_token,
        sin_token,
        out_token,
        out_head,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        HEADS_2: tl.constexpr,
        HALF_2: tl.constexpr,
    ):
        """One program for all heads of a token."""
        kind = x.dtype.element_ty
        token = tl.program_id(0).to(tl.int64)
        head, column = tl.arange(0, HEADS_2)[:, None], tl.arange(0, HALF_2)[None, :]
        inside = column < HALF
        real = (head < HEADS) & inside
        cos += token * cos_token + column
        sin += token * sin_token + column
        x += token * x_token + head * x_head + column
        out += token * out_token + head * out_head + column
        a, b = tl.load(x, real, 0.0).to(tl.float32), tl.load(x + HALF, real, 0.0).to(tl.float32)
        c, d = tl.load(cos, inside, 0.0), tl.load(cos + HALF, inside, 0.0)
        s, t = tl.load(sin, inside, 0.0), tl.load(sin + HALF, inside, 0.0)
        # As in transformers, each product is rounded, then their sum.
        first = (a * c).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)
        second = (b * d).to(kind).to(tl.float32) + (a * t).to(kind).to(tl.float32)
        tl.store(out, first.to(kind), real)
        tl.store(out + HALF, second.to(kind), real)

    @triton.jit
    def _gate(gate, up, numbers, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """One program for each block of numbers."""
        kind = gate.dtype.element_ty
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numbers
        x = tl.load(gate + at, inside, 0.0).to(tl.float32)
        y = tl.load(up + at, inside, 0.0).to(tl.float32)
        active = (x / (1 + tl.exp(-x))).to(kind).to(tl.float32)
        tl.store(gate + at, (active * y).to(kind), inside)
