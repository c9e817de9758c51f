"""What explains a table: gradient norms of the rows while training, singular values of the update.

    python scripts/diagnostics.py runs=FOLDER[,FOLDER] [output=results/diagnostics]
    python scripts/diagnostics.py records=results/records/smollm2   the runs of one seed of a table
    python scripts/diagnostics.py                                   the figures again

Each folder of a trained run becomes `<output>/<dataset>-<model>-...-<hash>.json`, and all JSON
files in `<output>` become the figures `gradients` and `spectrum` (PNG, PDF) beside them. The JSON
files are small and committed; adapters and step logs, which they are computed from, are not.

Gradient norms are those of the step log: over A and B of all layers, of each block of rows from one
rank of S to the next, before clipping, after a method's own changes of gradients.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.config import Config, affecting
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import parse_json, write_atomically
from matryoshka_lora.core.storage import AdapterFile, read_adapter
from matryoshka_lora.loading import TrainedRun, read_run
from matryoshka_lora.methods import label
from matryoshka_lora.reporting.names import method_place, method_style
from matryoshka_lora.reporting.plots import save_figure
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.provenance import git_state
from matryoshka_lora.runs.record import find_records, read_record

SCHEMA = 1
POINTS = 100
"""Of a curve over the steps: each is the mean of as many steps."""
OWN_FIELDS = ("method.name", "adapter.rank", "adapter.train_ranks", "trainer.lr")
"""Settings that are fields of Diagnostics (`blocks` are the trained ranks)."""
_COLUMNS = 3
_LINES = ("-", "--", ":", "-.")


@dataclasses.dataclass
class Options:
    """The command line."""

    runs: list[str] = option([], "folders of trained runs to add")
    records: str | None = option(
        None, "folder of committed records, whose runs of one seed are added where they are here"
    )
    output: str = option("results/diagnostics", "folder of the JSON files and figures")


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What was computed from one run.

    git: {"sha", "dirty"} of the code that trained and of the code that computed this. settings:
    those of method, adapter and training that change the adapter, are not at their default and have
    no field of their own here. steps: the middle of each window, counted from 1. gradient_norms:
    (windows, len(blocks)), the mean over a window of the norm of a block, whose last row `blocks`
    gives. singular_values: (R,), s_i / s_1. component_norms: (R,), |p_i| ||a_i|| ||b_i|| / s_1 in
    the order of training. Both are means over the layers that have an update.
    """

    schema: int
    run: str
    run_hash: str
    git: dict[str, Any]
    method: str
    rank: int
    lr: float
    seed: int
    settings: dict[str, Any]
    blocks: list[int]
    steps: list[float]
    gradient_norms: list[list[float]]
    layers: int
    singular_values: list[float]
    component_norms: list[float]


def main(options: Options) -> None:
    """Raises UserError for a folder without a trained run, and where there is nothing to draw."""
    output = Path(options.output)
    for folder in [*options.runs, *runs_of_table(options.records)]:
        found = diagnose(read_run(folder))
        path = output / f"{found.run.replace('/', '-')}.json"
        write_atomically(path, _layout(found).encode())
        print(path)
    everything = [_read(path) for path in sorted(output.glob("*.json"))]
    if not everything:
        raise UserError(f"{output} has no JSON files; give runs=FOLDER[,FOLDER]")
    everything.sort(key=lambda d: (method_place(d.method), d.method, -d.rank, d.run))
    for name, draw in (("gradients", _gradients), ("spectrum", _spectrum)):
        for path in save_figure(lambda draw=draw: draw(everything), output / name):  # type: ignore[misc]
            print(path)


def runs_of_table(records: str | None) -> list[str]:
    """The folders of a table's runs with the seed that most of them have, where they are here."""
    if records is None:
        return []
    found = [read_record(path) for path in find_records(records, "*.json")]
    if not found:
        raise UserError(f"records={records} holds no records")
    (seed, _), *_ = Counter(record.config["seed"] for record in found).most_common(1)
    runs = [
        Path(records).parents[1] / "runs" / record.name
        for record in found
        if record.config["seed"] == seed
    ]
    here = [str(run) for run in runs if RunFolder(run).adapter.is_file()]
    print(f"{len(here)} of {len(runs)} runs of seed {seed} are here")
    return here


def diagnose(run: TrainedRun) -> Diagnostics:
    """Raises UserError where adapter or step log are not the run's own."""
    config, record = run.config, run.record
    file = read_adapter(run.folder.adapter, run.spec)
    if file.facts.get("run_hash") != record.run_hash:
        raise UserError(f"{run.folder.adapter} is not the adapter of its {run.folder.record.name}")
    steps, norms = _gradient_norms(run)
    singular, component, layers = _norms_of(file)
    trained = [phase.get("git") for phase in record.phases if phase["phase"] != "evaluation"]
    return Diagnostics(
        schema=SCHEMA,
        run=record.name,
        run_hash=record.run_hash,
        git={"training": trained[-1] if trained else None, "diagnostics": git_state()},
        method=config.method.name,
        rank=config.adapter.rank,
        lr=config.trainer.rate,
        seed=config.seed,
        settings=settings_of(config),
        blocks=config.train_ranks,
        steps=steps,
        gradient_norms=norms,
        layers=layers,
        singular_values=singular,
        component_norms=component,
    )


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a run that have no field of their own, see above."""
    plain = Config()
    return {
        key: value
        for key, value in affecting(config, "adapter").items()
        if key.startswith(("method.", "adapter.", "trainer."))
        and key not in OWN_FIELDS
        and value != attrgetter(key)(plain)
    }


def _gradient_norms(run: TrainedRun) -> tuple[list[float], list[list[float]]]:
    path = run.folder.train_log
    if not path.is_file():
        raise UserError(f"{path} is missing: gradient norms are read from it")
    entries = [parse_json(line, n) for n, line in enumerate(path.read_bytes().splitlines(), 1)]
    norms = np.array([entry["block_grad_norms"] for entry in entries])
    windows = np.array_split(np.arange(len(norms)), min(POINTS, len(norms)))
    steps = [float(window.mean()) + 1 for window in windows]
    return steps, [[_digits(x) for x in norms[window].mean(axis=0)] for window in windows]


@torch.no_grad()
def _norms_of(file: AdapterFile) -> tuple[list[float], list[float], int]:
    """(singular values, norms in the order of training, layers with an update), see above."""
    assert file.view.look is not None
    spectra = file.view.look("svd")
    p_full = torch.tensor(file.spec.p_full, dtype=torch.float64)
    singular, component = [], []
    for name, own in file.layers.items():
        values = spectra[name].importance
        if values[0] <= 0:
            continue
        p = p_full * own["lora_gate"].double() if "lora_gate" in own else p_full
        norms = own["lora_A"].double().norm(dim=1) * own["lora_B"].double().norm(dim=0) * p.abs()
        singular.append(values / values[0])
        component.append(norms / values[0])
    if not singular:
        raise UserError("the adapter's update is zero in every layer: it was not trained")
    means = (torch.stack(found).mean(0).tolist() for found in (singular, component))
    first, second = ([_digits(x) for x in found] for found in means)
    return first, second, len(singular)


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _layout(found: Diagnostics) -> str:
    """A line an entry, so that a change of one is a change of one line."""
    lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in dataclasses.asdict(found).items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _read(path: Path) -> Diagnostics:
    content = parse_json(path.read_bytes())
    try:
        found = Diagnostics(**content)
    except TypeError as error:
        raise UserError(f"{path} is not of this script: {error}; take it away") from None
    if found.schema != SCHEMA:
        raise UserError(f"{path} has schema {found.schema}, this script reads {SCHEMA}")
    return found


def _names(shown: Sequence[Diagnostics]) -> list[str]:
    """The method and what tells its runs apart."""
    texts = {"rank": "R={}", "lr": "lr {:g}", "seed": "seed {}"}
    names = []
    for d in shown:
        runs = [other for other in shown if other.method == d.method]
        parts = [
            text.format(getattr(d, key))
            for key, text in texts.items()
            if any(getattr(other, key) != getattr(d, key) for other in runs)
        ]
        parts += [
            f"{key.partition('.')[2]}={_text(d.settings.get(key, 'default'))}"
            for key in dict.fromkeys(key for other in runs for key in other.settings)
            if any(other.settings.get(key) != d.settings.get(key) for other in runs)
        ]
        names.append(", ".join([label(d.method), *parts]))
    return names


def _text(value: Any) -> str:
    return " ".join(f"{x:g}" for x in value) if isinstance(value, list) else str(value)


def _gradients(shown: Sequence[Diagnostics]) -> Figure:
    """A panel a run: gradient norm of each block of rows over the steps."""
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for ax, d, name in zip(axes, shown, _names(shown), strict=False):
        norms = np.array(d.gradient_norms)
        for number, last in enumerate(d.blocks):
            first = (d.blocks[number - 1] if number else 0) + 1
            ax.plot(
                d.steps,
                norms[:, number],
                color=_shade(number, len(d.blocks)),
                linewidth=1.2,
                label=f"row {last}" if first == last else f"rows {first}-{last}",
            )
        ax.set_yscale("log")
        ax.set_title(name, loc="left")
        ax.set_xlabel("step")
        ax.legend(fontsize=6, ncols=2, frameon=False)
    for ax in axes[::columns]:
        ax.set_ylabel("gradient norm before clipping")
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    return figure


def _shade(number: int, count: int) -> tuple[float, float, float]:
    """From dark blue to light orange, which all kinds of colour vision tell apart."""
    share = number / max(count - 1, 1)
    return (0.0 + 0.9 * share, 0.25 + 0.38 * share, 0.55 - 0.45 * share)


def _spectrum(shown: Sequence[Diagnostics]) -> Figure:
    """Singular values, and the components in the order of training, a line a run."""
    figure = Figure(figsize=(11.6, 4.2 + 0.1 * len(shown)), layout="constrained")
    panels: Mapping[str, str] = {
        "singular_values": "singular values of the update, $s_i / s_1$",
        "component_norms": "as trained, $|p_i|\\,||a_i||\\,||b_i|| / s_1$",
    }
    axes = figure.subplots(1, 2, sharey=True)
    before: dict[str, int] = {}
    for d, name in zip(shown, _names(shown), strict=True):
        number = before[d.method] = before.get(d.method, -1) + 1
        style = method_style(d.method) or ("#999999", "X")
        for ax, key in zip(axes, panels, strict=True):
            values = np.array(getattr(d, key))
            places = np.arange(1, len(values) + 1)
            ax.plot(
                places[values > 0],
                values[values > 0],
                color=style[0],
                marker=style[1],
                markersize=3,
                linewidth=1.1,
                linestyle=_LINES[number % len(_LINES)],
                alpha=max(0.3, 0.85**number),
                label=name,
            )
    for ax, title in zip(axes, panels.values(), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(f"{title}, mean over layers", loc="left")
        ax.set_xlabel("component i")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


if __name__ == "__main__":
    run_script(main, __doc__, Options)
