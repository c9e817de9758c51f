"""Train an adapter and read it at every rank: `python train.py method=lora model=llama3_8b`."""

import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from matryoshka_lora.cli import exit_with_one_line, is_swept, past_hydra, show_help
from matryoshka_lora.config import Config, build_config, check_given, quote_texts

ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(node: DictConfig) -> None:
    with past_hydra():
        from matryoshka_lora.pipeline import run

        config = build_config(node)
        check_given(config, HydraConfig.get().overrides.task, swept=is_swept())
        run(config)


if __name__ == "__main__":
    with exit_with_one_line():
        if {"--help", "-h"} & set(sys.argv[1:]):
            show_help(Path(__file__).parent / "configs")
        else:
            # Hydra takes no override behind -m where there is one before it.
            flags_first = sorted(sys.argv[1:], key=lambda given: given not in ("-m", "--multirun"))
            sys.argv[1:] = quote_texts(flags_first)
            main()
