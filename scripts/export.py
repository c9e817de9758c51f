"""Write a sub-rank of a finished run for use without this package.

    python scripts/export.py run=FOLDER rank=4 out=FOLDER
    python scripts/export.py run=FOLDER rank=4 rule=svd format=merged dtype=bfloat16 out=FOLDER

The run has to have its adapter; the base model is read from where the run read it.
"""

import dataclasses
from pathlib import Path

from omegaconf import MISSING

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import RULES
from matryoshka_lora.export import export_merged, export_peft
from matryoshka_lora.loading import read_run


@dataclasses.dataclass
class Options:
    """The command line."""

    run: str = option(MISSING, "folder of the run")
    rank: int = option(MISSING, "the rank to read the adapter at")
    out: str = option(MISSING, "folder to write")
    rule: str = option("prefix", f"the rule to read it by: {', '.join(RULES)}")
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
    if options.format == "peft":
        export_peft(run, options.rank, options.rule, out)
    else:
        export_merged(run, options.rank, options.rule, out, options.dtype, options.device)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_script(main, __doc__, Options)
