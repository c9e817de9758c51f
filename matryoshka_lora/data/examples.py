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
    """How many of the tokens are the prompt's, all of them at the most."""
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
    (`fully_masked`) is left out unless the config keeps it. What the tokenizer appends to every
    text by itself is left out: one end-of-text token ends each example. Raises UserError if no
    example has a label, or if the tokenizer has no end-of-text token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token, which ends every "
            'answer; give it one as "eos_token" in tokenizer_config.json'
        )
    pairs = texts(records, config)
    appended = _appended(tokenizer, pairs[0][0])

    def encode(texts: list[str]) -> list[list[int]]:
        # Not verbose: the tokenizer would warn of texts beyond the model's window; they are
        # truncated and counted below.
        encoded = tokenizer(texts, verbose=False)["input_ids"]
        return [ids[: len(ids) - len(appended)] for ids in encoded]

    prompts = encode([prompt for prompt, _ in pairs])
    if joint(config):
        whole = encode([prompt + answer for prompt, answer in pairs])
    else:
        answers = [answer for _, answer in pairs]
        apart = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
        whole = [[*p, *a] for p, a in zip(prompts, apart, strict=True)]
    examples, truncated, masked = [], 0, 0
    for number, (prompt_ids, whole_ids) in enumerate(zip(prompts, whole, strict=True), 1):
        truncated += len(whole_ids) + 1 > config.max_length
        tokens = (*whole_ids, eos)[: config.max_length]
        example = Example(tokens, min(len(prompt_ids), len(tokens)), number)
        masked += example.labels == 0
        if example.labels or config.keep_masked:
            examples.append(example)
    counts = {
        "records": len(records),
        "used": len(examples),
        "truncated": truncated,
        "fully_masked": masked,
    }
    logger.info(
        "%d records: %d used, %d truncated to %d tokens, %d %s no label remained",
        *(len(records), len(examples), truncated, config.max_length, masked),
        "kept although" if config.keep_masked else "left out because",
    )
    if masked == len(records):
        raise UserError(
            f"none of {len(records)} examples keeps a label within "
            f"dataset.max_length={config.max_length} tokens; raise it"
        )
    return examples, counts


def _appended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The special tokens that the tokenizer puts behind every text by itself; often none.

    text: any. A warning names the tokens. Raises UserError where they cannot be told from those of
    the text.
    """
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    added = tokenizer(text, verbose=False)["input_ids"]
    starts = [i for i in range(len(added)) if added[i : i + len(plain)] == plain]
    if not plain or not starts:
        raise UserError(
            f"the tokenizer makes other tokens of {text[:40]!r} where it adds special ones, so "
            "that those that it adds cannot be left out; use one that adds them before or behind "
            "the text"
        )
    appended: list[int] = added[starts[0] + len(plain) :]
    if appended:
        logger.warning(
            "the tokenizer appends %s to every text: training leaves that out and ends each "
            "example in one end-of-text token, but the harness's prompts in evaluation keep it; "
            "for the same prompts in both, save the tokenizer with add_eos_token=false",
            "".join(tokenizer.convert_ids_to_tokens(appended)),
        )
    return appended
