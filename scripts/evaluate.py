"""Evaluate a finished run on further tasks; the rows are added to its record.

    python scripts/evaluate.py run=FOLDER eval=arc_hellaswag
    python scripts/evaluate.py run=FOLDER "eval.tasks=['gsm8k:0']" eval.data_path=data

Takes eval=, eval.*= and model.path= as train.py does; everything else is the run's own.
"""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from matryoshka_lora.cli import run_script
from matryoshka_lora.config import Config, build_config
from matryoshka_lora.pipeline import evaluate_run
from matryoshka_lora.runs.folder import RECORD
from matryoshka_lora.runs.record import read_record

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ConfigStore.instance().store(name="schema", node=Config)


def main(arguments: list[str]) -> None:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    folder = given.pop("run", None)
    if folder is None or not given:
        raise ValueError("give run=FOLDER and what to evaluate, such as eval=gsm8k; see --help")
    for key in given:
        if key not in ("eval", "model.path") and not key.startswith("eval."):
            raise ValueError(
                f"{key} is the run's own; only eval, eval.* and model.path may be given"
            )
    if not (path := Path(folder) / RECORD).is_file():
        raise ValueError(f"run={folder} holds no {RECORD}, so it is no folder of a run")
    record = read_record(path)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        chosen = compose("train", [a for a in arguments if not a.startswith("run=")])
    node = OmegaConf.create(record.config)
    for key in sorted(given):  # the group first
        # A group replaces the run's own evaluation, a single key only itself.
        OmegaConf.update(node, key, OmegaConf.select(chosen, key), merge=False)
    evaluate_run(Path(folder), build_config(node))


if __name__ == "__main__":
    run_script(main, __doc__)
