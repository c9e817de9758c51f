"""Training speed on 1, 2, 4, ... GPUs of one host, the batch of each GPU held at 32 samples.

    python scripts/benchmark_scaling.py gpus=[1,2,4]

Each measurement is one start of scripts/benchmark_training.py, whose record it goes to; those that
fit on the cards of the host run side by side. `scaling.md` has the speed of n GPUs as a share of n
times the speed of one.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark_common import LOCAL, read_entries, write_table

from hydra_plugins.gpu_queue.jobs import visible_gpus
from matryoshka_lora.cli import environment_of_children, option, run_script
from matryoshka_lora.core.errors import UserError

logger = logging.getLogger("matryoshka_lora.benchmark")

SCRIPT = Path(__file__).with_name("benchmark_training.py")
SHAPES = {
    "llama3_8b-r32": "shape=llama3_8b rank=32",
    "llama3_8b-r256": "shape=llama3_8b rank=256",
    "llama3_1b-r32": "shape=llama3_1b rank=32 cuda_graphs=true warmup=60",
    "llama3_1b-r256": "shape=llama3_1b rank=256 cuda_graphs=true warmup=60",
    "llama3_8b-r256-sharded": "shape=llama3_8b rank=256 sharded=true",
    "llama3_70b-r16-sharded": "shape=llama3_70b rank=16 sharded=true gradient_checkpointing=true",
    "tiny-r32": "shape=tiny rank=32",
    "tiny-r32-sharded": "shape=tiny rank=32 sharded=true",
}
"""Name -> options of the script."""
NOTE = """\
Training on n GPUs of one host, 32 samples a step on each (`make benchmark-scaling`). Efficiency is
the speed as a share of n times that of one GPU. What fits on the host was measured side by side."""


@dataclass
class Options:
    """The command line."""

    gpus: list[int] = option([1, 2, 4], "how many; without a GPU so many processes of the CPU")
    shapes: list[str] = option(["llama3_8b-r32", "llama3_1b-r256"], "what", choices=SHAPES)
    steps: int = option(60, "measured after the warm-up")
    output: str = option(f"{LOCAL}/scaling", "folder of record and table")


@dataclass
class Cards:
    """The cards of the host; who asks for more than are free waits."""

    free: list[str]
    changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def take(self, count: int) -> Iterator[list[str]]:
        """Wait for `count` cards; they are free again on leaving."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= count)
            taken = [self.free.pop(0) for _ in range(count)]
        try:
            yield taken
        finally:
            with self.changed:
                self.free += taken
                self.changed.notify_all()


def measure(shape: str, count: int, options: Options, cards: Cards) -> str | None:
    """Run one measurement on `count` cards; what failed, or None."""
    name = f"{shape} on {count}"
    arguments = [*SHAPES[shape].split(), "methods=[matryoshka]", "baselines=[]"]
    arguments += [f"steps={options.steps}", f"output={options.output}"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    with cards.take(count) as taken:
        environment = environment_of_children() | {
            "CUDA_VISIBLE_DEVICES": ",".join(taken),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 8)),
        }
        logger.info("%s: cards %s", name, ", ".join(taken))
        command = [sys.executable, *(launch if count > 1 else ()), str(SCRIPT), *arguments]
        code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode
    return f"{name}: exit code {code}" if code else None


def main(options: Options) -> int:
    """1 where a measurement failed, else 0.

    Raises UserError for cards that are not there, or no shape.
    """
    ids = visible_gpus()
    read_entries(Path(options.output), "training")
    if min(options.gpus, default=0) < 1 or (ids and max(options.gpus) > len(ids)):
        raise UserError(f"gpus={options.gpus} must be numbers from 1 to {len(ids) or 'any'}")
    if not options.shapes:
        raise UserError(f"shapes=[] must name at least one of {', '.join(SHAPES)}")
    cards = Cards(ids or [""] * max(options.gpus))
    with ThreadPoolExecutor(len(options.gpus) * len(options.shapes)) as pool:
        asked = [
            pool.submit(measure, shape, count, options, cards)
            for count in sorted(options.gpus)
            for shape in options.shapes
        ]
        failed = [error for future in asked if (error := future.result())]
    entries = read_entries(Path(options.output), "training")
    print(write_scaling(Path(options.output), entries))
    print(*failed, sep="\n", file=sys.stderr, end="\n" if failed else "")
    return 1 if failed else 0


def write_scaling(folder: Path, entries: Mapping[str, Any]) -> str:
    """`scaling.md` of the entries of a training record, and its table."""

    def rows(key: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
        shape, _, count = key.partition("-x")
        n = int(count or 1)
        alone = entries.get(f"{shape} on {entry['device']['name']}", {}).get("systems", {})
        found = []
        for system, x in entry["systems"].items():
            speed, one = (s.get("tokens_per_second") for s in (x, alone.get(system, {})))
            found.append(
                {
                    "shape": shape,
                    "GPUs": str(n),
                    "tokens/s": f"{speed:,.0f}" if speed else x["error"].partition(".")[0],
                    "efficiency": f"{speed / (n * one):.3f}" if speed and one else "",
                    "peak GiB a GPU": f"{x['peak_gib']:.1f}" if x.get("peak_gib") else "",
                    "steps": str(x.get("steps", "")),
                }
            )
        return found

    return write_table(folder, "scaling", entries, rows, NOTE)


if __name__ == "__main__":
    run_script(main, __doc__, Options)
