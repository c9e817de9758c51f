"""A random two-layer Llama with its own tokenizer, and small local data in the hub's schemas."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from matryoshka_lora.core.adapter import adapter_layers, add_adapters
from matryoshka_lora.core.diagonals import matryoshka_diagonal
from matryoshka_lora.core.rules import AdapterView
from matryoshka_lora.core.spec import AdapterSpec

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("apples", "books", "coins", "drums", "eggs", "flags")
RANK, TRAIN_RANKS = 4, (1, 2, 4)


def word_problems(count: int, seed: int) -> list[dict[str, str]]:
    """Rows in the schema of openai/gsm8k."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), *rng.sample(range(2, 40), 2)
        rows.append(
            {
                "question": f"{name} has {a} {thing} and finds {b} more. How many {thing}?",
                "answer": f"{name} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}",
            }
        )
    return rows


def choice_questions(count: int, seed: int) -> list[dict]:
    """Rows in the schema of allenai/ai2_arc; labels are letters or digits, choices 3 to 5."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        labels = list("ABCDE" if number % 3 else "12345")[: rng.choice((3, 4, 4, 5))]
        texts = [f"{rng.choice(NAMES)} and {rng.choice(THINGS)}"[: 5 + 3 * k] for k in range(5)]
        rows.append(
            {
                "id": f"q{number}",
                "question": f"Who keeps {rng.randint(2, 99)} {rng.choice(THINGS)} and what else?",
                "choices": {"text": texts[: len(labels)], "label": labels},
                "answerKey": rng.choice(labels),
            }
        )
    return rows


def write_jsonl(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> Path:
    """`folder`/gsm8k and `folder`/arc_challenge, train and test."""
    for split, count, seed in (("train", 12, 0), ("test", 7, 1)):
        write_jsonl(folder / "gsm8k" / f"{split}.jsonl", word_problems(count, seed))
        write_jsonl(folder / "arc_challenge" / f"{split}.jsonl", choice_questions(count, seed))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, no pad token, as Llama's and GPT's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [json.dumps(row) for row in word_problems(40, 2) + choice_questions(40, 2)]
    raw.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


def model(window: int = 512) -> LlamaForCausalLM:
    """Weights wide enough that no two logits tie, the same on every call."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.35,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def spec() -> AdapterSpec:
    p = matryoshka_diagonal(TRAIN_RANKS, RANK, "none")
    return AdapterSpec(RANK, "none", tuple(p.tolist()), trains_prefixes=False)


def view() -> AdapterView:
    """The spec alone, which is all that the rules but `global` need."""
    return AdapterView(spec())


def adapt(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with random adapters that change its answers."""
    add_adapters(base, spec(), ["q_proj", "v_proj", "up_proj", "down_proj"])
    generator = torch.Generator().manual_seed(1)
    for layer in adapter_layers(base).values():
        layer.lora_B.data.normal_(0, 0.5, generator=generator)
    return base
