"""Build the saved W&B dashboard of a project: accuracy over rank, AURAC, loss.

    python scripts/wandb_dashboard.py entity=TEAM tasks=[gsm8k:3,gsm8k:8]
    python scripts/wandb_dashboard.py entity=TEAM tasks=[gsm8k:3] dry_run=true

Needs `pip install -e '.[dashboard]'` and `wandb login`. Runs that differ only in seed and
learning rate share a W&B group; a panel shows a group's mean and standard deviation.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.config import TrackingConfig, parse_task
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import RULES
from matryoshka_lora.tracking import AURAC_PREFIX, curve_name

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

# All runs of a setting, whatever their seed: `matryoshka_lora.tracking.run_group`.
GROUP = "Group"
# W&B shows 10 unless told otherwise, fewer than a grid with its seeds has.
MAX_RUNS = 100


@dataclasses.dataclass
class Options:
    """The command line."""

    entity: str = option(MISSING, "the W&B team or user that the project belongs to")
    project: str = option(TrackingConfig.project, "W&B project")
    name: str = option("MatryoshkaLoRA", "title of the dashboard")
    tasks: list[str] = option(["gsm8k:3", "gsm8k:8"], "name:shots, as in eval.tasks")
    metric: str = option("exact_match", "the tasks' metric to show")
    filter: str | None = option("strict-match", "the harness's answer filter; null: none")
    limit: int | None = option(None, "eval.limit of the runs to show")
    rules: list[str] = option(list(RULES), "rules to show", choices=tuple(RULES))
    dry_run: bool = option(False, "print the specification as JSON and send nothing")


def build(options: Options) -> "Workspace":
    """The dashboard as an object of wandb-workspaces, which nothing has been sent of yet.

    Raises UserError without the package, and for tasks that are not name:shots.
    """
    curves = [
        curve_name(*parse_task(task), options.metric, options.filter, options.limit)
        for task in options.tasks
    ]
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError(
            "the dashboard needs wandb-workspaces: pip install -e '.[dashboard]'"
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
            title_y=options.metric,
            **seeds,
        )
        for curve in curves
        for rule in options.rules
    ]
    areas = [
        panels.BarPlot(
            title=f"AURAC (log2 rank): {curve}, {rule}",
            metrics=[f"{AURAC_PREFIX['log2']}/{curve}/{rule}"],
            max_bars_to_show=MAX_RUNS,
            **seeds,
        )
        for curve in curves
        for rule in options.rules
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
        entity=options.entity,
        project=options.project,
        name=options.name,
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


def main(options: Options) -> None:
    """Raises what `build` raises, and W&B's own errors."""
    workspace = build(options)
    if options.dry_run:
        print(json.dumps(specification(workspace), indent=2))
    else:
        print(workspace.save().url)


if __name__ == "__main__":
    run_script(main, __doc__, Options)
