"""What a run is made of: its records, their tokens, and what identifies model and run."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from matryoshka_lora.config import VALIDATION, Config, build_method, run_hash, short_name
from matryoshka_lora.data.examples import Example, tokenize
from matryoshka_lora.data.records import Record as DataRecord
from matryoshka_lora.data.records import fingerprint, load_records, split_validation
from matryoshka_lora.identity import model_identity
from matryoshka_lora.models import EMBEDDED, load_tokenizer, source_of
from matryoshka_lora.runs.earlier import Place, find_run


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run is made of, known before anything heavy: it decides the folder."""

    train: list[DataRecord]
    held_out: list[DataRecord]
    """Records of the training split that measure the validation loss."""
    data: dict[str, Any]
    """Fingerprints of the records to train on and of those held out, and how many these are."""
    model: dict[str, Any]
    """Identity of the base model, see `identity.model_identity`."""
    run_hash: str
    place: Place

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the held-out records, if there are any, as `config.wanted_points` takes it."""
        return {VALIDATION: self.data["held_out_fingerprint"]} if self.held_out else {}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The records of a run as tokens."""

    tokenizer: PreTrainedTokenizerBase
    train: list[Example]
    held_out: list[Example]
    facts: dict[str, Any]
    """What the record says of them: the tokenizer, and examples used, truncated, fully masked."""
    embedded: bool
    """Whether the embedded tokenizer made them."""


def prepare(config: Config, identity: dict[str, Any] | None = None) -> Inputs:
    """Read the data and identify the model. Raises UserError for whatever is wrong with either.

    identity: of the model, where it is known already.
    """
    build_method(config)  # knows whether the method exists
    source_of(config.model)  # knows whether a folder is one of a model, before anything is read
    records = load_records(config.dataset)
    rest, held_out = split_validation(records, config.dataset.validation)
    train = rest[: config.dataset.train_limit]
    digest = fingerprint(train, config.dataset)
    data = {"fingerprint": digest, "held_out": len(held_out)}
    if held_out:
        data["held_out_fingerprint"] = fingerprint(held_out, config.dataset)
    if identity is None:
        identity = model_identity(config.model)
    hash8 = run_hash(config, identity, digest)
    place = find_run(config, identity, digest)
    return Inputs(train, held_out, data, identity, hash8, place)


def tokenize_records(config: Config, inputs: Inputs) -> Tokens:
    """Load the tokenizer and tokenize the records to train on and those held out."""
    tokenizer = load_tokenizer(config.model)
    train, counts = tokenize(inputs.train, config.dataset, tokenizer)
    # An example without a label measures no loss.
    labelled = dataclasses.replace(config.dataset, keep_masked=False)
    held_out = tokenize(inputs.held_out, labelled, tokenizer)[0] if inputs.held_out else []
    embedded = tokenizer.name_or_path == str(EMBEDDED)
    name = "embedded" if embedded else short_name(tokenizer.name_or_path)
    return Tokens(tokenizer, train, held_out, counts | {"tokenizer": name}, embedded)
