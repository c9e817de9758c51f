"""Build the saved W&B dashboard of a project: accuracy over rank, AURAC, loss.

    python scripts/wandb_dashboard.py entity=TEAM tasks=[gsm8k:3,gsm8k:8]
    python scripts/wandb_dashboard.py entity=TEAM tasks=[gsm8k:3] --dry-run

Needs `pip install matryoshka-lora[dashboard]` and `wandb login`. Runs that differ only in seed and
learning rate share a W&B group; a panel shows a group's mean and standard deviation. --dry-run
prints the specification as JSON and sends nothing.
"""

import dataclasses
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, OmegaConf

from matryoshka_lora.cli import exit_with_one_line
from matryoshka_lora.config import TrackingConfig, parse_task
from matryoshka_lora.core.errors import nearest
from matryoshka_lora.core.rules import RULES
from matryoshka_lora.tracking import AURAC_PREFIX, curve_name

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

# All runs of a setting, whatever their seed: `matryoshka_lora.tracking.run_group`.
GROUP = "Group"
# W&B shows 10 unless told otherwise, fewer than a grid with its seeds has.
MAX_RUNS = 100


@dataclasses.dataclass
class Settings:
    """The keys of the command line, with their defaults."""

    entity: str = MISSING
    project: str = TrackingConfig.project
    name: str = "MatryoshkaLoRA"
    tasks: list[str] = dataclasses.field(default_factory=lambda: ["gsm8k:3", "gsm8k:8"])
    metric: str = "exact_match"
    filter: str | None = "strict-match"
    limit: int | None = None
    rules: list[str] = dataclasses.field(default_factory=lambda: list(RULES))


def build(settings: Settings) -> "Workspace":
    """The dashboard as an object of wandb-workspaces, which nothing has been sent of yet.

    Raises ValueError for tasks that are not name:shots, unknown rules, or a missing package.
    """
    curves = [
        curve_name(*parse_task(task), settings.metric, settings.filter, settings.limit)
        for task in settings.tasks
    ]
    for rule in settings.rules:
        if rule not in RULES:
            raise ValueError(
                f"rules: {rule} is unknown; allowed: {', '.join(RULES)}{nearest(rule, RULES)}"
            )
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise ValueError(
            "the dashboard needs wandb-workspaces: pip install matryoshka-lora[dashboard]"
        ) from None
    seeds: dict[str, Any] = {
        "groupby": GROUP,
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stddev",
        "max_runs_to_show": MAX_RUNS,
    }

    def section(name: str, contents: list[Any]) -> "Section":
        return workspaces.Section(name=name, panels=contents, is_open=True)

    accuracy = [
        panels.LinePlot(
            title=f"{curve}, {rule}",
            x="eval/rank",
            y=[f"eval/{curve}/{rule}"],
            log_x=True,
            title_x="rank",
            title_y=settings.metric,
            **seeds,
        )
        for curve in curves
        for rule in settings.rules
    ]
    areas = [
        panels.BarPlot(
            title=f"AURAC (log2 rank): {curve}, {rule}",
            metrics=[f"{AURAC_PREFIX['log2']}/{curve}/{rule}"],
            max_bars_to_show=MAX_RUNS,
            **seeds,
        )
        for curve in curves
        for rule in settings.rules
    ]
    training = [
        panels.LinePlot(title=title, x="train/step", y=[f"train/{key}"], title_x="step", **seeds)
        for title, key in (
            ("training loss (nats a label token)", "loss"),
            ("gradient norm", "grad_norm"),
            ("learning rate", "lr"),
            ("tokens a second", "tokens_per_second"),
        )
    ]
    return workspaces.Workspace(
        entity=settings.entity,
        project=settings.project,
        name=settings.name,
        settings=workspaces.WorkspaceSettings(max_runs=MAX_RUNS),
        sections=[
            section("Accuracy over rank", accuracy),
            section("AURAC", areas),
            section("Training", training),
        ],
    )


def specification(workspace: "Workspace") -> dict[str, Any]:
    """What would be sent to W&B, as JSON values."""
    return json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def main(arguments: list[str]) -> None:
    dry_run = "--dry-run" in arguments
    given = OmegaConf.from_cli([argument for argument in arguments if argument != "--dry-run"])
    node = OmegaConf.merge(OmegaConf.structured(Settings), given)
    if OmegaConf.is_missing(node, "entity"):
        raise ValueError("entity not given: the W&B team or user that the project belongs to")
    settings = OmegaConf.to_object(node)
    assert isinstance(settings, Settings)
    workspace = build(settings)
    if dry_run:
        print(json.dumps(specification(workspace), indent=2))
    else:
        print(workspace.save().url)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__)
    else:
        with exit_with_one_line():
            main(sys.argv[1:])
