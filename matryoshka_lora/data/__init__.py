"""Records -> prompt and answer text -> tokens and labels -> packed rows."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.config import DatasetConfig
from matryoshka_lora.core.errors import nearest
from matryoshka_lora.data import arithmetic
from matryoshka_lora.data.files import SUFFIXES, read_rows
from matryoshka_lora.data.prompts import PROMPTS

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Split = Literal["train", "test"]
# The split is part of the protocol, not of a run: every run holds out the same records.
VALIDATION_SEED = 0
# A label that torch's cross-entropy leaves out.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A tokenised record: the answer's tokens are the labels, the prompt is masked."""

    tokens: tuple[int, ...]
    prompt_length: int
    record: int = 0
    """Number of the training record it was made from, counted from 1."""

    @property
    def labels(self) -> int:
        """How many tokens carry a label (the first token of a row never does)."""
        return len(self.tokens) - max(self.prompt_length, 1)


@dataclass(frozen=True)
class PackedBatch:
    """Several examples in one row of T tokens, without padding."""

    tokens: Tensor
    """(1, T) token ids."""
    lengths: tuple[int, ...]
    """Tokens of each example; they sum to T."""
    label_rows: Tensor
    """(N,) the positions whose next token is a label."""
    labels: Tensor
    """(N,) those next tokens."""


def load_records(config: DatasetConfig, split: Split = "train") -> list[Record]:
    """The records of a split, checked for the fields that the dataset's prompt needs.

    Raises ValueError naming file and line where a folder or file is missing, empty, not JSON, or
    lacks a field, and saying what to do where the hub cannot be reached.
    """
    if config.name not in PROMPTS:
        raise ValueError(
            f"dataset.name={config.name} is unknown; allowed: {', '.join(PROMPTS)}"
            f"{nearest(config.name, PROMPTS)}"
        )
    if config.path is not None:
        path = find_split(Path(config.path), split)
        source, records = str(path), read_file(path)
    elif config.hub is not None:
        source = f"{config.hub} ({split})"
        records = _read_hub(config, split)
    elif config.name == "arithmetic":
        source = f"arithmetic ({split})"
        records = list(arithmetic.records(split))
    else:
        raise ValueError(
            f"dataset {config.name} has no source: set dataset.path=FOLDER or "
            "dataset.hub=REPOSITORY"
        )
    if not records:
        raise ValueError(f"{source} holds no records")
    for number, record in enumerate(records, 1):
        for name in PROMPTS[config.name].fields:
            if not isinstance(record.get(name), str) or not record[name]:
                found = ", ".join(map(str, record)) or "nothing"
                raise ValueError(
                    f"{source}, record {number}: field {name!r} is missing, empty or not text "
                    f"(fields found: {found})"
                )
    return records[: config.limit] if split == "train" else records


def find_split(folder: Path, split: str) -> Path:
    """`<folder>/<split>.jsonl`, `.json` or `.parquet`. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; it must hold {split}.jsonl")
    for suffix in SUFFIXES:
        if (path := folder / f"{split}{suffix}").is_file():
            return path
    raise ValueError(
        f"{folder} holds no {split}{{{','.join(SUFFIXES)}}}; "
        f"files there: {', '.join(sorted(p.name for p in folder.iterdir())) or 'none'}"
    )


def read_file(path: Path) -> list[Record]:
    """The records of a JSONL, JSON (a list) or Parquet file. Raises ValueError naming the line."""
    rows = read_rows(path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {where}: expected an object, got {str(row)[:60]!r}")
    return [row for _, row in rows]


def _read_hub(config: DatasetConfig, split: str) -> list[Record]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = datasets.load_dataset(
            config.hub, config.subset, split=split, revision=config.revision
        )
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"dataset {config.hub} (subset {config.subset}, revision {config.revision}) cannot be "
            f"read from the hub: {str(error).splitlines()[0] if str(error) else error!r}. For a "
            f"local copy of the same schema set dataset.path=FOLDER"
        ) from None
    return list(rows)


def split_validation(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """(training, held out) records; the choice depends only on their number and `share`."""
    held_out = np.zeros(len(records), dtype=bool)
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(records))
    held_out[order[: round(len(records) * share)]] = True
    if held_out.all():
        raise ValueError(
            f"dataset.validation={share} leaves no record of {len(records)} to train on"
        )
    train = [record for record, out in zip(records, held_out, strict=True) if not out]
    return train, [record for record, out in zip(records, held_out, strict=True) if out]


def texts(records: Sequence[Record], config: DatasetConfig) -> list[tuple[str, str]]:
    """The (prompt, answer) text of each record."""
    return [PROMPTS[config.name].function(record, config.prompt) for record in records]


def joint(config: DatasetConfig) -> bool:
    """Whether prompt and answer are tokenised together, as the harness does."""
    return PROMPTS[config.name].joint and config.prompt == "harness"


def fingerprint(records: Sequence[Record], config: DatasetConfig) -> str:
    """sha256 over the texts of the records, in order."""
    content = "\n".join(json.dumps(pair) for pair in texts(records, config))
    return hashlib.sha256(content.encode()).hexdigest()


def tokenize(
    records: Sequence[Record], config: DatasetConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], dict[str, int]]:
    """Examples and the counts `records`, `used`, `truncated`, `fully_masked`.

    Longer examples lose their end at `max_length` and are counted; those with no label left cannot
    be trained on and are left out, counted. Raises ValueError if that leaves none, or if the
    tokenizer has no end-of-text token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no end-of-text token, which ends every answer")
    pairs = texts(records, config)
    # Not verbose: what is longer than the window is counted below.
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
        "%d records: %d used, %d cut at %d tokens, %d without a label left out",
        *(len(records), len(examples), truncated, config.max_length, masked),
    )
    if not examples:
        raise ValueError(
            f"none of {len(records)} examples keeps a label within "
            f"dataset.max_length={config.max_length} tokens; raise it"
        )
    return examples, counts


def pack(
    examples: Sequence[Example], tokens_multiple: int = 1, labels_multiple: int = 1
) -> PackedBatch:
    """Put examples behind each other in one row.

    tokens_multiple: above 1, a document without labels is put behind them, so that the number of
    tokens is a multiple. labels_multiple: likewise for the labels, by ones that no loss counts
    (-100). Neither changes the loss; sizes that come back can be worked on as recorded.
    """
    rows: list[int] = []
    labels: list[int] = []
    start = 0
    for example in examples:
        first = max(example.prompt_length, 1)
        rows.extend(range(start + first - 1, start + len(example.tokens) - 1))
        labels.extend(example.tokens[first:])
        start += len(example.tokens)
    tokens = [token for example in examples for token in example.tokens]
    lengths = [len(example.tokens) for example in examples]
    if tokens_multiple > 1:
        lengths.append(tokens_multiple - start % tokens_multiple)  # never empty
        tokens += [0] * lengths[-1]
    missing = -len(labels) % labels_multiple
    return PackedBatch(
        tokens=torch.tensor([tokens]),
        lengths=tuple(lengths),
        # Each its own row, because gradients of one row are added up one after the other.
        label_rows=torch.tensor(rows + [i % len(tokens) for i in range(missing)]),
        labels=torch.tensor(labels + [IGNORED] * missing),
    )
