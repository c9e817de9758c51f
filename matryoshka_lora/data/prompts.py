"""From a record to its text: for each dataset one function, record -> (prompt text, answer text).

To add a dataset, write its function here and add `configs/dataset/<name>.yaml`. In the style
`harness`, a dataset with `joint=True` has prompt and answer tokenised together, as lm-eval does, so
that a space between them belongs to the answer's first token. Otherwise they are tokenised apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matryoshka_lora.config import DatasetConfig

PromptFunction = Callable[[Mapping[str, str], str], tuple[str, str]]


@dataclass(frozen=True)
class Prompt:
    """How a dataset's records become text."""

    fields: tuple[str, ...]
    """The fields that a record must have, each a text that is not empty."""
    joint: bool
    """Whether prompt and answer are tokenised together in the style `harness`."""
    function: PromptFunction


PROMPTS: dict[str, Prompt] = {}


def prompt(
    *datasets: str, fields: tuple[str, ...], joint: bool
) -> Callable[[PromptFunction], PromptFunction]:
    """Register a prompt function for the datasets named."""

    def register(function: PromptFunction) -> PromptFunction:
        PROMPTS.update(dict.fromkeys(datasets, Prompt(fields, joint, function)))
        return function

    return register


@prompt("gsm8k", "arithmetic", fields=("question", "answer"), joint=True)
def gsm8k(record: Mapping[str, str], style: str) -> tuple[str, str]:
    """`harness`: the prompt of lm-eval's `gsm8k`. It ends in `Answer:`; the answer starts with " ".

    `paper`: the prompt of the paper's released code. It ends in a space, tokenised apart from the
    answer, so that evaluation asks at another token boundary than the model was trained on.
    """
    if style == "paper":
        return f"Question: {record['question']}\nAnswer: ", record["answer"]
    return f"Question: {record['question']}\nAnswer:", f" {record['answer']}"


@prompt("platypus", fields=("instruction", "output"), joint=False)
def platypus(record: Mapping[str, str], style: str) -> tuple[str, str]:
    """The Alpaca layout of Open-Platypus; the same in both styles."""
    context = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
    instruction = record["instruction"]
    return f"### Instruction:\n{instruction}\n\n{context}### Response:\n", record["output"]


def texts(records: Sequence[Mapping[str, Any]], config: DatasetConfig) -> list[tuple[str, str]]:
    """(prompt text, answer text) of each record."""
    return [PROMPTS[config.name].function(record, config.prompt) for record in records]


def joint(config: DatasetConfig) -> bool:
    """Whether prompt and answer are tokenised together, as lm-eval does."""
    return PROMPTS[config.name].joint and config.prompt == "harness"
