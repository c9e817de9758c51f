"""A quantised base: weights and gradients are QLoRA's, outputs its dequantised weights'."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import tiny_lm
import torch
from conftest import TARGETS, small_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_batched import check, generation, likelihood
from test_pipeline import records, run_here
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from matryoshka_lora import processes
from matryoshka_lora.config import Config, ModelConfig
from matryoshka_lora.core.adapter import adapter_layers, add_adapters, at_rank
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.data.examples import Example
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.export import export_merged, export_peft
from matryoshka_lora.loading import build_model, load_run, read_run
from matryoshka_lora.memory import estimate
from matryoshka_lora.models import EMBEDDED, decoder_layers, load_model
from matryoshka_lora.ops.quantized import QuantizedLinear, dequantize, quantize

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes, the extra quant, is not installed",
)
KINDS = ("nf4", "int8")
CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12)
RANK = 4
SPEC = AdapterSpec(RANK, "none", (1.0,) * RANK, trains_prefixes=False)
OF_TRANSFORMERS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama whose blocks have biases in part, as files."""
    found = tmp_path_factory.mktemp("llama")
    small_llama().save_pretrained(found)
    return found


def quantized(kind, dtype=torch.float32):
    model = small_llama(dtype=dtype)
    assert quantize(decoder_layers(model), kind, CPU) == 14
    return model


def of_transformers(folder, kind):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=OF_TRANSFORMERS[kind])


def loss_of(model):
    return model.train()(input_ids=TOKENS, labels=TOKENS).loss


def factors(layer):
    generator = torch.Generator().manual_seed(layer.in_features)
    return (
        0.1 * torch.randn(RANK, layer.in_features, generator=generator),
        0.1 * torch.randn(layer.out_features, RANK, generator=generator),
    )


def adapt(model):
    add_adapters(model, SPEC, TARGETS)
    for layer in adapter_layers(model).values():
        layer.lora_A.data, layer.lora_B.data = factors(layer)
    return model


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_transformers_quantises(folder, kind):
    own, other = quantized(kind), of_transformers(folder, kind)
    for name, layer in own.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(layer.weight, other.get_submodule(name).weight), name
    assert type(own.lm_head) is type(other.lm_head) is nn.Linear


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ["own", "bitsandbytes"])
def test_the_gradients_are_those_of_qlora(folder, kind, layers):
    """PEFT on the same quantised weights; also with bitsandbytes' own layers in the adapters."""
    ours = adapt(quantized(kind) if layers == "own" else of_transformers(folder, kind))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    theirs = get_peft_model(of_transformers(folder, kind), config)
    for module in theirs.modules():
        if hasattr(module, "lora_A"):
            A, B = factors(module)
            module.lora_A.default.weight.data, module.lora_B.default.weight.data = A, B
    losses = [loss_of(model) for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for name, layer in adapter_layers(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        for role in ("lora_A", "lora_B"):
            expected = getattr(other, role).default.weight.grad
            assert expected.any()
            torch.testing.assert_close(
                getattr(layer, role).grad,
                expected,
                rtol=1e-5,
                atol=1e-5 * float(expected.abs().max()),
            )


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_its_dequantised_weights_compute(kind, dtype):
    model, plain = quantized(kind, dtype), quantized(kind, dtype)
    dequantize(plain, dtype)
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
        # Alone, too: nothing depends on the batch.
        assert torch.equal(model(TOKENS[:1]).logits, plain(TOKENS[:1]).logits)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantised_weight_waits_for_the_backward_pass(kind):
    model = adapt(quantized(kind))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss_of(model)
    weights = {(layer.out_features, layer.in_features) for layer in adapter_layers(model).values()}
    assert kept and not weights & {tuple(shape) for shape in kept}
    assert not weights & {tuple(shape)[::-1] for shape in kept}


@needs_library
def test_gradients_after_an_evaluation_and_with_recomputed_activations():
    """bitsandbytes' own 4-bit layers lose theirs after an evaluation on some CPUs."""
    fresh, other = adapt(quantized("nf4")), adapt(quantized("nf4"))
    with torch.no_grad():
        other.eval()(TOKENS)
    other.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (fresh, other):
        loss_of(model).backward()
    for name, layer in adapter_layers(fresh).items():
        assert torch.equal(layer.lora_A.grad, other.get_submodule(name).lora_A.grad), name


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_scales_keep_their_dtype(kind):
    model = quantized(kind)
    before = [
        m.dequantized(torch.float32) for m in model.modules() if isinstance(m, QuantizedLinear)
    ]
    model.to(torch.bfloat16)
    after = [
        m.dequantized(torch.float32) for m in model.modules() if isinstance(m, QuantizedLinear)
    ]
    assert all(map(torch.equal, before, after))


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_read_the_same(kind):
    model, tokenizer = tiny_lm.model(), tiny_lm.tokenizer()
    quantize(decoder_layers(model), kind, CPU)
    model = tiny_lm.adapt(model).double()  # so that no rounding hides a difference
    plan = plan_points(tiny_lm.view(), [1, 4], ["prefix", "trained"], tiny_lm.TRAIN_RANKS)
    texts = [row["question"] for row in tiny_lm.word_problems(3, 3)]
    requests = [generation(tokenizer, i, text, ["\n\n"], 12) for i, text in enumerate(texts)]
    requests += [likelihood(tokenizer, i, text, " 12 apples") for i, text in enumerate(texts)]
    jobs = [(point, request) for point in plan.points for request in requests]
    found = check(model, tokenizer, jobs, batch_size=1)
    assert len({output.text for output in found}) > len(texts)


@needs_library
def test_a_run_on_a_quantised_base(tmp_path):
    """Trained, read, loaded and merged."""
    kind = "nf4"
    record = run_here(
        *(tmp_path, f"model.quantization={kind}", "trainer.lr=0.05", "trainer.effective_batch=8"),
        *("eval.ranks=[2]", "eval.rules=[trained]", "eval.limit=1"),
    )
    assert record.status == "finished" and record.config["model"]["quantization"] == kind
    assert "bitsandbytes" in record.phases[0]["versions"]
    (path,) = records(tmp_path)
    loaded = load_run(path.parent)
    assert all(isinstance(x.base, QuantizedLinear) for x in adapter_layers(loaded.model).values())
    for dtype in ("float32", "bfloat16"):
        export_merged(read_run(path.parent), 2, "trained", tmp_path / dtype, dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    with torch.no_grad(), at_rank(loaded.model, 2):
        found, expected = merged(TOKENS).logits, loaded.model(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    facts = json.loads((tmp_path / "bfloat16" / "provenance.json").read_text())
    assert facts["quantization"] == kind
    export_peft(read_run(path.parent), 2, "trained", tmp_path / "peft")
    for name, says in (("bfloat16", "the dequantised ones with"), ("peft", "in whole precision")):
        card = (tmp_path / name / "README.md").read_text()
        assert f"its base in {kind}," in card and says in card
    exact, rounded = (
        load_file(tmp_path / d / "model.safetensors") for d in ("float32", "bfloat16")
    )
    lost = torch.cat(
        [
            (rounded[f"{name}.weight"].float() - exact[f"{name}.weight"]).abs().flatten()
            for name in adapter_layers(loaded.model)
        ]
    )
    assert facts["rounding"]["max"] == float(lost.max()) > 0
    assert facts["rounding"]["mean"] == pytest.approx(float(lost.mean()), rel=1e-4)
    none = json.loads((tmp_path / "float32" / "provenance.json").read_text())["rounding"]
    assert (none["max"], none["share"]) == (0, 0)


def config_of(kind):
    config = Config()
    config.model.quantization = kind
    return config


def base_bytes(kind, dtype="float32"):
    config = config_of(kind)
    config.model.dtype = dtype
    shape = build_model(config, torch.device("meta"))
    return estimate(config, shape, [Example((1, 2, 3), 1)]).memory["base weights"]


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_the_dry_run_knows_the_memory_of_the_weights(kind):
    model = load_model(ModelConfig(quantization=kind), CPU)
    held, largest = 0, 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            scales = [module.scales]
            if kind == "nf4":  # without tables of 1 KiB
                scales = [module.scales.absmax, module.scales.state2.absmax]
            held += sum(scale.nbytes for scale in scales)
            largest = max(largest, module.in_features * module.out_features)
    held += sum(parameter.nbytes for parameter in model.parameters())
    assert base_bytes(kind) == pytest.approx(held + 4 * largest, rel=1e-3)


def test_the_dry_run_needs_no_library():
    whole = base_bytes(None)
    assert base_bytes("nf4") < base_bytes("int8") < whole
    assert base_bytes(None, "bfloat16") == whole / 2


@needs_library
def test_its_warning_of_a_missing_package_is_not_shown(caplog):
    name = "bitsandbytes.backends.cpu.ops"
    found = importlib.util.find_spec(name)
    text = "Failed to load CPU gemm_4bit_forward"
    assert found is not None and text in Path(found.origin).read_text()  # else there is none now
    logging.getLogger(name).warning("%s: no package", text)
    logging.getLogger(name).warning("another")
    assert caplog.messages == ["another"]


def test_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UserError, match=r"=nf4 needs bitsandbytes .*: pip install .*\[quant\]"):
        load_model(ModelConfig(quantization="nf4"), CPU)


@pytest.mark.parametrize(("method", "given"), [("gptq", "nf4"), ("bitsandbytes", None)])
def test_files_that_are_quantised_already_are_refused(tmp_path, method, given):
    content = json.loads((EMBEDDED / "config.json").read_text())
    content["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for name in ("model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).touch()
    config = ModelConfig(path=str(tmp_path), quantization=given)
    for device in ("meta", "cpu"):
        with pytest.raises(
            UserError, match=rf"are quantised already \({method}\); give the model in"
        ):
            load_model(config, torch.device(device))


def test_a_quantised_base_is_not_sharded(monkeypatch):
    monkeypatch.setattr(processes, "is_sharded", lambda accelerator: True)
    with pytest.raises(UserError, match="model.quantization=nf4 cannot be sharded"):
        processes.build_adapted_model(config_of("nf4"), None)
