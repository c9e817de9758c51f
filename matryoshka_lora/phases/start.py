"""The record that a run begins with, or goes on with."""

from accelerate import Accelerator
from omegaconf import OmegaConf

from matryoshka_lora.config import Config, recorded
from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.inputs import Inputs, Tokens
from matryoshka_lora.runs.folder import RunFolder, runs_root
from matryoshka_lora.runs.progress import open_record
from matryoshka_lora.runs.record import Record, write_record


def start_record(
    config: Config, inputs: Inputs, tokens: Tokens, folder: RunFolder, accelerator: Accelerator
) -> Record:
    """The run's record so far, or a new one; the main process writes it and the config."""
    main = accelerator.is_main_process
    accelerator.wait_for_everyone()  # the main process may have set an older run aside
    fresh = Record(
        status="training",
        name=str(folder.path.relative_to(runs_root(config))),
        config=recorded(config),
        run_hash=inputs.run_hash,
        model=inputs.model,
        data=inputs.data | tokens.facts,
    )
    record = open_record(config, folder, fresh)
    if main:
        write_record(folder.record, record)
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        write_atomically(folder.config, text.encode())
    accelerator.wait_for_everyone()
    return record
