"""Write configs/rates.yaml from the published searches of the tables of configs/evidence.

    python scripts/rates.py

Of each (model, method, R) the first row of the table that has it decides: its best rate at the
number of epochs that is the default. A model keeps its line "*", the rate of methods without a
search.
"""

import dataclasses
import math
from pathlib import Path

import search
from evidence import folder_name, read_evidence
from grid import Planner
from omegaconf import OmegaConf
from reproduce_options import CONFIGS
from reproduce_options import Options as TableOptions

from matryoshka_lora.cli import option, run_script, text_of
from matryoshka_lora.config import RATES, Config, affecting, read_config
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import check_writable, write_atomically
from matryoshka_lora.runs.record import Record, find_records, read_record


@dataclasses.dataclass
class Options:
    """The command line."""

    records: str = option("results/records", "folder with the published tables")
    output: str = option(str(RATES), "the file to write; models it has beside those stay")


def main(options: Options) -> None:
    """Raises UserError where no search is published."""
    output = Path(options.output)
    if output.is_dir():
        raise UserError(f"output={output} is a folder; name the file to write")
    check_writable(output.absolute().parent, "output", "choose another file")
    found: dict[str, dict[str, dict[int, float]]] = {}
    for path in sorted((CONFIGS / "evidence").glob("*.yaml")):
        if not read_evidence(path).final:  # it tries changes, and no rates for use
            continue
        folder = Path(options.records) / f"{folder_name(path)}-search"
        records = [read_record(record) for record in find_records(folder, "*.json")]
        if not records:
            print(f"{folder} has no records; its model stays as it is")
            continue
        for model, method, rank, rate in rates_of(path, records):
            found.setdefault(model, {}).setdefault(method, {}).setdefault(rank, rate)
    if not found:
        raise UserError(f"no search is published below {options.records}; run reproduce.py first")
    text = output.read_text() if output.exists() else ""
    head = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    before = OmegaConf.to_container(OmegaConf.create(text)) if text else {}
    assert isinstance(before, dict)
    for model, methods in found.items():
        methods |= {name: rate for name, rate in before.get(model, {}).items() if name == "*"}
    write_atomically(output, ("".join(head) + OmegaConf.to_yaml({**before, **found})).encode())
    print(f"wrote {output}")


def rates_of(path: Path, records: list[Record]) -> list[tuple[str, str, int, float]]:
    """(model, method, R, rate) of every row whose search has ended in one, in the file's order."""
    given = read_evidence(path)
    planner = Planner(TableOptions(table=path.stem.partition("_")[0]))
    found = []
    for row in given.rows:
        chosen = {"model": given.model} | given.settings | row.settings
        config = planner.composed({key: text_of(value) for key, value in chosen.items()})
        losses = {}
        for record in records:
            theirs = read_config(record.config, record.name)
            if theirs.dataset.validation == search.HELD_OUT and _same(config, theirs):
                ranks = row.ranks or config.train_ranks
                try:
                    loss = search.held_out_loss(record, row.rules[0], ranks, record.name)
                except UserError:
                    loss = math.inf  # it diverged, or was not read by this rule
                losses[theirs.trainer.rate] = loss
        if (rate := search.best(losses)) is not None:
            found.append((config.model.name, config.method.name, config.adapter.rank, rate))
    return found


def _same(one: Config, other: Config) -> bool:
    """Whether they train alike but for rate and seed; content of model and data not compared."""
    first, second = (
        {key: value for key, value in affecting(c, "adapter").items() if key not in _FREE}
        for c in (one, other)
    )
    return one.model.name == other.model.name and first == second


_FREE = ("trainer.lr", "seed")

if __name__ == "__main__":
    run_script(main, __doc__, Options)
