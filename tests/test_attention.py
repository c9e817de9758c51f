"""Packed rows against the plain padded forward of transformers' own attention."""

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from matryoshka_lora.ops.attention import decode, packed, packed_attention, packed_inputs
from matryoshka_lora.ops.kernels import decode_attention

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        sliding_window=3,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
LENGTHS = (7, 1, 13, 4, 9)


def build(config: PretrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Large enough weights that attention is not near uniform.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, SHAPE["vocab_size"], (n,), generator=generator) for n in LENGTHS]


def padded_logits(model: PreTrainedModel, docs: list[Tensor]) -> Tensor:
    ids = torch.nn.utils.rnn.pad_sequence(docs, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in docs], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.cat([row[: len(d)] for row, d in zip(logits, docs, strict=True)])


def packed_logits(model: PreTrainedModel, docs: list[Tensor], **fixed: int) -> Tensor:
    inputs = packed_inputs([len(d) for d in docs], "cpu", **fixed)
    with packed_attention(model):
        return model(input_ids=torch.cat(docs)[None], use_cache=False, **inputs).logits[0]


def gradients(model: PreTrainedModel, logits: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    return list(torch.autograd.grad((logits * weight).sum(), list(model.parameters())))


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_padded(name: str) -> None:
    model, docs = build(CONFIGS[name]), documents()
    expected, found = padded_logits(model, docs), packed_logits(model, docs)
    assert relative(found, expected) < 1e-9
    assert model.config._attn_implementation == "sdpa"
    # Gemma's norms take the gradient of their weights in float32.
    tolerance = 1e-6 if name == "gemma3" else 1e-9
    for a, b in zip(gradients(model, found), gradients(model, expected), strict=True):
        assert relative(a, b) < tolerance


def test_a_fixed_maximum_changes_nothing() -> None:
    model, docs = build(CONFIGS["mistral"]), documents()
    assert torch.equal(packed_logits(model, docs), packed_logits(model, docs, max_length=64))


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_do_not_see_each_other(name: str) -> None:
    model, docs = build(CONFIGS[name]), documents()
    before = packed_logits(model, docs).split(LENGTHS)
    docs[2] = (docs[2] % 50) + 3
    after = packed_logits(model, docs).split(LENGTHS)
    for i in range(len(docs)):
        assert torch.equal(before[i], after[i]) == (i != 2)


def test_no_mask_is_built_for_packed_positions() -> None:
    model = build(CONFIGS["llama"])
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    packed_logits(model, documents())
    assert seen == [None]


@pytest.mark.parametrize("window", [None, 4])
def test_continuations_share_keys(window: int | None) -> None:
    """Two endings of one context equal the two documents written out."""
    torch.manual_seed(0)
    module, context, endings = torch.nn.Module(), 6, (3, 2)
    q, k, v = (torch.randn(1, heads, 11, 8, dtype=torch.float64) for heads in (4, 2, 2))
    kv_index, bounds_q, bounds_k, start = list(range(context)), [0, context], [0, context], context
    expected = []
    for n in endings:
        index = [*range(context), *range(start, start + n)]
        kv_index += index
        bounds_q.append(bounds_q[-1] + n)
        bounds_k.append(bounds_k[-1] + len(index))
        document = packed_inputs([len(index)], "cpu")
        del document["position_ids"]
        parts = (x[:, :, index] for x in (q, k, v))
        out, _ = packed(module, *parts, None, sliding_window=window, **document)
        expected += [out] if not expected else [out[:, context:]]
        start += n
    found, _ = packed(
        module,
        q,
        k,
        v,
        None,
        sliding_window=window,
        cu_seq_lens_q=torch.tensor(bounds_q, dtype=torch.int32),
        cu_seq_lens_k=torch.tensor(bounds_k, dtype=torch.int32),
        max_length_q=context,
        max_length_k=context + max(endings),
        kv_index=torch.tensor(kv_index),
    )
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_decoding_equals_the_last_query(window: int | None) -> None:
    torch.manual_seed(0)
    module, lengths, size = torch.nn.Module(), (5, 1, 8), 10
    k, v = torch.randn(2, len(lengths), 2, size, 8, dtype=torch.float64)
    q = torch.randn(1, 4, len(lengths), 8, dtype=torch.float64)
    found, _ = packed(
        module,
        q,
        k,
        v,
        None,
        scaling=0.4,
        sliding_window=window,
        max_length_k=max(lengths),
        kv_lengths=torch.tensor(lengths, dtype=torch.int32),
    )
    for i, n in enumerate(lengths):
        one, _ = packed(
            module,
            q[:, :, i : i + 1],
            k[i : i + 1, :, :n],
            v[i : i + 1, :, :n],
            None,
            scaling=0.4,
            sliding_window=window,
            cu_seq_lens_q=torch.tensor([0, 1]),
            cu_seq_lens_k=torch.tensor([0, n]),
            max_length_q=1,
            max_length_k=n,
        )
        torch.testing.assert_close(found[:, i : i + 1], one, rtol=1e-12, atol=1e-12)


def test_what_it_cannot_do_is_refused() -> None:
    docs = documents()
    with pytest.raises(ValueError, match="softcap"):
        packed_logits(build(Gemma2Config(**SHAPE), "eager"), docs)
    llama = build(CONFIGS["llama"])
    with pytest.raises(ValueError, match="packed_inputs"), packed_attention(llama):
        llama(input_ids=docs[0][None])
    dropping = build(LlamaConfig(**SHAPE, attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match="attention_dropout"):
        packed_logits(dropping, docs)
    assert dropping.config._attn_implementation == "sdpa"
    chunked = LlamaConfig(**SHAPE)
    chunked.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        packed_logits(build(chunked), docs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "width", "value_width"), [(4, 64, 64), (3, 128, 128), (1, 80, 48), (8, 256, 256)]
)
def test_the_kernel_equals_decoding(
    dtype: torch.dtype, window: int | None, heads: int, width: int, value_width: int
) -> None:
    torch.manual_seed(0)
    size, lengths = 391, torch.tensor([391, 1, 128, 129, 17], dtype=torch.int32, device="cuda")
    k, v = (
        torch.randn(len(lengths), 2, size, n, device="cuda", dtype=dtype)
        for n in (width, value_width)
    )
    q = torch.randn(len(lengths), 2 * heads, width, device="cuda", dtype=dtype)
    found = decode_attention(q, k, v, lengths, 0.1, window)
    expected = decode(*(x.float() for x in (q, k, v)), lengths, size, 0.1, window)
    assert relative(found.float(), expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shared", [False, True])
def test_flash_equals_the_reference(window: int | None, shared: bool) -> None:
    torch.manual_seed(0)
    lengths_q = torch.tensor([300, 7, 1, 129, 64])
    lengths_k = lengths_q + (torch.tensor([0, 300, 40, 0, 1000]) if shared else 0)
    bounds_q, bounds_k = (
        torch.nn.functional.pad(n.cumsum(0), (1, 0)).to("cuda", torch.int32)
        for n in (lengths_q, lengths_k)
    )
    given = {
        "scaling": 0.1,
        "sliding_window": window,
        "cu_seq_lens_q": bounds_q,
        "cu_seq_lens_k": bounds_k,
        "max_length_q": int(lengths_q.max()),
        "max_length_k": int(lengths_k.max()),
    }
    sizes = [(8, int(lengths_q.sum())), (2, int(lengths_k.sum())), (2, int(lengths_k.sum()))]
    tensors = [
        torch.randn(1, heads, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads, n in sizes
    ]
    module = torch.nn.Module()
    found, _ = packed(module, *tensors, None, **given)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    expected, _ = packed(module, *exact, None, **given)
    assert relative(found.float(), expected) < 1e-2
    with torch.no_grad():
        assert relative(packed(module, *tensors, None, **given)[0].float(), expected) < 1e-2
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((found.float() * weight).sum(), tensors)
    want = torch.autograd.grad((expected * weight).sum(), exact)
    for a, b in zip(got, want, strict=True):
        assert relative(a.float(), b) < 2e-2
