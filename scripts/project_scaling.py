"""What 8 and 64 GPUs would cost, from what benchmark_scaling.py measured on fewer.

    python scripts/project_scaling.py [folder=results/benchmarks/scaling]

A step on n GPUs, 32 samples on each, from what was measured on one GPU and on m, the largest number
measured:

- All-reduce: the adapter's gradient in float32, 4 bytes a trainable parameter, of which a ring
  moves 2 (n - 1) / n times as much over each GPU's link. The link's bandwidth is what explains that
  the step of m is longer than that of one with as many tokens, of the shape that sends most: all
  that differs counts as communication. Other shapes give other bandwidths.
- Whole base: the step of one GPU and the all-reduce.
- Sharded base: each GPU gathers (n - 1) / n of the base twice, for the forward and the backward
  pass, while it computes. The step is that of m without its all-reduce, or the gathers where they
  take longer, and the all-reduce.
- Several hosts of 8 GPUs: all of this at the network's bandwidth into a host, where that is less.
- Memory: the measured peak; of a sharded base, a smaller part is held.
- Sweep of a whole base: 9 ranks of GSM8K 3-shot, (s - T) / n + T seconds, where s is one GPU's
  time (another card's where this one has none) and T what explains the time on m; the largest T
  of the sweeps counts. Its share is that in one sweep and three epochs together, both without
  starts.

Writes `<folder>/projection.md`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from benchmark_common import COMMITTED, SHARDED, gsm8k_lengths, read_entries, split_key

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import write_atomically

SYSTEM = "matryoshka"
HOST = 8  # GPUs
EPOCHS, RECORDS = 3, 7473
GRADIENT_BYTES, BASE_BYTES = 4, 2  # float32, bf16
GIGA = 1e9


@dataclass
class Options:
    """The command line."""

    folder: str = option(f"{COMMITTED}/scaling", "with training.json and sweep.json")
    sweeps: str = option(COMMITTED, "folder with the sweep.json of larger models on one GPU")
    gpus: list[int] = option([8, 64], "how many")
    networks: list[float] = option(
        [400.0, 50.0], "GB/s into a host; 400: a card of 400 Gbit/s for each GPU"
    )


@dataclass(frozen=True)
class Measured:
    """A shape on some GPUs, by one system of its entry."""

    processes: int
    step: float
    """Seconds."""
    tokens: float
    """Of a step, on all GPUs."""
    peak: float
    """Bytes on a GPU; NaN where there is none."""
    trainable: int
    base: int
    """Parameters of the base."""

    @staticmethod
    def of(entry: Mapping[str, Any]) -> "Measured | None":
        """None for an entry without figures, or of an older version."""
        x = entry["systems"].get(SYSTEM, {})
        if "tokens_per_second" not in x or "trainable" not in entry:
            return None
        step = x["seconds"] / x["steps"]
        return Measured(
            entry.get("processes", 1),
            step,
            x["tokens_per_second"] * step,
            (x["peak_gib"] or math.nan) * 2**30,
            entry["trainable"],
            entry["parameters"] - entry["trainable"],
        )

    def all_reduce_bytes(self, n: int) -> float:
        """Over each GPU's link in a step of n."""
        return 2 * (n - 1) / n * GRADIENT_BYTES * self.trainable

    def gather_bytes(self, n: int) -> float:
        """Likewise, of a sharded base."""
        return 2 * (n - 1) / n * BASE_BYTES * self.base


@dataclass(frozen=True)
class Step:
    """A step on n GPUs, in seconds. `gathers` run beside the computation; 0 without sharding."""

    seconds: float
    all_reduce: float
    gathers: float
    peak: float


def bandwidth_of(shapes: Mapping[str, Mapping[int, Measured]]) -> float | None:
    """Bytes a second over a GPU's link, at which the all-reduce takes what a step takes longer.

    Of the whole base with the most trainable parameters; None where none ran on one and on more.
    """
    pairs = [
        (by_count[1], by_count[max(by_count)])
        for name, by_count in shapes.items()
        if not name.endswith(SHARDED) and 1 in by_count and len(by_count) > 1
    ]
    if not pairs:
        return None
    one, most = max(pairs, key=lambda pair: pair[0].trainable)
    longer = most.step - one.step * most.tokens / (most.processes * one.tokens)
    return most.all_reduce_bytes(most.processes) / longer if longer > 0 else math.inf


def whole(one: Measured, n: int, bandwidth: float) -> Step:
    """The step on n GPUs that each hold the base."""
    all_reduce = one.all_reduce_bytes(n) / bandwidth
    return Step(one.step + all_reduce, all_reduce, 0.0, one.peak)


def sharded(most: Measured, n: int, bandwidth: float, bandwidth_of_most: float) -> Step:
    """The step on n GPUs that share the base, by one on fewer."""
    m = most.processes
    computed = most.step - most.all_reduce_bytes(m) / bandwidth_of_most
    all_reduce, gathers = most.all_reduce_bytes(n) / bandwidth, most.gather_bytes(n) / bandwidth
    peak = most.peak - BASE_BYTES * most.base * (1 / m - 1 / n)
    return Step(max(computed, gathers) + all_reduce, all_reduce, gathers, peak)


def rows_of(
    shapes: Mapping[str, Mapping[int, Measured]],
    sweeps: Mapping[str, float],
    not_shared: float | None,
    options: Options,
) -> Iterator[dict[str, str]]:
    """A row for each shape, number of GPUs and network.

    shapes: name -> processes -> what was measured. sweeps: name -> seconds on one GPU. not_shared:
    seconds of a sweep that more GPUs do not shorten.
    """
    link = bandwidth_of(shapes)
    if link is None:
        return
    for name, by_count in shapes.items():
        most = by_count[max(by_count)]
        is_sharded = name.endswith(SHARDED)
        if not is_sharded and 1 not in by_count:
            continue
        reference = by_count.get(1, most)
        base = most if is_sharded else reference
        sweep_of_one = sweeps.get(name.removesuffix(SHARDED))
        for n in options.gpus:
            for network in options.networks if n > HOST else [math.inf]:
                bandwidth = min(link, network * GIGA)
                step = (
                    sharded(base, n, bandwidth, link) if is_sharded else whole(base, n, bandwidth)
                )
                speed = base.tokens / base.processes * n / step.seconds
                one = reference.tokens / reference.processes / reference.step
                training = EPOCHS * gsm8k_lengths(RECORDS).sum() / speed
                sweep = None
                if sweep_of_one is not None and not_shared is not None:
                    sweep = (sweep_of_one - not_shared) / n + not_shared
                yield {
                    "shape": name,
                    "GPUs": str(n),
                    "network GB/s": f"{network:.0f}" if n > HOST else "",
                    "link GB/s": f"{bandwidth / GIGA:.0f}" if bandwidth < math.inf else "",
                    "step s": f"{step.seconds:.3f}",
                    "all-reduce s": f"{step.all_reduce:.3f}",
                    "gathers s": f"{step.gathers:.3f}" if is_sharded else "",
                    "tokens/s": f"{speed:,.0f}",
                    "speed a GPU": f"{speed / (n * one):.2f} of that of {reference.processes}",
                    "GiB a GPU": f"{step.peak / 2**30:.1f}" if step.peak > 0 else "",
                    "3 epochs s": f"{training:.1f}",
                    "sweep s": f"{sweep:.1f}" if sweep is not None else "",
                    "sweep's share": f"{sweep / (sweep + training):.0%}" if sweep else "",
                }


def read(options: Options) -> tuple[dict[str, dict[int, Measured]], dict[str, float], float | None]:
    """The shapes, sweeps and seconds that are not shared, as `rows_of` takes them.

    Of one card, the one with the most entries.
    """
    training = read_entries(Path(options.folder), "training")
    cards = [entry["device"]["name"] for entry in training.values()]
    if not cards:
        raise UserError(f"folder={options.folder} has no training.json; measure first")
    card = max(sorted(set(cards)), key=cards.count)
    shapes: dict[str, dict[int, Measured]] = {}
    for key, entry in training.items():
        name, of, on = key.partition(" on ")
        found = Measured.of(entry)
        if on == card and found is not None:
            shapes.setdefault(split_key(name)[0], {})[found.processes] = found
    for shape, by_count in shapes.items():
        if shape.endswith(SHARDED) and (one := shapes.get(shape.removesuffix(SHARDED), {}).get(1)):
            by_count[1] = one
    swept = read_entries(Path(options.folder), "sweep")
    times: dict[str, dict[int, float]] = {}
    for key, entry in swept.items():
        name, _, on = key.partition(" on ")
        if on == card:
            n = entry.get("processes", 1)
            times.setdefault(split_key(name)[0], {})[n] = entry["seconds"]
    not_shared = [
        max((m * by_count[m] - by_count[1]) / (m - 1), 0.0)
        for by_count in times.values()
        if 1 in by_count and (m := max(by_count)) > 1
    ]
    others = read_entries(Path(options.sweeps), "sweep").items()
    sweeps = {
        key.partition("-3shot-")[0]: entry["seconds"]
        for key, entry in sorted([*others, *swept.items()], key=lambda item: card in item[0])
        if "-3shot-" in key and entry.get("processes", 1) == 1 and "of the" not in entry["points"]
    }
    return shapes, sweeps, max(not_shared, default=None)


def main(options: Options) -> None:
    """Raises UserError where nothing was measured."""
    rows = list(rows_of(*read(options), options))
    if not rows:
        raise UserError(f"folder={options.folder}: no shape was measured on one GPU and on more")
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    note = (__doc__ or "").partition("A step on n GPUs")
    text = f"Computed, not measured (`scripts/project_scaling.py`). {note[1]}{note[2]}"
    text = text.partition("\nWrites")[0]
    write_atomically(Path(options.folder) / "projection.md", f"{text}\n{table}\n".encode())
    print(table)


if __name__ == "__main__":
    run_script(main, __doc__, Options)
