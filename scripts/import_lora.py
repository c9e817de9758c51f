"""Make a run of a LoRA that PEFT has saved, and evaluate it at every rank.

    python scripts/import_lora.py adapter=FOLDER
    python scripts/import_lora.py adapter=FOLDER model=llama3_1b model.path=FOLDER eval=gsm8k

The other commands then take the run's folder: scripts/evaluate.py adds tasks, scripts/export.py
writes a lower rank. Where it was stopped, the same command goes on.
"""

import dataclasses
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from matryoshka_lora.cli import option, other_keys, run_script
from matryoshka_lora.config import Config, check_given, quote_texts, typed_config
from matryoshka_lora.further_evaluation import evaluate_run
from matryoshka_lora.importing import import_adapter

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ConfigStore.instance().store(name="schema", node=Config)


def _of_model_or_evaluation(key: str) -> bool:
    return key.partition(".")[0] in ("model", "eval")


@dataclasses.dataclass
class Options:
    """The command line; `overrides` are Hydra's."""

    adapter: str = option(MISSING, "folder that PEFT's save_pretrained has written")
    dataset: str = option("unknown", "what tables call the data that it was trained on")
    output_dir: str = option("results", "the run goes to <output_dir>/runs")
    overrides: dict[str, str] = other_keys(
        "its base model and what to evaluate: model=, model.*=, eval=, eval.*= as train.py takes "
        "them; eval.tasks=[] evaluates nothing",
        _of_model_or_evaluation,
    )


def main(options: Options) -> None:
    """Raises what `import_adapter` and `evaluate_run` raise."""
    overrides = quote_texts(f"{key}={text}" for key, text in options.overrides.items())
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        chosen = typed_config(compose("train", overrides))
    folder, config = import_adapter(
        Path(options.adapter), chosen.model, chosen.eval, options.output_dir, options.dataset
    )
    check_given(config, overrides)
    evaluate_run(folder.path, config)
    print(f"run={folder.path}")


if __name__ == "__main__":
    run_script(main, __doc__, Options)
