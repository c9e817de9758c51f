"""Damaged and foreign files: one line that names the file, and the line in it."""

import errno
import json
import shutil

import pytest
import torch
import transformers
from conftest import small_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_records import record

from matryoshka_lora import export, loading
from matryoshka_lora.config import DatasetConfig, ModelConfig
from matryoshka_lora.core.adapter import add_adapters
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import CannotWrite, naming
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.core.storage import HEADER, check_layers, read_adapter, save_adapter
from matryoshka_lora.data.files import read_rows
from matryoshka_lora.data.records import load_records
from matryoshka_lora.evaluation.local_data import _read_split
from matryoshka_lora.identity import generation_digest, model_identity
from matryoshka_lora.models import EMBEDDED, load_model, load_tokenizer
from matryoshka_lora.runs.record import read_record, write_record
from matryoshka_lora.training.step_log import StepLog

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (rb'{"question": "a \ud800"}', r"not text at line 2: .*ud800.* is half a character"),
        (b"[" * 100_000, "not readable from line 2 on: it is nested too deeply"),
        (b"1" * 5000, "not readable from line 2 on: Exceeds the limit"),
        (b'{"a": 1, "a": 2}', "not readable from line 2 on: an object has the key 'a' twice"),
        (b"garbage", "not JSON at line 2: Expecting value"),
        (b"\xff", "not UTF-8 text at line 2: invalid start byte"),
    ],
)
def test_damaged_json_is_named_with_its_line(tmp_path, text, message):
    for name, data in (("x.jsonl", b'"\\ud83d\\ude00"\n' + text + b"\n"), ("x.json", b"\n" + text)):
        (tmp_path / name).write_bytes(data)
        here = message.replace("from line 2 on", "from line . on")
        with pytest.raises(UserError, match=rf"{tmp_path / name} is {here}"):
            read_rows(tmp_path / name)


@pytest.mark.parametrize("text", ["{no", "[1]"])
def test_a_damaged_generation_config_is_not_taken_for_none(tmp_path, text):
    shutil.copytree(EMBEDDED, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json is .*restore the files"):
        generation_digest(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("value", [5, ["5?"], {"x": 5}, 2**70])
def test_a_document_of_other_types_is_named_with_its_line(tmp_path, value):
    rows = [{"question": "5?", "answer": "#### 7"}] * 2 + [{"question": value, "answer": "7"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    with pytest.raises(UserError, match=r"test\.jsonl, line 3, field 'question': all documents"):
        _read_split(tmp_path, "test", {"question", "answer"})


def test_a_nested_value_of_another_type_is_named_with_its_line(tmp_path):
    rows = [{"choices": {"text": ["a"], "label": [label]}} for label in ("A", "B", 3, "D")]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"test\.jsonl, line 3, field 'choices': all documents"):
        _read_split(tmp_path, "test", {"choices"})


def cut(path):
    path.write_bytes(path.read_bytes()[:1_000_000])


def other_sizes(path):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"hidden_size": 96, "head_dim": 16}))


DAMAGES = {
    "config.json": [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"model_type": "t5"}'),
        lambda path: path.write_text('{"model_type": "llama", "hidden_size": "x"}'),
        lambda path: path.write_text('{"model_type": "llama", "num_attention_heads": 0}'),
        other_sizes,
    ],
    "model.safetensors": [cut, lambda path: path.write_bytes(bytes(range(256)) * 100)],
    "tokenizer.json": [lambda path: path.write_text("{")],
    "provenance.json": [lambda path: path.write_text("{")],
}


@pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for name, found in DAMAGES.items() for damage in found]
)
def test_a_damaged_base_model_is_named(tmp_path, name, damage):
    folder = tmp_path / "base"
    shutil.copytree(EMBEDDED, folder)
    damage(folder / name)
    config = ModelConfig(path=str(folder))
    with pytest.raises(UserError, match=rf"{folder}.*restore "):
        model_identity(config)
        load_tokenizer(config)
        load_model(config, CPU)


def layers(count):
    return lambda path: path.write_text(
        json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": count})
    )


def in_place(change):
    def damage(path):
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", layers(3), r"9 without a place \(model\.layers\.3\..*, \.\.\.\); restore"),
        ("config.json", layers(5), r"9 missing \(model\.layers\.4\..*, \.\.\.\); restore"),
        (
            "model.safetensors",
            in_place(lambda w: w.update({"model.norm.weight": w["model.norm.weight"][:3].clone()})),
            r"1 of another shape \(model\.norm\.weight\); restore",
        ),
        (
            "model.safetensors",
            in_place(lambda w: w.update({"model.norn.weight": w.pop("model.norm.weight")})),
            r"1 missing \(model\.norm\.weight\); 1 without a place \(model\.norn\.weight\);",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_named(tmp_path, name, damage, message, capfd):
    folder = tmp_path / "base"
    shutil.copytree(EMBEDDED, folder)
    damage(folder / name)
    with pytest.raises(UserError, match=rf"{folder}: its weights are not those .* {message}"):
        load_model(ModelConfig(path=str(folder)), CPU)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_buffers_and_tied_weights_in_a_file_are_no_mistake(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(EMBEDDED, folder)

    def as_saved_once(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        for layer in range(4):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    in_place(as_saved_once)(folder / "model.safetensors")
    load_model(ModelConfig(path=str(folder)), CPU)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    shape = transformers.GPTJConfig(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=4
    )
    transformers.GPTJForCausalLM(shape).save_pretrained(folder)
    old = {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.ones(())}
    in_place(lambda weights: weights.update(old))(folder / "model.safetensors")
    load_model(ModelConfig(path=str(folder)), CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, r"field 'model\.name' is missing"),
        ({"evaluation": {"finished": 5}}, r"field 'evaluation\.finished'.*list, got 5"),
        ({"evaluation": {"finished": [5]}}, r"field 'evaluation\.finished'.*string, got 5"),
        ({"evaluation": {"seconds": "x"}}, r"field 'evaluation\.seconds'.*got 'x'"),
        ({"evaluation": {"truncated_prompts": 3}}, r"field 'evaluation\.truncated_prompts'"),
    ],
)
def test_facts_that_other_code_relies_on_are_checked(tmp_path, change, message):
    path = tmp_path / "record.json"
    write_record(path, record())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"record\.json is not a valid run record: {message}"):
        read_record(path)


def adapted():
    model = small_llama()
    spec = AdapterSpec(2, "none", (1.0, 1.0), trains_prefixes=False)
    add_adapters(model, spec, ["q_proj"])
    return model


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"spec": {"p_full": ["a", "b"], "train_ranks": []}, "facts": {}}', "does not say"),
        (None, "not all numbers"),
    ],
)
def test_a_damaged_header_of_an_adapter(tmp_path, header, message):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapted())
    if header is None:
        spec = {"rank": 2, "scaling": "none", "p_full": [float("nan")] * 2, "train_ranks": []}
        header = json.dumps({"spec": {**spec, "trains_prefixes": False}, "facts": {}})
    save_file(load_file(path), path, {HEADER: header})
    with pytest.raises(UserError, match=f"{path} is no adapter of this project.*{message}"):
        read_adapter(path)


def test_renamed_tensors_are_found_without_weights(tmp_path):
    path, model = tmp_path / "adapter.safetensors", adapted()
    save_adapter(path, model)
    file = read_adapter(path)
    check_layers(path, file, model)
    for name in list(file.state):
        file.state[name.replace("layers.0", "layers.9")] = file.state.pop(name)
    with pytest.raises(UserError, match=f"{path} does not fit the model: 2 tensors missing"):
        check_layers(path, file, model)


def test_a_hub_that_is_out_of_reach_is_told_with_the_local_way():
    """Also for a finished run, which is identified by what the hub holds."""
    with pytest.raises(UserError, match=r"model some/base .* cannot be read.* model\.path=FOLDER"):
        model_identity(ModelConfig(name="some/base"))
    data = DatasetConfig(name="gsm8k", hub="some/data")
    with pytest.raises(UserError, match=r"some/data .* cannot be read.* dataset\.path=FOLDER"):
        load_records(data)


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UserError, match=f"device={device} cannot be used .*; allowed: cpu, cuda"):
        loading.device_of(device)


def test_a_full_disk_names_what_was_written(tmp_path):
    with pytest.raises(CannotWrite) as caught, naming(tmp_path / "x", "nothing is lost"):
        with open("/dev/full", "w") as file:
            file.write("x")
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'x'} (No space left on device); nothing is lost"
    )
    with pytest.raises(CannotWrite, match=f"{tmp_path / 'out'} .*os error 28"):
        with export._new_folder(tmp_path / "out"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


ENTRY = {"step": 0, "loss": 1.0, "tokens": 1, "label_tokens": 1, "seconds": 1.0}


@pytest.mark.parametrize("line", ["garbage", "[]", "{}", '{"step": 1}', "[" * 100_000])
def test_a_damaged_line_of_a_training_log(tmp_path, line):
    log = StepLog(tmp_path, 2, writes=False, on_step=print)
    log.path.write_text(f"{json.dumps(ENTRY)}\n{line}\n")
    log.start(1)
    log.path.write_text(f"{line}\n{json.dumps(ENTRY | {'step': 1})}\n")
    with pytest.raises(UserError, match=rf"{log.path} is damaged \(.* line 1.*force=true"):
        log.start(2)
