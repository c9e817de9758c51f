"""What a multirun ends with: one table over all its runs.

Jobs of a multirun may run in this process or in others, so each names its record in a file that the
environment tells of; the process that started them reads it once all jobs have ended.
"""

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

VARIABLE = "MATRYOSHKA_LORA_MULTIRUN"


def note_run(record: Path) -> None:
    """Where this process is a job of a multirun: let the comparison hold the run of `record`."""
    if VARIABLE in os.environ:
        path = Path(os.environ[VARIABLE])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:  # one short write, so that jobs do not mix their lines
            file.write(f"{record.absolute()}\n")


class Comparison(Callback):
    """Hydra's callback around a multirun; `configs/train.yaml` names it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Jobs note their runs from now on."""
        folder = Path(config.hydra.sweep.dir).absolute()
        os.environ[VARIABLE] = str(folder / f".runs-of-{os.getpid()}")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table of the runs that were noted, if there are several."""
        path = Path(os.environ.pop(VARIABLE))
        if not path.is_file():
            return
        found = [Path(line) for line in dict.fromkeys(path.read_text().splitlines())]
        path.unlink()
        if len(found) > 1:
            # Not at the top: pandas, which a single run needs at its end alone.
            from matryoshka_lora.reporting import format_multirun
            from matryoshka_lora.runs.record import read_record

            print(f"\n{format_multirun([read_record(record) for record in found])}", flush=True)
