"""The tasks of a config, with the documents of those that the package makes itself."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator

from matryoshka_lora.config import Config, DatasetConfig
from matryoshka_lora.core.files import check_writable, write_atomically
from matryoshka_lora.data.records import Split, load_records
from matryoshka_lora.evaluation.tasks import EvalTask, load_tasks
from matryoshka_lora.identity import generation_digest

# Harness tasks whose documents the package makes itself: task -> dataset.
OWN_TASKS = {"arithmetic_word_problems": "arithmetic"}


def load_own_and_harness_tasks(
    config: Config, accelerator: Accelerator | None = None
) -> dict[str, list[EvalTask]]:
    """The tasks behind each entry of `eval.tasks`, of which a group has several.

    accelerator: where there are several processes; the main one writes the records of the package's
    own tasks.
    """
    tasks: dict[str, list[EvalTask]] = {}
    generation = generation_digest(config.model) if config.tasks else ""
    for name, shots in config.tasks:
        data_path = None if config.eval.data_path is None else Path(config.eval.data_path)
        if name in OWN_TASKS and data_path is None:
            data_path = Path(config.output_dir) / "data" / OWN_TASKS[name]
            if accelerator is None or accelerator.is_main_process:
                _write_own_data(OWN_TASKS[name], data_path)
            if accelerator is not None:
                accelerator.wait_for_everyone()
        tasks[f"{name}:{shots}"] = load_tasks(
            [(name, shots)],
            data_path=data_path,
            limit=config.eval.limit,
            generation=generation,
        )
    return tasks


def flat(tasks: Mapping[str, Sequence[EvalTask]]) -> list[EvalTask]:
    """The tasks of all entries, in order."""
    return [task for of_entry in tasks.values() for task in of_entry]


def fingerprints_of(tasks: Mapping[str, Sequence[EvalTask]]) -> dict[str, str]:
    """Entry of `eval.tasks` -> what its rows depend on, adapter and base model aside."""
    return {
        entry: hashlib.sha256(" ".join(task.fingerprint for task in own).encode()).hexdigest()[:16]
        for entry, own in tasks.items()
    }


def _write_own_data(dataset: str, folder: Path) -> None:
    """Write what is not there yet: a finished run may lie on a disk that is only read."""
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        records = load_records(DatasetConfig(name=dataset), split)
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        path = folder / f"{split}.jsonl"
        if path.is_file() and path.read_bytes() == data:
            continue
        check_writable(folder, "output_dir", "choose another folder")
        write_atomically(path, data)
