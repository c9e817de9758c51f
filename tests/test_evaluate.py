"""scripts/evaluate.py adds rows to a finished run."""

import importlib.util
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_pipeline import records, small_config
from tiny_lm import write_data

from matryoshka_lora.cli import exit_with_one_line, parse_options
from matryoshka_lora.pipeline import run

# Not imported by its name, which is that of an installed package, too.
spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def evaluate(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(small_config(folder, eval__rules=["prefix"]))
    return folder


def test_rows_are_added_never_lost_or_doubled(trained, tmp_path):
    ((path, before),) = records(trained).items()
    options = [
        f"run={path.parent}",
        "eval.tasks=[gsm8k:2,arc_challenge:3]",
        f"eval.data_path={write_data(tmp_path)}",
        "eval.limit=5",
        "eval.ranks=[2,4]",
        "eval.rules=[prefix,svd]",
    ]
    done = evaluate(*options)
    assert done.returncode == 0, done.stderr
    ((_, after),) = records(trained).items()
    old = {row.key: row for row in before.rows}
    new = {row.key: row for row in after.rows}
    assert all(new[key] == row for key, row in old.items())
    added = {(r.task, r.shots, r.rank, r.rule) for key, r in new.items() if key not in old}
    readings = [(0, "base"), (2, "prefix"), (4, "prefix"), (2, "svd"), (4, "svd")]
    assert added == {
        (*task, *reading) for task in (("gsm8k", 2), ("arc_challenge", 3)) for reading in readings
    }
    assert after.training == before.training and after.status == "finished"
    script.main(parse_options(script.Options, options))
    ((_, again),) = records(trained).items()
    assert again.rows == after.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval=gsm8k"], "run not given"),
        (["run={run}"], "give what to evaluate"),
        (["run={run}", "adapter.rank=8"], "adapter.rank is the run's own"),
        (["run={run}", "eval=gsm9k"], "did you mean gsm8k"),
        (["run={run}", "eval.ranks=[64]"], "rank 64 is above"),
        (["run=/nowhere", "eval=gsm8k"], "run=/nowhere holds no record.json"),
    ],
)
def test_mistakes_give_one_line(trained, arguments, message, capsys):
    ((path, _),) = records(trained).items()
    with pytest.raises(SystemExit) as end, exit_with_one_line():
        given = [argument.format(run=path.parent) for argument in arguments]
        script.main(parse_options(script.Options, given))
    assert end.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
