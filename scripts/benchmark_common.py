"""What the benchmarks share: inputs with GSM8K's lengths, ceilings, and one record a benchmark.

The models have real shapes and random weights, so that nothing is downloaded: speed depends on
shapes and lengths alone, as long as token ids are random and no factor is zero.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from filelock import FileLock
from torch import nn
from transformers import PreTrainedModel

from matryoshka_lora.cli import environment_of_children
from matryoshka_lora.core.adapter import adapter_layers
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.data.examples import Example
from matryoshka_lora.runs.provenance import environment

logger = logging.getLogger(__name__)

SCHEMA = 2
LOCAL, COMMITTED = "results/benchmarks-local", "results/benchmarks"
SHARDED = "-sharded"
"""Behind the name of what has its base sharded over the processes."""
FOLDERS = ("run", "data_path", "output")
SHAPES = {
    "llama3_70b": ("meta-llama/Llama-3.1-70B-Instruct", "bfloat16"),
    "llama3_8b": ("meta-llama/Llama-3.1-8B-Instruct", "bfloat16"),
    "llama3_1b": ("meta-llama/Llama-3.2-1B-Instruct", "bfloat16"),
    "smollm2_135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "bfloat16"),
    "tiny": ("tiny", "float32"),
}
"""Name -> model and dtype."""
# GSM8K's train set as the Llama-3 tokenizer cuts it, fitted: the mean of question and answer is 63
# and 101 tokens, their sum has median 154, 95th percentile 275 and maximum 464; answers have 95th
# percentile 182 and maximum 310. Log-normal, with the correlation that another tokenizer
# (SmolLM2's) shows on the same records.
LOG_MEAN = (np.log(63) - 0.32**2 / 2, np.log(101) - 0.39**2 / 2)
LOG_STD = (0.32, 0.39)
CORRELATION = 0.55
LONGEST = (220, 310, 464)
"""Of a question, an answer, and both together."""


def settings_of(options: Any) -> dict[str, Any]:
    """The options, a dataclass, without folders, which other machines do not have."""
    return {key: value for key, value in asdict(options).items() if key not in FOLDERS}


def entry_key(name: str, processes: int, sharded: bool = False) -> str:
    """The key of an entry, without the device; `split_key` reads the end of it."""
    return name + SHARDED * sharded + (f"-x{processes}" if processes > 1 else "")


def split_key(key: str) -> tuple[str, int]:
    """`llama3_8b-r32-x2` -> (`llama3_8b-r32`, 2)."""
    name, cross, count = key.rpartition("-x")
    return (name, int(count)) if cross and count.isdigit() else (key, 1)


def shard_base_over(accelerator: Accelerator) -> None:
    """Have the base sharded, as a launch with configs/accelerate/fsdp.yaml does it on GPUs.

    Raises UserError for one process.
    """
    if accelerator.num_processes == 1:
        raise UserError("sharded=true needs several processes: start it by torchrun")
    accelerator.state.distributed_type = DistributedType.FSDP


def run_each(script: str, entries: Mapping[str, Sequence[str]], arguments: Sequence[str]) -> int:
    """Run `script` once an entry of this machine, `cuda` or `cpu`; the exit code.

    A process each, so that none finds the memory of another. Entries are options, as one text.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        logger.info("no GPU here: only the embedded shape is measured")
    failed = []
    for entry in entries[kind]:
        command = [sys.executable, script, *arguments, *entry.split()]
        if subprocess.run(command, env=environment_of_children()).returncode:
            failed.append(entry)
    if failed:
        print(f"error: these failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def gsm8k_lengths(n: int, seed: int = 0) -> np.ndarray:
    """Tokens of (question, answer) of `n` drawn problems, (n, 2)."""
    generator = np.random.default_rng(seed)
    covariance = CORRELATION * LOG_STD[0] * LOG_STD[1]
    matrix = [[LOG_STD[0] ** 2, covariance], [covariance, LOG_STD[1] ** 2]]
    drawn = np.exp(generator.multivariate_normal(LOG_MEAN, matrix, size=n)).round().astype(int)
    question = drawn[:, 0].clip(15, LONGEST[0])
    answer = np.minimum(drawn[:, 1].clip(15, LONGEST[1]), LONGEST[2] - question)
    return np.stack([question, answer], axis=1)


def random_examples(lengths: np.ndarray, vocabulary: int, seed: int = 0) -> list[Example]:
    """Training examples of random token ids; lengths: (n, 2), of prompt and answer."""
    generator = np.random.default_rng(seed)
    return [
        Example(tuple(generator.integers(0, vocabulary, prompt + answer).tolist()), prompt, number)
        for number, (prompt, answer) in enumerate(lengths.tolist(), 1)
    ]


@torch.no_grad()
def fill_factors(model: nn.Module, seed: int = 0) -> None:
    """Give B, which starts at zero, small random values: zeros run faster than data."""
    torch.manual_seed(seed)
    for layer in adapter_layers(model).values():
        layer.lora_B.normal_(std=1e-3)


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of a large matrix product on random data: the ceiling that MFU is measured against."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    products, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            a @ b
        products += 10
        synchronize(device)
    return products * 2 * size**3 / (time.perf_counter() - began)


def synchronize(device: torch.device) -> None:
    """Wait for everything that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_flops(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Floating-point operations that training on `examples` needs, per token.

    Forward and backward to the activations for the frozen weights (4 a weight), to the factors as
    well for the adapters (6), logits of label tokens only, causal attention within each example.
    """
    layers = adapter_layers(model).values()
    frozen = sum(layer.weight.numel() for layer in layers)
    factors = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    lengths = np.array([len(example.tokens) for example in examples])
    labels = sum(example.labels for example in examples) / lengths.sum()
    config = model.config.get_text_config()
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 6 * width * config.num_hidden_layers * (lengths**2).sum() / lengths.sum()
    return float(4 * frozen + 6 * factors + 4 * head * labels + attention)


def read_entries(folder: Path, benchmark: str) -> dict[str, Any]:
    """The entries of `<folder>/<benchmark>.json` by `<key> on <device>`; none if there is no file.

    Raises UserError for a file that is something else, or of another version of this project.
    """
    path = folder / f"{benchmark}.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        if (found["schema"], found["benchmark"]) == (SCHEMA, benchmark):
            return dict(found["entries"])
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{path} is not a record of this benchmark in format {SCHEMA}; move it away, or give "
        "another folder as output=..."
    )


def merge_entry(folder: Path, benchmark: str, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Put `entry` into `<folder>/<benchmark>.json`, in place of one of the same key and device.

    Returns all entries, so that one file holds several machines.
    """
    path = folder / f"{benchmark}.json"
    where = environment()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{benchmark}.lock"):  # two shapes may be measured side by side
        entries = read_entries(folder, benchmark)
        entries[f"{key} on {where['device']['name']}"] = {**entry, **where}
        entries = dict(sorted(entries.items()))
        content = {"schema": SCHEMA, "benchmark": benchmark, "entries": entries}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return entries


def write_table(
    folder: Path,
    benchmark: str,
    entries: Mapping[str, Any],
    rows: Callable[[str, Mapping[str, Any]], list[dict[str, Any]]],
    note: str,
) -> str:
    """`<folder>/<benchmark>.md`: the rows of every entry, each with its machine and commit.

    A `+` behind the commit: tracked files differed from it.
    """
    lines: list[dict[str, Any]] = []
    for key, entry in entries.items():
        card, git = entry["device"]["name"], entry["git"]
        origin = {
            "card": card,
            "torch": entry["versions"]["torch"],
            "commit": "" if git is None else git["sha"][:7] + "+" * git["dirty"],
        }
        lines += [row | origin for row in rows(key.removesuffix(f" on {card}"), entry)]
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    write_atomically(folder / f"{benchmark}.md", f"{note}\n\n{table}\n".encode())
    return table
