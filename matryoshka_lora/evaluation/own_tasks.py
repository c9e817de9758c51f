"""The tasks of a config, with the documents of those that the package makes itself."""

import json
from pathlib import Path

from accelerate import Accelerator

from matryoshka_lora.config import Config, DatasetConfig
from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.data.records import Split, load_records
from matryoshka_lora.evaluation.tasks import EvalTask, load_tasks

# Harness tasks whose documents the package makes itself: task -> dataset.
OWN_TASKS = {"arithmetic_word_problems": "arithmetic"}


def load_own_and_harness_tasks(config: Config, accelerator: Accelerator) -> list[EvalTask]:
    """The tasks of `eval.tasks`; the main process writes the records of the package's own."""
    tasks: list[EvalTask] = []
    for name, shots in config.tasks:
        data_path = None if config.eval.data_path is None else Path(config.eval.data_path)
        if name in OWN_TASKS and data_path is None:
            data_path = Path(config.output_dir) / "data" / OWN_TASKS[name]
            if accelerator.is_main_process:
                _write_own_data(OWN_TASKS[name], data_path)
            accelerator.wait_for_everyone()
        tasks += load_tasks([(name, shots)], data_path=data_path, limit=config.eval.limit)
    return tasks


def _write_own_data(dataset: str, folder: Path) -> None:
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        records = load_records(DatasetConfig(name=dataset), split)
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(folder / f"{split}.jsonl", text.encode())
