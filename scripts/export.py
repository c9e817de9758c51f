"""Write a sub-rank of a finished run for use without this package.

    python scripts/export.py run=FOLDER rank=4 out=FOLDER
    python scripts/export.py run=FOLDER rank=4 rule=svd format=merged dtype=bfloat16 out=FOLDER

format=peft (default) is a plain PEFT adapter, format=merged a whole transformers model.
"""

import dataclasses
import logging
import sys
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from matryoshka_lora.cli import exit_with_one_line
from matryoshka_lora.export import export_merged, export_peft
from matryoshka_lora.loading import read_run


@dataclasses.dataclass
class Settings:
    """The keys of the command line, with their defaults."""

    run: str = MISSING
    rank: int = MISSING
    out: str = MISSING
    rule: str = "prefix"
    format: str = "peft"
    dtype: str | None = None
    device: str = "cpu"
    model_path: str | None = None


def main(arguments: list[str]) -> None:
    node = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_cli(arguments))
    if missing := [key for key in ("run", "rank", "out") if OmegaConf.is_missing(node, key)]:
        raise ValueError(f"{', '.join(missing)} not given; --help shows the usage")
    settings = OmegaConf.to_object(node)
    assert isinstance(settings, Settings)
    if settings.format not in ("peft", "merged"):
        raise ValueError(f"format={settings.format} is unknown; allowed: peft, merged")
    if settings.format == "peft" and settings.dtype is not None:
        raise ValueError("dtype applies to format=merged; a PEFT adapter is written in float32")
    run = read_run(Path(settings.run), settings.model_path)
    out = Path(settings.out)
    if settings.format == "peft":
        export_peft(run, settings.rank, settings.rule, out)
    else:
        export_merged(run, settings.rank, settings.rule, out, settings.dtype, settings.device)
    print(f"wrote {out}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__)
    else:
        with exit_with_one_line():
            main(sys.argv[1:])
