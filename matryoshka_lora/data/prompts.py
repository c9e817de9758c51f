"""One function a dataset: record -> (prompt text, answer text).

To add a dataset, write its function here and add `configs/dataset/<name>.yaml`. With
`joint` prompt and answer are tokenised together in the style `harness`, as lm-eval does, so that a
space between them belongs to the answer's first token; otherwise they are tokenised apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

PromptFunction = Callable[[Mapping[str, str], str], tuple[str, str]]


@dataclass(frozen=True)
class Prompt:
    fields: tuple[str, ...]
    """What a record must have, as text."""
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
    """`harness`: lm-eval's own `gsm8k` prompt, which ends in `Answer:`; the space is the answer's.

    `paper`: the released code ends its prompt in a space, tokenised apart from the answer, so that
    the model is asked at a boundary it was not trained on.
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
