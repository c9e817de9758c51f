"""Examples: records as tokens, of which those of the answer are labels."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from matryoshka_lora.config import DatasetConfig
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.data.prompts import joint, texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A tokenised record. The tokens behind the prompt are the labels."""

    tokens: tuple[int, ...]
    """Of prompt, answer and end of text."""
    prompt_length: int
    """How many of the tokens are the prompt's."""
    record: int = 0
    """The number of the training record it was made from, counted from 1."""

    @property
    def labels(self) -> int:
        """How many tokens are labels. The first token never is one: nothing predicts it."""
        return len(self.tokens) - max(self.prompt_length, 1)


def tokenize(
    records: Sequence[Mapping[str, Any]], config: DatasetConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], dict[str, int]]:
    """The examples, and the counts `records`, `used`, `truncated` and `fully_masked`.

    An example longer than `max_length` tokens loses its end (`truncated`); one that keeps no label
    is left out (`fully_masked`). Raises UserError if no example is left, or if the tokenizer has
    no end-of-text token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-text token, which ends every answer")
    pairs = texts(records, config)
    # Not verbose: the tokenizer would warn of texts beyond the model's window; they are truncated
    # and counted below.
    prompts = tokenizer([prompt for prompt, _ in pairs], verbose=False)["input_ids"]
    if joint(config):
        whole = tokenizer([prompt + answer for prompt, answer in pairs], verbose=False)["input_ids"]
    else:
        answers = [answer for _, answer in pairs]
        apart = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
        whole = [[*p, *a] for p, a in zip(prompts, apart, strict=True)]
    examples, truncated, masked = [], 0, 0
    for number, (prompt_ids, whole_ids) in enumerate(zip(prompts, whole, strict=True), 1):
        tokens = (*whole_ids, eos)
        truncated += len(tokens) > config.max_length
        example = Example(tokens[: config.max_length], len(prompt_ids), number)
        if example.labels > 0:
            examples.append(example)
        else:
            masked += 1
    counts = {
        "records": len(records),
        "used": len(examples),
        "truncated": truncated,
        "fully_masked": masked,
    }
    logger.info(
        "%d records: %d used, %d truncated to %d tokens, %d left out because no label remained",
        *(len(records), len(examples), truncated, config.max_length, masked),
    )
    if not examples:
        raise UserError(
            f"none of {len(records)} examples keeps a label within "
            f"dataset.max_length={config.max_length} tokens; raise it"
        )
    return examples, counts
