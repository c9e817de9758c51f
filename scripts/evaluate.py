"""Evaluate a finished run on further tasks; the rows are added to its record.

    python scripts/evaluate.py run=FOLDER eval=arc_hellaswag
    python scripts/evaluate.py run=FOLDER "eval.tasks=['gsm8k:0']" eval.data_path=data

Rows that are in the record already stay as they are.
"""

import dataclasses
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from matryoshka_lora.cli import option, other_keys, run_script
from matryoshka_lora.config import Config, build_config, check_given, quote_texts
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.further_evaluation import evaluate_run
from matryoshka_lora.loading import read_run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ConfigStore.instance().store(name="schema", node=Config)


@dataclasses.dataclass
class Options:
    """The command line; `overrides` are Hydra's."""

    run: str = option(MISSING, "folder of the run")
    overrides: dict[str, str] = other_keys(
        "what to evaluate: eval=, eval.*= and model.path= as train.py takes them; everything else "
        "is the run's own"
    )

    def __post_init__(self) -> None:
        """Raises UserError unless there is something to evaluate and nothing else."""
        if not self.overrides:
            raise UserError("give what to evaluate, such as eval=gsm8k; see --help")
        for key in self.overrides:
            if key not in ("eval", "model.path") and not key.startswith("eval."):
                raise UserError(
                    f"{key} is the run's own; only eval, eval.* and model.path may be given"
                )


def main(options: Options) -> None:
    """Raises UserError where `run` is no trained run, and what `evaluate_run` raises."""
    folder = Path(options.run)
    node = OmegaConf.structured(read_run(folder).config)
    overrides = quote_texts(f"{key}={text}" for key, text in options.overrides.items())
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        chosen = compose("train", overrides)
    for key in sorted(options.overrides):  # the group before its keys
        # A group replaces the run's own evaluation, a single key only itself.
        OmegaConf.update(node, key, OmegaConf.select(chosen, key), merge=False)
    config = build_config(node)
    check_given(config, overrides)
    evaluate_run(folder, config)


if __name__ == "__main__":
    run_script(main, __doc__, Options)
