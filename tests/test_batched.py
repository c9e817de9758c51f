"""The batched engine against lm-eval's HF backend, on a tiny random model in float64."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from matryoshka_lora.core.adapter import (
    adapter_layers,
    adapter_spec,
    adapter_view,
    add_adapters,
    diagonal,
    set_importance,
    use_factors,
)
from matryoshka_lora.core.diagonals import matryoshka_diagonal
from matryoshka_lora.core.rules import AdapterView, read
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.evaluation.engines import make_engine
from matryoshka_lora.evaluation.engines.batched import attention_trial
from matryoshka_lora.evaluation.engines.batched import engine as batched
from matryoshka_lora.evaluation.engines.batched.attention_trial import attention_agrees
from matryoshka_lora.evaluation.engines.batched.diagonal_table import DiagonalTable, live_ranks
from matryoshka_lora.evaluation.engines.batched.engine import BatchedEngine
from matryoshka_lora.evaluation.engines.batched.factors import compute_factors
from matryoshka_lora.evaluation.engines.batched.kv_cache import KVShape, kv_shapes
from matryoshka_lora.evaluation.engines.batched.model_runner import captured_rows
from matryoshka_lora.evaluation.engines.batched.scheduler import Limits, Scheduler, group_requests
from matryoshka_lora.evaluation.engines.hf import HFEngine
from matryoshka_lora.evaluation.engines.protocol import Output, Point, Request
from matryoshka_lora.ops.attention import packed_attention
from matryoshka_lora.ops.graphs import Graphs

RANK = 16  # the ranks below are computed with 8 ranks of the factors, or with all
TEXT = (
    "Question: Tom has 12 apples and buys 7 more. How many apples does Tom have now?\n"
    "Answer: Tom has 12 + 7 = <<12+7=19>>19 apples.\n#### 19\n\nQuestion: A train runs 60 miles in "
    "an hour. How far does it run in 3 hours?\nAnswer: It runs 60 * 3 = 180 miles. Über! \u4f60\n"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}

# Keys and values of different widths.
LATENT = SHAPE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than operations this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")


def build(
    tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig, gated: bool = False
) -> PreTrainedModel:
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    p_full = matryoshka_diagonal([1, 2, RANK], RANK, "none")
    spec = AdapterSpec(RANK, "none", tuple(p_full.tolist()), False, gated=gated)
    linear = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in ("q_proj", "v_proj", "o_proj", "down_proj") if name in linear]
    add_adapters(model, spec, targets)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.4)
        if gated:
            torch.nn.init.uniform_(layer.lora_gate, 0.2, 2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.double()


def llama() -> LlamaConfig:
    return LlamaConfig(**SHAPE)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return build(tokenizer, llama())


def points(model: PreTrainedModel, factors: str = "trained") -> list[Point]:
    spec: AdapterSpec = adapter_spec(model)
    pairs = [(rank, rule) for rank in (1, 2, RANK) for rule in ("prefix", "trained")]
    if factors == "svd":
        pairs = [(rank, "svd") for rank in (1, 2, 3)]
    return [Point(0, "base", factors, torch.zeros(RANK))] + [
        Point(rank, rule, factors, read(AdapterView(spec), rank, rule).p) for rank, rule in pairs
    ]


def generation(
    tokenizer: PreTrainedTokenizerFast, doc: int, text: str, until: Sequence[str], most: int
) -> Request:
    options = {"until": list(until), "max_gen_toks": most}
    return Request(
        kind="generate",
        doc_id=doc,
        context=tuple(tokenizer.encode(text)),
        target=(),
        until=(*until, tokenizer.eos_token),
        max_new_tokens=most,
        instance=Instance("generate_until", {}, (text, options), 0, ("test", doc, 1)),
    )


def likelihood(tokenizer: PreTrainedTokenizerFast, doc: int, text: str, target: str) -> Request:
    # As in the harness, spaces at the end of the context belong to the target.
    target, text = text[len(text.rstrip()) :] + target, text.rstrip()
    whole, head = tokenizer.encode(text + target), tokenizer.encode(text)
    return Request(
        kind="loglikelihood",
        doc_id=doc,
        context=tuple(head),
        target=tuple(whole[len(head) :]),
        until=(),
        max_new_tokens=0,
        instance=Instance("loglikelihood", {}, (text, target), 0, ("test", doc, 1)),
    )


def prompts(n: int) -> list[str]:
    """Of very different lengths, from one token on."""
    return [TEXT[(5 * i) % 40 :][: 1 + (37 * i) % 230] for i in range(n)]


@pytest.fixture(autouse=True)
def late_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where answers go on past their end until the host reads their tokens."""
    monkeypatch.setitem(batched.STEPS_PER_LAUNCH, "cpu", 4)
    monkeypatch.setitem(batched.PIPELINE_DEPTH, "cpu", 1)


def answers(
    found: Iterator[tuple[int, Output]], jobs: Sequence[tuple[Point, Request]]
) -> list[Output]:
    pairs = list(found)
    assert sorted(index for index, _ in pairs) == list(range(len(jobs)))
    return [output for _, output in sorted(pairs, key=lambda pair: pair[0])]


def check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    jobs: Sequence[tuple[Point, Request]],
    batch_size: int = 8,
    **limits: int,
) -> list[Output]:
    """The engine's outputs, which are the reference engine's."""
    expected = answers(HFEngine(model, tokenizer, batch_size).run(jobs), jobs)
    found = answers(BatchedEngine(model, tokenizer, **limits).run(jobs), jobs)
    for a, b in zip(found, expected, strict=True):
        assert (a.text, a.is_greedy) == (b.text, b.is_greedy)
        assert a.logprob == pytest.approx(b.logprob, rel=1e-6)
    return found


@pytest.mark.parametrize("limits", [(1, 12), (12, 1)])
def test_an_answer_of_one_token_stays_in_its_row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    limits: tuple[int, int],
) -> None:
    """Its first token completes it, and the next steps take it along until the host has looked."""
    texts = {1: TEXT[:150], 12: TEXT[150:180]}
    requests = [generation(tokenizer, i, texts[n], [], n) for i, n in enumerate(limits)]
    # A point each, so that their order stays.
    jobs = list(zip(points(model)[1:3], requests, strict=True))
    check(model, tokenizer, jobs)


def test_generation_of_mixed_points(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        generation(tokenizer, i, text, ["Question:", "\n\n"], (1, 3, 20, 33)[i % 4])
        for i, text in enumerate(prompts(6))
    ]
    jobs = [(point, request) for point in points(model) for request in requests]
    texts = [output.text for output in check(model, tokenizer, jobs, max_rows=5, max_tokens=100)]
    assert len(set(texts)) > 20
    for steps, behind, limits in (
        (8, 0, {}),
        (8, 1, {"max_rows": 1}),
        (8, 1, {"max_rows": 5}),
        (8, 0, {"max_tokens": 1}),
        (1, 3, {"max_rows": 7, "max_tokens": 100}),
    ):
        monkeypatch.setitem(batched.STEPS_PER_LAUNCH, "cpu", steps)
        monkeypatch.setitem(batched.PIPELINE_DEPTH, "cpu", behind)
        one = BatchedEngine(model, tokenizer, **limits)
        assert [output.text for output in answers(one.run(jobs), jobs)] == texts


def test_parts_are_taken_when_there_is_room(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    requests = [generation(tokenizer, i, text, ["\n\n"], 5) for i, text in enumerate(prompts(6))]
    requests += [likelihood(tokenizer, i, prompts(3)[i], " 19") for i in (0, 1)]
    jobs = [(point, request) for point in points(model) for request in requests]
    taken = []

    def parts(size: int) -> Iterator[range]:
        for start in range(0, len(jobs), size):
            taken.append(start)
            yield range(start, min(start + size, len(jobs)))

    engine = BatchedEngine(model, tokenizer, max_rows=4, max_tokens=100)
    expected = check(model, tokenizer, jobs)
    for size in (1, 3, len(jobs)):
        taken.clear()
        run = engine.run(jobs, parts(size))
        first = next(run)
        # Those that fit, and the part that showed that no more do.
        assert len(taken) * size <= 4 + 2 * size
        found = answers((answer for some in ([first], run) for answer in some), jobs)
        assert [o.text for o in found] == [o.text for o in expected]
        assert len(taken) == -(-len(jobs) // size)
    assert list(engine.run(jobs, iter([]))) == []
    hf = HFEngine(model, tokenizer, 2)
    assert [o.text for o in answers(hf.run(jobs, parts(3)), jobs)] == [o.text for o in expected]
    few = [range(2, 4), range(9, 10)]
    for one in (engine, hf):
        assert sorted(index for index, _ in one.run(jobs, iter(few))) == [2, 3, 9]


def test_replayed_steps_take_further_rows_along(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs a replay calls the step again: in fixed places, for all rows or fewer."""
    sizes = []
    layer = next(iter(adapter_layers(model).values()))

    def capture(function: Callable[[], torch.Tensor], pool: object) -> Callable[[], torch.Tensor]:
        rank = len(layer.lora_A)
        sizes.append((function.args[1], rank))  # type: ignore[attr-defined]

        def replay() -> torch.Tensor:
            # A graph would go on with what it was captured with.
            assert len(layer.lora_A) == layer.p.shape[-1] == rank
            return function()

        return replay

    monkeypatch.setattr(batched, "Graphs", lambda: Graphs(capture))
    requests = [
        generation(tokenizer, i, text, ["\n\n"], (3, 20, 33)[i % 3])
        for i, text in enumerate(prompts(9))
    ]
    jobs = [(point, request) for point in points(model) for request in requests]
    expected = answers(BatchedEngine(model, tokenizer, max_rows=40).run(jobs), jobs)
    engine = BatchedEngine(model, tokenizer, max_rows=40, cuda_graphs=True)
    assert not engine.cuda_graphs, "there is no GPU"
    engine.cuda_graphs = True
    found = answers(engine.run(jobs), jobs)
    assert [output.text for output in found] == [output.text for output in expected]
    assert set(sizes) <= set(product((10, 20, 40), (8, RANK)))
    assert len(sizes) == len(set(sizes)) > 1 and {rank for _, rank in sizes} == {8, RANK}


@pytest.mark.parametrize(
    ("used", "captured"),
    [(1, 85), (85, 85), (86, 170), (170, 170), (171, 339), (340, 677), (678, 1353), (1353, 1353)],
)
def test_captured_steps_have_one_size_an_octave(used: int, captured: int) -> None:
    assert captured_rows(used, 1353) == captured
    assert captured_rows(min(used, 40), 40) == 40


def test_ranks_that_are_left_out_are_zero_in_the_diagonal() -> None:
    table = torch.zeros(6, 20)
    for row, rank in enumerate((0, 1, 8, 9, 17, 20)):
        table[row, :rank] = 2.0
    table[1, 0], table[4, 3] = -1.0, 0.0
    assert live_ranks(table[None]).tolist() == [8, 8, 8, 16, 20, 20]
    assert live_ranks(table[None, :3, :4]).tolist() == [4, 4, 4]


def test_parameters_are_narrowed_along_their_rank(model: PreTrainedModel) -> None:
    """By their role, whatever their order and number: a gate has the rank as its only axis."""
    layers = list(adapter_layers(model).values())
    roles = ("lora_A", "lora_B", "lora_gate")
    for layer in layers[1:]:
        layer.lora_gate = torch.nn.Parameter(torch.rand(RANK))
    before = [
        {r: x.data for r in roles if (x := getattr(layer, r, None)) is not None} for layer in layers
    ]
    p = [layer.p for layer in layers]
    model.float()
    for layer, data in zip(layers, before, strict=True):  # as adapters are held, in float64 here
        layer.lora_A.data, layer.lora_B.data = data["lora_A"], data["lora_B"]
    with compute_factors(model) as factors:
        assert factors.gated
        for rank in (RANK, 4, 8):
            factors.narrow(rank)
            for layer, data in zip(layers, before, strict=True):
                layer.p = torch.zeros(1, 7, rank)
                assert torch.equal(layer.lora_A, data["lora_A"][:rank].float())
                assert torch.equal(layer.lora_B, data["lora_B"][:, :rank].float())
                if "lora_gate" in data:
                    assert torch.equal(layer.lora_gate, data["lora_gate"][:rank])
    for layer, data, own in zip(layers, before, p, strict=True):
        assert all(torch.equal(getattr(layer, role), x) for role, x in data.items())
        assert layer.lora_A.dtype == torch.float64 and layer.p is own


def test_each_layer_multiplies_its_gate(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(tokenizer, llama(), gated=True)
    requests = [generation(tokenizer, i, text, [], 9) for i, text in enumerate(prompts(3))]
    requests += [likelihood(tokenizer, i, text, " 19") for i, text in enumerate(prompts(3))]
    jobs = [(point, request) for point in points(model) for request in requests]
    check(model, tokenizer, jobs)


@pytest.mark.parametrize("kept", [False, True])
def test_the_diagonal_is_rounded_where_the_layer_rounds_it(
    tokenizer: PreTrainedTokenizerFast, kept: bool
) -> None:
    model = build(tokenizer, llama()).bfloat16()
    layers = list(adapter_layers(model).values())
    seen: set[torch.dtype] = set()
    for layer in layers:
        layer.float32_diagonal = kept
        layer.register_forward_pre_hook(lambda layer, x: seen.add(layer.p.dtype))
    jobs = [(point, likelihood(tokenizer, 0, TEXT[:30], " 19")) for point in points(model)]
    jobs += [(point, generation(tokenizer, 1, TEXT[:30], [], 3)) for point in points(model)]
    list(BatchedEngine(model, tokenizer).run(jobs))
    assert seen == {torch.float32 if kept else torch.bfloat16}


def test_groups_leave_their_queue_when_they_are_started(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [text.rstrip() for text in prompts(4)]
    requests = [generation(tokenizer, i, text, [], 5) for i, text in enumerate(texts)]
    requests += [likelihood(tokenizer, i, texts[i], " 19") for i in (2, 2, 3)]
    requests.append(likelihood(tokenizer, 9, TEXT[3:90], " 19"))
    base = points(model)[0]
    groups = group_requests([(base, request) for request in requests], range(8), {base: 0})
    assert [(g.generate, g.scored) for g in groups] == [
        (0, []),
        (1, []),
        (2, [4, 5]),
        (3, [6]),
        (None, [7]),
    ]
    limits = Limits(max_rows=2, max_tokens=1000, logits_bytes=10**9)
    scheduler = Scheduler([groups], requests, limits, 8)
    assert scheduler.busy
    scheduler.take(None)
    assert (
        [g.scored for g in scheduler.next_scoring()]
        == [[7]]
        == [g.scored for g in scheduler.next_scoring()]
    )
    lengths = [len(g.context) for g in scheduler.waiting]
    assert lengths == sorted(lengths, reverse=True)
    first = scheduler.next_waiting(rows=2, active=0)
    assert len(first) == 2
    scheduler.started(scheduler.waiting, first)
    assert len(scheduler.waiting) == 2 and scheduler.next_waiting(rows=9, active=8) == []
    scheduler.started(scheduler.scoring, scheduler.next_scoring())
    scheduler.halve(first, rows=2)
    assert list(scheduler.waiting)[:2] == first and (limits.max_rows, limits.max_tokens) == (1, 500)


def test_engines_by_name(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"batch_size": 2, "cuda_graphs": False, "lockstep": False}
    assert isinstance(make_engine("hf", model, tokenizer, **options), HFEngine)
    assert isinstance(make_engine("batched", model, tokenizer, **options), BatchedEngine)
    with pytest.raises(ValueError, match="'vllm' is unknown; allowed: batched, hf"):
        make_engine("vllm", model, tokenizer, **options)


def test_principal_factors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    requests = [generation(tokenizer, i, text, [], 9) for i, text in enumerate(prompts(3))]
    jobs = [(point, request) for point in points(model, "svd") for request in requests]
    with use_factors(model, "svd"):
        check(model, tokenizer, jobs)


@pytest.mark.parametrize("gated", [False, True])
def test_a_diagonal_for_each_layer(
    tokenizer: PreTrainedTokenizerFast, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among points whose layers share one, which are prefilled as if they were alone."""
    model = build(tokenizer, llama(), gated)
    if gated:
        generator = torch.Generator().manual_seed(0)
        names = adapter_layers(model)
        set_importance(model, {name: torch.rand(RANK, generator=generator) for name in names})
    factors = "trained" if gated else "svd"
    own = [
        Point(rank, "global", reading.factors, reading.p)
        for rank in (1, 2)
        for reading in [read(adapter_view(model), rank, "global")]
    ]
    shared = points(model, factors)
    requests = [generation(tokenizer, i, text, [], 9) for i, text in enumerate(prompts(4))]
    requests += [likelihood(tokenizer, i, text, " 19") for i, text in enumerate(prompts(2))]
    jobs = [(point, request) for request in requests for point in (own[0], *shared, own[1])]
    widths = set()
    apply = DiagonalTable.apply

    def applied(self: DiagonalTable, chosen: torch.Tensor, rank: int | None = None) -> None:
        widths.add(len(chosen))
        apply(self, chosen, rank)

    monkeypatch.setattr(DiagonalTable, "apply", applied)
    with use_factors(model, factors):
        check(model, tokenizer, jobs, max_rows=5, max_tokens=300)
        assert widths == {1, len(adapter_layers(model))}
        widths.clear()
        check(model, tokenizer, [job for job in jobs if job[0] in shared])
        assert widths == {1}


def test_ends_of_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop strings at every place of an answer, also within tokens, and the end of text."""
    base, texts = points(model)[0], prompts(5)
    free = [(base, generation(tokenizer, i, text, [], 24)) for i, text in enumerate(texts)]
    plain = [o.text for o in check(model, tokenizer, free)]
    jobs = []
    for i, (text, answer) in enumerate(zip(texts, plain, strict=True)):
        stops = [answer[k : k + n] for k in (0, 1, 7, len(answer) - 2) for n in (1, 2, 5)]
        jobs += [(base, generation(tokenizer, i, text, [s], 24)) for s in stops if s]
        jobs.append((base, generation(tokenizer, i, text, stops[5:8], 24)))
    found = [o.text for o in check(model, tokenizer, jobs, 1, max_rows=7)]
    assert "" in found
    # The first token of an answer as the end of text, and one that comes later.
    with diagonal(model, base.p):
        context = torch.tensor([free[0][1].context])
        ids = model.generate(context, max_new_tokens=24)[0, context.shape[1] :].tolist()
    for place in (0, 11):
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[place]]
        cut = [o.text for o in check(model, tokenizer, free)]
        assert cut[0] == tokenizer.decode(ids[: ids.index(ids[place]) + 1]) != plain[0]


def test_likelihoods_share_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    endings = [" 19", " 180 miles", "!", "!", " Tom has 12 apples and buys 7 more."]
    requests = []
    for i, text in enumerate(prompts(5)):
        requests += [likelihood(tokenizer, i, text, e) for e in endings[: 1 + i]]
        requests.append(generation(tokenizer, i, text, ["\n"], 12))
        requests.append(generation(tokenizer, i, text, ["1"], 5))
    jobs = [(point, request) for point in points(model)[:4] for request in requests]
    check(model, tokenizer, jobs, max_rows=3, max_tokens=150)
    scored = [job for job in jobs if job[1].kind == "loglikelihood"]
    check(model, tokenizer, scored, max_tokens=150)
    # Each context goes through the model once, and with it no padding.
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: tokens.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    answers(BatchedEngine(model, tokenizer).run(scored), scored)
    contexts = {(point, request.context) for point, request in scored}
    endings = sum(len(request.target) - 1 for _, request in scored)
    # The first forward is one token that tells what the layers keep of it.
    assert sum(tokens[1:]) == sum(len(context) for _, context in contexts) + endings


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, sliding_window=6),
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
        Gemma3TextConfig(
            **SHAPE,
            sliding_window=7,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention"],
        ),
        DeepseekV3Config(**LATENT),
    ],
    ids=["mistral", "qwen2", "gemma3", "deepseek_v3"],
)
def test_other_models(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(tokenizer, config)
    requests = []
    for i, text in enumerate(prompts(4)):
        requests.append(generation(tokenizer, i, text, [], 10))
        requests += [likelihood(tokenizer, i, text, e) for e in (" 19", "\nAnswer: 7 apples")]
    jobs = [(point, request) for point in points(model)[:3] for request in requests]
    check(model, tokenizer, jobs, max_rows=5, max_tokens=120)


def test_one_document(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for point in points(model)[:2]:
        check(model, tokenizer, [(point, generation(tokenizer, 0, "Question", [], 5))])
        check(model, tokenizer, [(point, likelihood(tokenizer, 0, "Question", " 19"))])
    assert list(BatchedEngine(model, tokenizer).run([])) == []


@pytest.mark.parametrize("behind", [0, 2])
def test_out_of_memory_halves(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    behind: int,
) -> None:
    monkeypatch.setitem(batched.PIPELINE_DEPTH, "cpu", behind)
    requests = [generation(tokenizer, i, text, ["a"], 20) for i, text in enumerate(prompts(9))]
    requests += [likelihood(tokenizer, i, text, " 19") for i, text in enumerate(prompts(12))]
    jobs = [(point, request) for point in points(model)[:3] for request in requests]
    expected = answers(BatchedEngine(model, tokenizer).run(jobs), jobs)
    forward = model.model.layers[1].forward

    def limited(hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
        # Prefills of more than 300 tokens fail, and steps of more than 6 rows.
        most = 6 if kwargs.get("kv_lengths") is not None else 300
        if hidden.shape[1] > most:
            raise torch.OutOfMemoryError("simulated")
        return forward(hidden, **kwargs)

    monkeypatch.setattr(model.model.layers[1], "forward", limited)
    engine = BatchedEngine(model, tokenizer, max_rows=24)
    with caplog.at_level(logging.WARNING):
        found = answers(engine.run(jobs), jobs)
    assert [o.text for o in found] == [o.text for o in expected]
    assert [o.logprob for o in found] == pytest.approx([o.logprob for o in expected], rel=1e-6)
    assert engine.limits.max_rows == 6 and engine.limits.max_tokens == 64
    assert "out of memory" in caplog.text

    def never(hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
        if hidden.shape[1] > 1:
            raise torch.OutOfMemoryError("simulated")
        return forward(hidden, **kwargs)

    monkeypatch.setattr(model.model.layers[1], "forward", never)
    with pytest.raises(ValueError, match="does not fit"):
        list(BatchedEngine(model, tokenizer).run(jobs))


def test_the_model_is_left_as_it_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    diagonals = {name: layer.p for name, layer in adapter_layers(model).items()}
    jobs = [
        (point, generation(tokenizer, i, text, [], 9))
        for point in points(model)
        for i, text in enumerate(prompts(3))
    ]
    # Abandoned half way.
    run = BatchedEngine(model, tokenizer, max_rows=2).run(jobs)
    next(run)
    assert torch.is_grad_enabled()
    run.close()
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, layer in adapter_layers(model).items():
        assert layer.p is diagonals[name]


def test_what_it_cannot_do_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="max_rows"):
        BatchedEngine(model, tokenizer, max_rows=0)
    model.generation_config.repetition_penalty = 1.1
    with pytest.raises(ValueError, match="repetition_penalty"):
        BatchedEngine(model, tokenizer)


def test_without_triton_decoding_is_slower_and_says_so(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_trial, "AVAILABLE", False)
    for dtype, agrees in ((torch.float32, True), (torch.bfloat16, False)):
        shapes = [KVShape((2, 8), (2, 8), dtype)]
        assert attention_agrees(model, shapes, model.device, decoding=True) == agrees
        assert ("Triton is not installed" in caplog.text) != agrees


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("graphs", [False, True])
def test_on_cuda(tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, graphs: bool) -> None:
    """In float64 the reference engine's answers; in bf16 as near to the exact likelihoods as it."""
    config = LlamaConfig(**(SHAPE | {"head_dim": 64, "num_attention_heads": 8}))
    model = build(tokenizer, config).to("cuda", dtype)
    requests = []
    for i, text in enumerate(prompts(20)):
        requests.append(generation(tokenizer, i, text, ["\n"], 30))
        requests += [likelihood(tokenizer, i, text, e) for e in (" 19", "\nAnswer: 7 apples")]
    # The base, rank 1 and all of R: computed with 8 ranks of the factors, and with all.
    chosen = [points(model)[i] for i in (0, 1, -1)]
    jobs = [(point, request) for point in chosen for request in requests]
    if dtype == torch.float64:
        check(model, tokenizer, jobs, max_rows=13, max_tokens=700, cuda_graphs=graphs)
        return
    with packed_attention(model):
        shapes = kv_shapes(model)
    for decoding in (False, True):
        assert attention_agrees(model, shapes, model.device, decoding)
    engine = BatchedEngine(model, tokenizer, max_rows=13, cuda_graphs=graphs)
    found = answers(engine.run(jobs), jobs)
    expected = answers(HFEngine(model, tokenizer, 8).run(jobs), jobs)
    scored = [i for i, (_, request) in enumerate(jobs) if request.kind == "loglikelihood"]
    same = [found[i].text == expected[i].text for i in range(len(jobs)) if i not in scored]
    assert sum(same) >= 0.5 * len(same)
    likelihoods = [jobs[i] for i in scored]
    exact = answers(HFEngine(model.double(), tokenizer, 8).run(likelihoods), likelihoods)
    ours, theirs = (
        sum(abs(side[i].logprob - x.logprob) for i, x in zip(scored, exact, strict=True))
        for side in (found, expected)
    )
    # Rounding makes both differ from the exact model, so neither by 0, about equally far.
    assert 0 < ours < 1.25 * theirs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_likelihoods_in_bf16_are_the_reference_engines_on_cuda(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Where both attend by the flash kernel: all else rounds alike, at SmolLM2-135M's widths."""
    widths = {"hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    model = build(tokenizer, LlamaConfig(**(SHAPE | widths | heads))).to("cuda", torch.bfloat16)
    requests = [
        likelihood(tokenizer, i, TEXT * (1 + i % 4) + text, ending)
        for i, text in enumerate(prompts(12))
        for ending in (" 19", "\nAnswer: 7 apples")
    ]
    jobs = [(points(model)[i], request) for i in (0, 1, -1) for request in requests]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        expected = answers(HFEngine(model, tokenizer, 8).run(jobs), jobs)
    found = answers(BatchedEngine(model, tokenizer).run(jobs), jobs)
    same = [a.logprob == pytest.approx(b.logprob) for a, b in zip(found, expected, strict=True)]
    # Some cards and versions may split a product of few rows otherwise.
    assert sum(same) > 0.9 * len(same)
