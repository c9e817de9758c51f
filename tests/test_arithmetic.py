"""The embedded default: the generated dataset, its harness task, the tiny model."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from matryoshka_lora.data.arithmetic import (
    HELD_OUT,
    TEMPLATES,
    TEST_SIZE,
    TRAIN_SIZE,
    generate,
    records,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = Path(str(files("matryoshka_lora"))) / "assets" / "tiny"
TASK = Path(str(files("matryoshka_lora"))) / "assets" / "tasks" / "arithmetic.yaml"
FINGERPRINT = "b81970867fbfb94bb2250c0f95cea699bb239759072abb36eb0cf588aa71dc88"
HASH_COMMAND = """
import hashlib, json
from matryoshka_lora.data.arithmetic import records
text = json.dumps([records("train"), records("test")], sort_keys=True)
print(hashlib.sha256(text.encode()).hexdigest())
"""


def pattern(text: str) -> re.Pattern[str]:
    """Matches whatever a template, or a sentence of one, can be filled to."""
    return re.compile(r"\w+".join(re.escape(part) for part in re.split(r"\{\w+\}", text)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def pretrain_tiny() -> ModuleType:
    spec = spec_from_file_location("pretrain_tiny", ROOT / "scripts" / "pretrain_tiny.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sizes_and_schema() -> None:
    train, test = records("train"), records("test")
    assert (len(train), len(test)) == (TRAIN_SIZE, TEST_SIZE) == (3200, 500)
    assert all(set(record) == {"question", "answer"} for record in train + test)


def test_data_is_the_pinned_one() -> None:
    text = json.dumps([records("train"), records("test")], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == FINGERPRINT


def test_data_does_not_depend_on_the_hash_seed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HASH_COMMAND],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "4242"},
    )
    assert done.stdout.strip() == FINGERPRINT


def test_a_longer_draw_only_adds_problems() -> None:
    assert generate("test", 40) == records("test")[:40]
    assert generate("train", 40, seed=1) != generate("train", 40, seed=0)


def test_train_and_test_share_no_problem() -> None:
    train = {r["question"] for seed in (0, 1) for r in generate("train", 5000, seed)}
    test = {r["question"] for seed in (0, 1) for r in generate("test", 2000, seed)}
    assert not train & test
    for split in ("train", "test"):
        assert len({r["question"] for r in records(split)}) == len(records(split))


def test_held_out_templates_are_a_fifth_and_only_in_test() -> None:
    assert len(HELD_OUT) * 5 == len(HELD_OUT) + len(TEMPLATES) >= 40
    shared = [pattern(text) for text, _ in TEMPLATES]
    held_out = [pattern(text) for text, _ in HELD_OUT]

    def made_from(questions: list[str], patterns: list[re.Pattern[str]]) -> list[bool]:
        return [any(p.fullmatch(question) for p in patterns) for question in questions]

    train, test = ([r["question"] for r in records(split)] for split in ("train", "test"))
    assert all(made_from(train, shared)) and not any(made_from(train, held_out))
    assert sum(made_from(test, held_out)) * 5 == len(test)
    assert sum(made_from(test, shared)) * 5 == len(test) * 4
    for texts, one in ((train, p) for p in shared):
        assert any(one.fullmatch(question) for question in texts), one.pattern
    assert all(any(p.fullmatch(question) for question in test) for p in held_out)


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_follow_from_their_own_steps(split: str) -> None:
    for record in records(split):
        *steps, last = record["answer"].split("\n")
        assert 1 <= len(steps) <= 3
        # Each step uses numbers of the question and earlier results; 2 is "doubled".
        known = {int(number) for number in re.findall(r"\d+", record["question"])} | {2}
        for step in steps:
            match = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step)
            assert match is not None, record
            left, right, result = (int(match[i]) for i in (1, 3, 4))
            assert {"+": left + right, "-": left - right, "*": left * right}[match[2]] == result
            assert {left, right} <= known and 1 <= result <= 200
            known.add(result)
        assert last == f"#### {result}"


@pytest.mark.parametrize(("split", "count"), [("validation", 1), ("train", -1)])
def test_bad_requests_are_refused(split: str, count: int) -> None:
    with pytest.raises(ValueError, match=split if count > 0 else "-1"):
        generate(split, count)  # type: ignore[arg-type]


def test_solutions_are_short(tokenizer: PreTrainedTokenizerBase) -> None:
    lengths = [
        len(tokenizer(" " + record["answer"], add_special_tokens=False)["input_ids"]) + 1
        for record in records("train")
    ]
    assert sum(lengths) / len(lengths) <= 40
    assert max(lengths) <= 64  # the task's max_gen_toks


def test_task_is_gsm8k_on_other_data() -> None:
    import lm_eval.tasks

    gsm8k = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    ours, theirs = (yaml.safe_load(path.read_text("utf-8")) for path in (TASK, gsm8k))
    assert ours.pop("task") == "arithmetic_word_problems"
    assert ours.pop("dataset_path") == "json" and ours.pop("num_fewshot") == 0
    assert set(ours.pop("dataset_kwargs")["data_files"]) == {"train", "test"}
    assert ours.pop("metadata") == {"version": 1.0}
    assert ours["generation_kwargs"].pop("max_gen_toks") == 64
    for key in ("task", "dataset_path", "dataset_name", "num_fewshot", "metadata"):
        theirs.pop(key)
    assert ours == theirs


def test_model_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 10e6
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.num_parameters() <= 2.5e6
    assert model.dtype == torch.float32
    card = (TINY / "README.md").read_text("utf-8")
    for fact in ("Data", "Training", "Hardware", "Final loss", "Apache-2.0", "pretrain_tiny.py"):
        assert fact in card


def test_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    text = "Question: Mia had 123 apples, 7 pens.\nAnswer: 12 + 3 = 15\n#### 15 é</s>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id and ids[0] != tokenizer.bos_token_id
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(" 123 apples")["input_ids"])
    assert tokens == ["Ġ1", "2", "3", "Ġapples"]


def test_model_was_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    sums = [(a, b) for a in range(12, 42, 3) for b in range(2, 32, 6)]
    prompts = [f"# Sums\n20 + 5 = 25\n{a} + {b} =" for a, b in sums]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=4,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
    right = [text.split("\n")[0] == f" {a + b}" for text, (a, b) in zip(texts, sums, strict=True)]
    assert sum(right) >= 0.9 * len(sums)


def test_corpus_has_no_template_and_not_the_layout(pretrain_tiny: ModuleType) -> None:
    text = "".join(itertools.islice(pretrain_tiny.corpus(0), 3000))
    sentences = {
        sentence
        for template, _ in TEMPLATES + HELD_OUT
        for sentence in (template, *re.split(r"(?<=[.?]) ", template))
        # "{n} had {a} {o}." is plain English, and random words may happen to form it.
        if sentence == template or len(re.findall(r"(?<![{\w])[A-Za-z]+(?!})", sentence)) >= 4
    }
    assert sum(sentence.endswith("?") for sentence in sentences) >= len(TEMPLATES + HELD_OUT)
    for sentence in sentences:
        assert not pattern(sentence).search(text), sentence
    assert not re.search(r"Question:|Answer:|#### *\d", text)


def test_tokenizer_is_remade_from_the_seed(
    pretrain_tiny: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert pretrain_tiny.train_tokenizer(0, len(tokenizer)).get_vocab() == tokenizer.get_vocab()
