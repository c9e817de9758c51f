"""Recommend the smallest rank of a finished run that is as good as its best.

    python scripts/choose_rank.py run=FOLDER                      # within 1 point, or 1 % of a loss
    python scripts/choose_rank.py run=FOLDER tolerance=0.5 metric=loss
    python scripts/choose_rank.py run=FOLDER budget_mb=20         # the best that fits

It reads the record and the adapter, nothing is evaluated. Chosen is the smallest rank, and of its
rules the best, whose score is within the tolerance of the best at the worse end of the 95 %
interval of their paired difference (a bootstrap over the documents of the evaluation); under a
budget the best that fits, or, with a tolerance, the smallest within it of that one. The best was
found on the same documents, so it looks a little better than it is. The last line is the command
that exports the choice.
"""

import dataclasses
import shlex
from pathlib import Path

from omegaconf import MISSING

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.loading import read_own, read_run
from matryoshka_lora.reporting.choosing import BYTES, choose, measured


@dataclasses.dataclass
class Options:
    """The command line."""

    run: str = option(MISSING, "folder of the run")
    budget_mb: float | None = option(None, "the most MB (10^6 bytes) of the exported adapter")
    budget_params: int | None = option(None, "the most parameters of the exported adapter")
    tolerance: float | None = option(
        None, "how far behind the best: points, or percent of a loss; null: 1, under a budget none"
    )
    metric: str | None = option(
        None, "a part of the label of what to choose by, such as loss; null: the main metric"
    )

    def __post_init__(self) -> None:
        """Raises UserError for impossible budgets."""
        if self.budget_mb is not None and self.budget_params is not None:
            raise UserError("give budget_mb= or budget_params=, not both")
        for name in ("budget_mb", "budget_params"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be above 0")


def main(options: Options) -> None:
    """Raises what reading the run and choosing raise."""
    run = read_run(options.run)
    file, megabytes = read_own(run), options.budget_mb
    budget = options.budget_params if megabytes is None else megabytes * 1e6 / BYTES
    found = measured(run.record, options.metric)
    choice = choose(
        run.record,
        {
            (point.rank, point.rule): file.parameters(point.rank, point.rule)
            for point in ([] if found is None else found.points)
        },
        budget=budget,
        tolerance=options.tolerance,
        metric=options.metric,
    )
    print(choice.table)
    chosen = choice.chosen.point
    out = Path("exported", run.folder.path.resolve().name, f"r{chosen.rank}")
    arguments = [f"run={options.run}", f"rank={chosen.rank}", f"rule={chosen.rule}", f"out={out}"]
    print(shlex.join(["python", "scripts/export.py", *arguments]))


if __name__ == "__main__":
    run_script(main, __doc__, Options)
