"""The loss over the learning rate: every rate that a search has tried, a line a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.core.rules import BASE
from matryoshka_lora.reporting.curves import group_labels
from matryoshka_lora.reporting.frame import grouped, runs_of, tidy_frame
from matryoshka_lora.reporting.names import is_baseline, method_style, rule_place
from matryoshka_lora.reporting.plots import save_figure
from matryoshka_lora.runs.record import Record

TASK = "validation"
_COLUMNS = 3
_MARKERS = "os^vDPX*<>"
_DASHES = ("-", "--", ":", "-.")  # by the number of epochs, the most first
_TOP = 1.25
"""Of a panel: the largest loss shown, over the best of the worst line. Others have diverged."""


@dataclass(frozen=True)
class RateLine:
    """One row of a search: trainings that differ in the rate alone, read by one rule.

    losses: by rate, the mean held-out loss over the ranks in nats a token (a LoRA: at its own R,
    unless by SVD); None where training diverged.
    """

    model: str
    label: str
    method: str
    rank: int
    scaling: str
    epochs: float
    rule: str
    losses: Mapping[float, float | None]

    @property
    def best(self) -> float | None:
        """The rate of the lowest loss."""
        known = {rate: loss for rate, loss in self.losses.items() if loss is not None}
        return min(known, key=lambda rate: known[rate]) if known else None


def rate_lines(records: Sequence[Record]) -> list[RateLine]:
    """The lines of all records with a held-out loss; variants are never pooled.

    Of several seeds of one training the mean is shown.
    """
    frame = tidy_frame(records)
    runs = runs_of(frame)
    labels = group_labels(runs)
    held_out = frame[(frame["task"] == TASK) & (frame["metric"] == "loss") & frame["value"].notna()]
    lines: list[RateLine] = []
    same = ["model", "dataset", "method", "R", "scaling", "epochs", "variant"]
    for _, members in sorted(runs.groupby(same), key=lambda item: min(item[1]["group"])):
        own = held_out[held_out["group"].isin(set(members["group"]))]
        diverged = sorted(set(members["lr"][members["problem"].notna()]))
        run: Any = next(members.itertuples())
        read = own[own["rule"] != BASE]
        for rule, found in sorted(grouped(read, "rule"), key=lambda item: rule_place(item[0])):
            if is_baseline(run.method) and rule != "svd":
                found = found[found["rank"] == run.R]
            means = _means(found)
            lines.append(
                RateLine(
                    run.model,
                    labels[run.group],
                    run.method,
                    run.R,
                    run.scaling,
                    run.epochs,
                    rule,
                    dict(sorted({**dict.fromkeys(diverged), **means}.items())),
                )
            )
    return lines


def format_rates(lines: Sequence[RateLine], title: str) -> str:
    """Markdown: a line a row with every rate and its loss."""
    header = ["method", "R", "scaling", "epochs", "rule"]
    header += ["best lr", "lr: held-out loss (nats/token)"]
    body = [header, ["---", "---:", "---", "---:", "---", "---:", "---"]]
    for line in lines:
        tried = [
            f"{rate:g}: " + ("diverged" if loss is None else f"{loss:.4f}")
            for rate, loss in line.losses.items()
        ]
        best = "–" if line.best is None else f"{line.best:g}"
        names = [line.label, str(line.rank), line.scaling, f"{line.epochs:g}", line.rule]
        body.append([*names, best, ", ".join(tried)])
    grid = "\n".join(f"| {' | '.join(cells)} |" for cells in body)
    return (
        f"# {title}: loss over learning rate\n\n"
        "Mean over the ranks that a row is read at, on records held out of training.\n\n"
        f"{grid}\n"
    )


def write_rates(records: Sequence[Record], stem: Path, figure: Path, title: str) -> list[Path]:
    """Write `<stem>.md` and `<figure>.png`, `.pdf`; nothing where no row has tried two rates."""
    lines = rate_lines(records)
    if all(len(line.losses) < 2 for line in lines):
        return []
    path = stem.with_name(stem.name + ".md")
    write_atomically(path, format_rates(lines, title).encode())
    return [path, *save_figure(lambda: _figure(lines), figure)]


def _means(found: pd.DataFrame) -> dict[float, float | None]:
    return {lr: float(points["value"].mean()) for lr, points in grouped(found, "lr")}


def _figure(lines: Sequence[RateLine]) -> Figure:
    """A panel a method, loss over the rate."""
    panels: dict[tuple[str, str], list[RateLine]] = {}
    for line in lines:
        panels.setdefault((line.model, line.method), []).append(line)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    most = max(len(members) for members in panels.values())
    height = 3.2 + 0.12 * most
    figure = Figure(figsize=(4.6 * columns, height * rows), layout="constrained")
    for index, ((_, method), members) in enumerate(panels.items()):
        ax = figure.add_subplot(rows, columns, index + 1)
        style = method_style(method)
        epochs = sorted({line.epochs for line in members}, reverse=True)
        rows_seen: dict[tuple[Any, ...], int] = {}
        for line in members:
            known = [(rate, loss) for rate, loss in line.losses.items() if loss is not None]
            if not known:
                continue
            rates, losses = zip(*known, strict=True)
            row = (line.label, line.rank, line.scaling, line.rule)
            number = rows_seen.setdefault(row, len(rows_seen))
            ax.plot(
                rates,
                losses,
                color=style[0] if style and len(members) == len(epochs) else f"C{number % 10}",
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                linewidth=1.2,
                linestyle=_DASHES[epochs.index(line.epochs) % len(_DASHES)],
                label=f"{line.label} R={line.rank}, scaling {line.scaling}, {line.rule}, "
                f"{line.epochs:g} epochs",
            )
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("held-out loss (nats/token)")
        if ax.lines:
            _cut(ax, members)
            ax.legend(fontsize=5.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _cut(ax: Axes, lines: Sequence[RateLine]) -> None:
    """Leave out losses that are so high that they would flatten all others."""
    known = [[loss for loss in line.losses.values() if loss is not None] for line in lines]
    top = _TOP * max(min(losses) for losses in known if losses)
    if any(loss > top for losses in known for loss in losses):
        low = min(loss for losses in known for loss in losses)
        ax.set_ylim(low - 0.05 * (top - low), top)
        ax.set_ylabel(f"held-out loss (nats/token), up to {top:.2f}")
