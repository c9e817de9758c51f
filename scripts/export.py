"""Write a sub-rank of a finished run for use without this package.

    python scripts/export.py run=FOLDER rank=4 out=FOLDER
    python scripts/export.py run=FOLDER rank=all out=FOLDER     # each trained sub-rank: r1, r2, ...
    python scripts/export.py run=FOLDER rank=4 rule=svd format=merged dtype=bfloat16 out=FOLDER

The run has to have its adapter; the base model is read from where the run read it. Without a rule
each rank is read by the one that the run's record shows best there; scripts/choose_rank.py finds a
rank. Each folder has a model card. After PEFT exports vLLM's command to serve them is printed.
"""

import dataclasses
from functools import partial
from pathlib import Path

from omegaconf import MISSING

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import RULES
from matryoshka_lora.export import export_each, export_merged, export_peft, vllm_command
from matryoshka_lora.loading import read_run


@dataclasses.dataclass
class Options:
    """The command line."""

    run: str = option(MISSING, "folder of the run")
    rank: int | None = option(
        MISSING,
        "the rank to read the adapter at; all: each trained sub-rank, in out/r1, out/r2, ...",
        words={"all": None},
    )
    out: str = option(MISSING, "folder to write")
    rule: str | None = option(
        None, f"the rule to read it by: {', '.join(RULES)}; null: the best in the run's record"
    )
    format: str = option(
        "peft",
        "a plain PEFT adapter, or a whole transformers model",
        choices=("peft", "merged"),
    )
    dtype: str | None = option(None, "of a merged model's weights; null: that of the run's base")
    device: str = option("cpu", "where a model is merged")
    model_path: str | None = option(None, "local folder of the base model; null: the run's own")

    def __post_init__(self) -> None:
        """Raises UserError for a combination that means nothing."""
        if self.format == "peft" and self.dtype is not None:
            raise UserError("dtype applies to format=merged; a PEFT adapter is written in float32")


def main(options: Options) -> None:
    """Raises what reading the run and writing the adapter raise."""
    run = read_run(Path(options.run), options.model_path)
    out = Path(options.out)
    export = export_peft
    if options.format == "merged":
        export = partial(export_merged, dtype=options.dtype, device=options.device)
    if options.rank is None:
        folders = export_each(run, run.config.train_ranks, options.rule, out, export)
    else:
        export(run, options.rank, options.rule, out)
        folders = [out]
    for folder in folders:
        print(f"wrote {folder}")
    if options.format == "peft" and (command := vllm_command(folders)):
        print(command)


if __name__ == "__main__":
    run_script(main, __doc__, Options)
