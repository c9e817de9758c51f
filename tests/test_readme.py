"""The README and the committed tables say what the committed records say."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from matryoshka_lora.cli import parse_options
from matryoshka_lora.methods import base
from matryoshka_lora.reporting import format_run_table, rank_tables, write_tables
from matryoshka_lora.runs.record import find_records, read_record

README = (ROOT / "README.md").read_text()


def records_of(table):
    folder = ROOT / "results/records" / table
    return [read_record(path) for path in find_records(folder, "*.json")]


@pytest.mark.parametrize("table", ["table2-tiny", "gsm8k-smollm2"])
def test_the_committed_tables_follow_from_the_committed_records(table, tmp_path):
    paths = write_tables(rank_tables(records_of(table)), tmp_path / table, title=table)
    for path in paths:
        assert path.read_bytes() == (ROOT / "results" / "tables" / path.name).read_bytes()


def test_the_readmes_table_is_the_committed_one():
    rows = [line for line in README.splitlines() if line.startswith("|") and "<br>" in line]
    committed = (ROOT / "results/tables/smollm2-answer.md").read_text().splitlines()
    assert len(rows) == 3 and set(rows) <= set(committed)


def test_the_readmes_quickstart_output_is_a_committed_run():
    (record,) = records_of("quickstart")
    blocks = format_run_table(record).split("\n\n")
    assert blocks[0] in README and blocks[2] in README and record.run_hash in README


def test_every_file_that_the_readme_names_is_there():
    names = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name


def commands():
    """(script, arguments) of every `python scripts/...` in README, docs, and the scripts' help."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files += [ROOT / "matryoshka_lora/assets/tiny/README.md", *sorted(ROOT.glob("scripts/*.py"))]
    for file in files:
        # A line may go on in the next; two spaces and more stand before an explanation.
        text = re.sub(r"\\+\n *", "", file.read_text())
        for command in re.findall(r"\bpython (scripts/\w+\.py[^`\n]*?)(?:`|   *|\n)", text):
            script, *arguments = shlex.split(command)
            yield script, [re.sub(r"^\[(.*)\]$", r"\1", text) for text in arguments]


@pytest.mark.parametrize(("script", "arguments"), commands(), ids=str)
def test_every_command_that_is_written_down_is_understood(script, arguments, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)  # as on a cluster
    name = Path(script).stem + "_as_documented"
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, "Options"):
        pytest.skip(f"{script} does not parse its arguments by parse_options")
    parse_options(module.Options, arguments)


def test_the_example_of_a_method_is_one(monkeypatch):
    """docs/extending.md shows a whole method; it builds and has the diagonal it is said to have."""
    monkeypatch.setattr(base, "METHODS", dict(base.METHODS))
    text = (ROOT / "docs/extending.md").read_text()
    example: dict = {"__name__": "example"}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], example)
    info = base.METHODS["cosine"]
    p = info.build(base.AdapterShape(4, (1, 2, 4), "none"), info.settings(floor=0.25)).p_full
    assert p[0] == 1 and p[-1] == pytest.approx(0.25) and (p.diff() < 0).all()
