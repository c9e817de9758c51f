"""Weights & Biases, or nothing, behind one small interface.

A run's own files are complete without W&B, which only receives copies of their numbers. A run that
is started again continues under the same W&B id, which is the run's hash. Online, W&B ignores the
steps that it already has. Offline, each start writes a folder of its own below
`<run folder>/wandb/`; as all of them carry the run's id,

    wandb sync <run folder>/wandb/offline-run-*

uploads them, in the order of their start, into one W&B run.
"""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from matryoshka_lora.config import Config, build_method, short_name
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import check_writable
from matryoshka_lora.evaluation.rows import test_sets
from matryoshka_lora.reporting.aurac import AXES, Axis, aurac
from matryoshka_lora.runs.record import Record, Row, RowKey

logger = logging.getLogger(__name__)

# Where the AURAC of a curve goes in the summary, by axis.
AURAC_PREFIX: dict[Axis, str] = {"log2": "aurac", "linear": "aurac_linear"}


class Tracker:
    """Tracking turned off: every call does nothing."""

    def step(self, row: dict[str, Any]) -> None:
        """Takes the numbers of an optimizer step: a line of the training log."""

    def rows(self, rows: Sequence[Row]) -> None:
        """Takes all rows of the record so far and logs those that were not logged before."""

    def finish(self, record: Record, figure: Path | None) -> None:
        """Logs the end of the sweep: all rows as curves and as a table, AURAC, and the plot."""

    def close(self, exit_code: int = 0) -> None:
        """Nothing more follows; an exit code other than 0 marks the run as failed."""


def make_tracker(config: Config, run_hash: str, folder: Path, main_process: bool) -> Tracker:
    """The tracker that the config names; on all processes but the main one, one that does nothing.

    Raises UserError if the run's wandb folder cannot be written or W&B refuses to start, such as
    without an API key.
    """
    if config.tracking.name == "none" or not main_process:
        return Tracker()
    return WandbTracker(config, run_hash, folder)


def run_group(config: Config) -> str:
    """The name of the W&B group that runs share which differ in seed and learning rate only."""
    adapter = config.adapter
    return "-".join(
        [
            short_name(config.model.name),
            config.dataset.name,
            config.method.name,
            f"r{adapter.rank}",
            adapter.scaling,
        ]
    )


def curve_name(
    task: str,
    shots: int,
    metric: str,
    answer_filter: str | None,
    limit: int | None = None,
    test_set: str | None = None,
) -> str:
    """The name of a rank-accuracy curve, such as `gsm8k-3shot/exact_match-strict-match`.

    test_set: where the record has several, see `rows.test_sets`.
    """
    documents = "" if limit is None else f"-first{limit}"
    extracted = "" if answer_filter is None else f"-{answer_filter}"
    which = "" if test_set is None else f"-{test_set}"
    return f"{task}-{shots}shot{documents}{which}/{metric}{extracted}"


class WandbTracker(Tracker):
    """One W&B run. `wandb` is imported here only, so that without tracking it is never loaded."""

    def __init__(self, config: Config, run_hash: str, folder: Path) -> None:
        # W&B itself would go on silently in a temporary folder.
        check_writable(
            folder / "wandb",
            "tracking=wandb",
            "free it, choose another output_dir, or set tracking=none",
        )
        import wandb

        self.wandb = wandb
        self.train_ranks = config.train_ranks
        self.drawn_ranks = build_method(config).ranks
        self.shown: set[RowKey] = set()
        group, lr = run_group(config), f"lr{config.trainer.lr:g}"
        try:
            self.run = wandb.init(
                project=config.tracking.project,
                entity=config.tracking.entity,
                mode=cast(Literal["online", "offline"], config.tracking.mode),
                dir=folder,
                id=run_hash,
                # Offline there is nobody to ask whether the run exists; `wandb sync` joins by id.
                resume="allow" if config.tracking.mode == "online" else None,
                group=group,
                job_type=lr,
                name=f"{group}-{lr}-seed{config.seed}",
                config=dataclasses.asdict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"tracking=wandb cannot start: {str(error).rstrip('. ')}. Run `wandb login` or set "
                "WANDB_API_KEY; without network set tracking.mode=offline, or tracking=none"
            ) from error
        self.run.define_metric("train/*", step_metric="train/step")
        self.run.define_metric("eval/*", step_metric="eval/rank")

    def step(self, row: dict[str, Any]) -> None:
        # An explicit step: rows that a resumed training repeats are then not logged twice.
        self.run.log(self._curves(row), step=row["step"], commit=True)

    def _curves(self, row: dict[str, Any]) -> dict[str, float]:
        """`train/<name>` -> number; of a list, one for each block of ranks or each drawn rank."""
        curves: dict[str, float] = {}
        for name, value in row.items():
            if name == "block_grad_norms":
                blocks = zip([0, *self.train_ranks], self.train_ranks, value, strict=False)
                for start, end, norm in blocks:
                    curves[f"train/grad_norm_rows/{start + 1}-{end}"] = norm
            elif name == "ranks":
                for rank, count in zip(self.drawn_ranks, value, strict=True):
                    curves[f"train/samples_at_rank/{rank}"] = count
            else:
                curves[f"train/{name}"] = value
        return curves

    def rows(self, rows: Sequence[Row]) -> None:
        by_rank: defaultdict[int, dict[str, float]] = defaultdict(dict)
        names = _curves_of(rows)
        for row in rows:
            if row.key in self.shown or row.value is None:
                continue
            self.shown.add(row.key)
            if row.rank == 0:  # no place on an axis of log2(rank)
                self.run.summary[f"base/{names[row.key]}"] = row.value
            else:
                by_rank[row.rank][f"eval/{names[row.key]}/{row.rule}"] = row.value
        for rank, values in sorted(by_rank.items()):
            self.run.log({"eval/rank": rank, **values})

    def finish(self, record: Record, figure: Path | None) -> None:
        self.rows(record.rows)
        columns = [field.name for field in dataclasses.fields(Row) if field.name != "scores"]
        table = self.wandb.Table(
            columns=[*columns],
            data=[[getattr(row, name) for name in columns] for row in record.rows],
        )
        logged: dict[str, Any] = {"rows": table}
        if figure is not None:
            logged["rank_accuracy"] = self.wandb.Image(str(figure))
        self.run.log(logged)
        self.run.summary.update(aurac_summary(record.rows))

    def close(self, exit_code: int = 0) -> None:
        self.run.finish(exit_code=exit_code)


def aurac_summary(rows: Sequence[Row]) -> dict[str, float]:
    """`aurac/<curve>/<rule>` -> AURAC in the unit of the rows, over the ranks measured."""
    curves: defaultdict[str, dict[int, float | None]] = defaultdict(dict)
    names = _curves_of(rows)
    for row in rows:
        if row.rank > 0:
            curves[f"{names[row.key]}/{row.rule}"][row.rank] = row.value
    summary: dict[str, float] = {}
    for name, values in curves.items():
        points = sorted(values.items())
        if missing := [rank for rank, value in points if value is None]:
            logger.warning("no AURAC of %s: nothing was measured at ranks %s", name, missing)
            continue
        ranks, scores = zip(*points, strict=True)
        for axis in AXES:
            summary[f"{AURAC_PREFIX[axis]}/{name}"] = aurac(ranks, scores, axis)
    return summary


def _curves_of(rows: Sequence[Row]) -> dict[RowKey, str]:
    """The name of the curve that each row belongs to."""
    names = test_sets(rows)
    return {
        row.key: curve_name(
            *(row.task, row.shots, row.metric, row.filter, row.limit),
            names[row.task, row.shots, row.limit, row.fingerprint],
        )
        for row in rows
    }
