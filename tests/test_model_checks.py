"""What training or evaluation would get wrong with a base model is refused before training."""

import dataclasses
import shutil
import sys

import pytest
import tiny_lm
import torch
from accelerate import Accelerator
from conftest import TARGETS, small_llama
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from matryoshka_lora.config import Config, ModelConfig
from matryoshka_lora.core.adapter import adapter_layers, add_adapters
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.data.examples import Example
from matryoshka_lora.data.loss import batch_loss
from matryoshka_lora.evaluation.tasks import load_tasks
from matryoshka_lora.inputs import Tokens
from matryoshka_lora.model_checks import check_model, probe
from matryoshka_lora.models import EMBEDDED, load_model, other_modalities, without_dropout
from matryoshka_lora.ops.attention import packed_attention

SPEC = AdapterSpec(4, "none", (1.0,) * 4, False)
ACCELERATOR = Accelerator(cpu=True)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BART = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}
DEEPSEEK = SHAPE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
PHI3 = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 1.0,
    },
}
DYNAMIC = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


def random_model(model_type: str, targets: list[str], **shape):
    """A random model with weights wide enough that attention matters."""
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **(tokens | shape))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    add_adapters(model, SPEC, targets)
    return model


def examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    return [
        Example(tuple(torch.randint(3, 64, (n,), generator=generator).tolist()), 2, number)
        for number, n in enumerate(lengths, 1)
    ]


def tokens(found: list[Example], tokenizer=None) -> Tokens:
    return Tokens(tokenizer, found, [], {}, False)


def config(**changes) -> Config:
    made = Config()
    made.adapter.rank = 4
    for name, value in changes.items():
        room, _, key = name.partition("_")
        setattr(getattr(made, room), key, value)
    return made


@torch.no_grad()
def check(model, packed=False, many_packed=False, many_padded=False, decodes=False) -> None:
    many = {"many_packed": many_packed, "many_padded": many_padded, "decodes": decodes}
    probe(model, examples(9, 8), packed=packed, **many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_can_do_it_all_is_left_as_it_was(dtype):
    model = small_llama(dtype=dtype)
    add_adapters(model, SPEC, TARGETS)
    layers = adapter_layers(model)
    before = {name: (layer.p, layer.lora_A.clone()) for name, layer in layers.items()}
    attention, random = model.config._attn_implementation, torch.get_rng_state()
    check(model, packed=True, many_packed=True, many_padded=True, decodes=True)
    check_model(config(), model, tokens(examples(9, 8)), [], ACCELERATOR)
    assert model.config._attn_implementation == attention and not model.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, layer in layers.items():
        assert layer.p is before[name][0] and torch.equal(layer.lora_A, before[name][1])
        assert not layer._forward_pre_hooks


def test_a_model_that_sees_later_tokens_is_refused():
    """Padded rows and the harness's own engine would take it, and every loss would be wrong."""
    model = random_model("bert", ["query"], **SHAPE)
    with pytest.raises(UserError, match="BertLMHeadModel is not causal: .*use a causal language"):
        check(model)


def test_a_model_whose_logits_are_no_numbers_is_refused():
    model = random_model("llama", TARGETS, **SHAPE)
    model.model.norm.weight.data[:] = 3e38  # finite, and too large
    for packed in (False, True):
        with pytest.raises(UserError, match=r"not finite .* before any training: its weights are"):
            check(model, packed=packed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path, value):
    shutil.copytree(EMBEDDED, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.weight holds numbers that"):
        load_model(ModelConfig(path=str(tmp_path)), torch.device("cpu"))


def test_a_model_that_ignores_positions_is_refused_on_packed_rows():
    model = random_model("bart", ["q_proj", "v_proj"], **BART)
    with pytest.raises(UserError, match=r"alone.* set trainer\.packed=false eval\.engine=hf"):
        check(model, packed=True)
    check(model, many_padded=True)


def test_a_model_without_replaceable_attention_is_refused_on_packed_rows():
    model = random_model("bloom", ["query_key_value"], hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UserError, match=r"set trainer\.packed=false eval\.engine=hf"):
        check(model, packed=True)
    check(model, many_padded=True)


def test_lm_head_sees_kept_rows_only():
    model = small_llama()
    add_adapters(model, SPEC, ["q_proj", "lm_head"])
    check(model, packed=True, many_padded=True)  # one rank at a time, or all tokens
    with pytest.raises(UserError, match=r"adapter\.targets names lm_head, .*packed rows"):
        check(model, packed=True, many_packed=True)


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_a_layer_that_sees_tokens_in_another_order_is_refused(gate):
    """Also where a gate that starts at 0, as AdaLoRA's does, hides what the layer applied."""
    model = small_llama()
    add_adapters(model, dataclasses.replace(SPEC, gated=gate is not None), TARGETS)
    layers = adapter_layers(model)
    gates = {name: layer.lora_gate for name, layer in layers.items()}
    for own in gates.values():
        if own is not None:
            own.data.fill_(gate)
    check(model, packed=True, many_packed=True, many_padded=True)
    assert all(layer.lora_gate is gates[name] for name, layer in layers.items())
    name, layer = next((name, layer) for name, layer in layers.items() if "down_proj" in name)
    layer.register_forward_pre_hook(lambda layer, args: (args[0].flip(1),))
    layer.register_forward_hook(lambda layer, args, y: y.flip(1))
    with pytest.raises(UserError, match=rf"names down_proj, .*packed rows.*{name} and 0 more"):
        check(model, packed=True, many_packed=True)


def test_mla_hides_the_sequences_from_kv_b_proj():
    model = random_model("deepseek_v2", ["q_b_proj", "kv_b_proj", "o_proj"], **DEEPSEEK)
    with pytest.raises(UserError, match=r"adapter\.targets names kv_b_proj, .*padded rows"):
        check(model, many_padded=True)
    with pytest.raises(UserError, match=r"adapter\.targets names kv_b_proj, .*in decoding"):
        check(model, packed=True, many_packed=True, decodes=True)
    model = random_model("deepseek_v2", ["q_b_proj", "o_proj"], **DEEPSEEK)
    check(model, packed=True, many_packed=True, many_padded=True, decodes=True)


def test_attention_of_packed_rows_may_be_viewed():
    shape = SHAPE | {
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    }
    check(random_model("afmoe", ["q_proj", "o_proj"], **shape), packed=True, many_packed=True)


@pytest.mark.parametrize(
    ("model_type", "shape", "message"),
    [
        ("opt", OPT, r"record 2 has 33 tokens.*up to 32 only; set dataset\.max_length=32"),
        ("phi3", SHAPE | PHI3, r"original window of 16 tokens; set dataset\.max_length=16"),
        ("llama", SHAPE | DYNAMIC, r"original window of 16 tokens; set dataset\.max_length=16"),
    ],
)
def test_documents_beyond_the_positions_are_refused(model_type, shape, message):
    targets = ["o_proj" if model_type == "phi3" else "q_proj"]
    model = random_model(model_type, targets, **shape)
    allowed = 32 if model_type == "opt" else 16
    check_model(config(), model, tokens(examples(5, allowed)), [], ACCELERATOR)
    with pytest.raises(UserError, match=message):
        check_model(config(), model, tokens(examples(5, 33)), [], ACCELERATOR)


def test_tokens_beyond_the_embedding_are_refused():
    model = small_llama()
    add_adapters(model, SPEC, TARGETS)
    with pytest.raises(UserError, match="token 64, but the model's embedding has 64 rows"):
        check_model(config(), model, tokens([Example((3, 64, 5), 1)]), [], ACCELERATOR)


def test_what_evaluation_refuses_is_refused_first(tmp_path):
    task = load_tasks([("gsm8k", 0)], data_path=tiny_lm.write_data(tmp_path), limit=2)
    tokenizer, model = tiny_lm.tokenizer(), tiny_lm.adapt(tiny_lm.model())
    found = tokens([Example(tuple(range(3, 12)), 2, 1)], tokenizer)
    lm = check_model(config(), model, found, task, ACCELERATOR)
    assert task[0].requests(lm) and task[0]._lm is lm
    model.generation_config.repetition_penalty = 1.1
    with pytest.raises(UserError, match=r"repetition_penalty=1\.1.*use eval\.engine=hf"):
        check_model(config(), model, found, task, ACCELERATOR)
    check_model(config(eval_engine="hf"), model, found, task, ACCELERATOR)
    short = tiny_lm.adapt(tiny_lm.model(window=64))
    with pytest.raises(UserError, match=r"256 new tokens; allowed are 1 to 63"):
        check_model(config(), short, found, task, ACCELERATOR)


def test_a_task_whose_package_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(UserError, match="task ifeval needs a package that is not installed"):
        load_tasks([("ifeval", 0)])


def test_a_quantised_checkpoint_without_its_library_is_named(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise ImportError("Loading a GPTQ model requires gptqmodel\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match="not installed: Loading a GPTQ model requires gptqmodel$"):
        load_model(ModelConfig(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("opt", OPT | {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.5}),
        ("phi", SHAPE | {"resid_pdrop": 0.3, "embd_pdrop": 0.1}),
    ],
)
def test_dropout_is_switched_off_and_comes_back(model_type, shape, caplog):
    model = random_model(model_type, ["q_proj", "v_proj"], **shape).train()
    batch, p = examples(9, 8), torch.ones(4)
    with torch.no_grad(), without_dropout(model) as switched_off:
        with packed_attention(model):
            packed = [float(batch_loss(model, batch, p)) for _ in range(2)]
        padded = float(batch_loss(model, batch, p, packed=False))
        expected = float(batch_loss(model.eval(), batch, p, packed=False))
    assert packed[0] == packed[1] == pytest.approx(padded, rel=1e-5)
    assert padded == pytest.approx(expected, rel=1e-6)
    given = {value for name, value in shape.items() if "drop" in name}
    assert set(switched_off.values()) == given
    assert caplog.text.count("dropout is switched off") == 1
    model.train()
    with torch.no_grad():
        assert len({float(batch_loss(model, batch, p, packed=False)) for _ in range(4)}) > 1
    with without_dropout(small_llama()) as switched_off:
        assert not switched_off


def test_a_vision_tower_gets_no_adapters():
    shape = AutoConfig.for_model("gemma3")
    for part in (shape.text_config, shape.vision_config):
        part.num_hidden_layers, part.hidden_size, part.intermediate_size = 1, 48, 48
    shape.text_config.layer_types = ["full_attention"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    names = add_adapters(model, SPEC, ["q_proj"], without=other_modalities(model))
    assert names == ["model.language_model.layers.0.self_attn.q_proj"]
    assert other_modalities(small_llama()) == []
