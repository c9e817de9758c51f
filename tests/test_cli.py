"""Options of scripts, and how every command shows an error."""

import dataclasses
import logging
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from hydra.errors import OverrideParseException
from omegaconf import MISSING
from test_launcher import environment

from matryoshka_lora.cli import (
    LogHandler,
    as_arguments,
    exit_with_one_line,
    option,
    other_keys,
    parse_options,
    run_script,
)
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import CannotWrite


@dataclasses.dataclass
class Options:
    table: str = option(MISSING, "which", choices=("one", "two"), positional=True)
    rank: int | None = option(None, "R")
    lr: float = option(1e-3, "peak")
    dry: bool = option(False, "only plan")
    name: str | None = option("it", "of the table")
    seeds: list[int] = option([42], "of the runs")
    lrs: list[float] | None = option(None, "to search", words={"all": [0.1, 0.2]})
    others: dict[str, str] = other_keys("handed on", lambda key: "." in key)


def test_values_have_the_types_of_their_fields():
    options = parse_options(
        Options,
        ["two", "rank=4", "lr=3e-4", "dry=1", "name=007", "seeds=1,2", "x.z=[1]", "x.y=a=b"],
    )
    assert options == Options(
        "two", 4, 3e-4, True, "007", [1, 2], None, {"x.z": "[1]", "x.y": "a=b"}
    )
    assert list(options.others) == ["x.z", "x.y"]
    assert parse_options(Options, ["table=one"]) == Options("one")
    assert parse_options(Options, ["one", "seeds=['7', 8]", "name=null"]).seeds == [7, 8]
    assert parse_options(Options, ["one", "seeds=[]", "lrs=all"]) == Options(
        "one", seeds=[], lrs=[0.1, 0.2]
    )


def test_arguments_of_options_are_read_as_the_same_options():
    given = Options("two", 4, 0.5, True, None, [1, 2], [0.1], {"x.y": "a,b"})
    assert parse_options(Options, as_arguments(given)) == given
    assert as_arguments(Options("one")) == ["table=one"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "table not given; --help lists the options"),
        (["on"], "table=on is unknown; allowed: one, two (did you mean one?)"),
        (["one", "two"], "'two' is not key=value; options: table, rank"),
        (["one", "--dry"], "'--dry' is not key=value (did you mean dry?)"),
        (["one", "rnak=4"], "option 'rnak' is unknown (did you mean rank?); options: table, rank"),
        (["one", "rank=4", "rank=4"], "rank is given twice"),
        (["one", "x.y=4", "x.y=5"], "x.y is given twice"),
        (["one", "rank=x"], "rank=x: 'x' is not an integer"),
        (["one", "lr=x"], "lr=x: 'x' is not a number"),
        (["one", "lr=null"], "lr=null: 'null' is not a number"),
        (["one", "dry=maybe"], "dry=maybe must be true or false"),
        (["one", "name="], "name= lacks a value"),
        (["one", "seeds=1,x"], "seeds=1,x: 'x' is not an integer"),
        (["one", "seeds=1,,2"], "seeds=1,,2 lacks a value"),
        (["one", "seeds=1,1"], "seeds=1,1 must name values, each once"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError) as caught:
        parse_options(Options, arguments)
    assert message in str(caught.value)


def test_help_lists_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "-h"])
    run_script(lambda options: pytest.fail("it ran"), "What it does.", Options)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "What it does."
    assert "table which (one, two); the first argument may be the value alone [required]" in lines
    assert "seeds of the runs [[42]]" in lines and "rank R [null]" in lines
    assert any("handed on" in line for line in lines)


def test_other_errors_keep_their_traceback_below_one_line(capsys):
    with pytest.raises(SystemExit) as end, exit_with_one_line():
        raise RuntimeError("the device is gone")
    first, *rest = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert first == (
        "error: this is a bug or the environment, not your input: RuntimeError: the device is gone"
    )
    assert rest[0].startswith("Traceback") and rest[-1] == "RuntimeError: the device is gone"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("rank=x"), "error: rank=x"),
        (FileNotFoundError(2, "No such file or directory", "x"), "error: x: No such file or di"),
        (CannotWrite(28, "cannot write x (full)"), "error: cannot write x (full)"),
        (ValueError("too many"), "error: this is a bug or the environment, not your input: Valu"),
        (
            OverrideParseException("seed = 3", "token"),
            "error: 'seed = 3' is not key=value as Hydra",
        ),
        (OSError("network"), "error: this is a bug or the environment, not your input: OSError"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_line_for_what_the_user_can_mend(monkeypatch, capsys, error, line, rank):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit), exit_with_one_line():
        raise error
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith(line if rank == "0" else line.replace("error", "error in process 1", 1))
    assert bool(rest) == ("a bug" in line)


def test_nothing_is_said_where_nobody_reads_the_output(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        logger = logging.Logger("run")
        logger.addHandler(LogHandler(stdout))
        # The first only fails when it is flushed.
        for write, text in ((print, "a"), (print, "a" * 100_000), (logger.info, "a")):
            with pytest.raises(SystemExit) as end, exit_with_one_line():
                write(text)
            assert end.value.code == 1
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, stdout.fileno())
            os.close(writer)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_errors_are_raised_as_they_are_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError), exit_with_one_line():
        raise UserError("wrong")


def test_a_mistake_is_the_first_line_of_stderr(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "eval.ranks=[64]", f"output_dir={tmp_path}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "error: eval.ranks: rank 64 is above the adapter's rank 32\n"
