"""What every command has in common: options as `key=value`, help, and how errors are shown."""

import dataclasses
import logging
import os
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import MISSING
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from matryoshka_lora.config import typed_config
from matryoshka_lora.core.errors import UserError, nearest

Options = TypeVar("Options")

EXAMPLES = """\
  python train.py                                         the embedded model on the embedded data
  python train.py method=dylora adapter.rank=16
  python train.py method=matryoshka model=llama3_8b       GSM8K, 3- and 8-shot
  python train.py -m method=lora,matryoshka seed=42,666   one run for each combination"""

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True} | dict.fromkeys(
    ("false", "0", "no", "off"), False
)
JOB = "MATRYOSHKA_LORA_JOB"
"""Set in the environment of the jobs of a queue."""
LAUNCHER_SECONDS = 15.0
"""In which a launcher that finds a process gone ends the others."""
# What the user can mend, beside an OSError that names its file. A ValueError of a library is none:
# where a file of the user is read, it is made a UserError that names the file.
OF_THE_USER = (
    UserError,
    FloatingPointError,  # the training diverged
    HydraException,
    OmegaConfBaseException,
)


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] = (),
    words: Mapping[str, Any] | None = None,
    positional: bool = False,
) -> Any:
    """A field of a script's options, a dataclass whose fields are str, int, float, bool, or lists.

    default: MISSING where the option has to be given. choices: what a str, or each item of a list
    of them, may be. words: texts that stand for a value. positional: the first argument may be the
    value alone.
    """
    metadata = {"help": help, "choices": choices, "words": words or {}, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def other_keys(help: str, accepts: Callable[[str], bool] = lambda key: True) -> Any:
    """A field, dict[str, str], that takes every other key which `accepts` accepts, in order."""
    return dataclasses.field(default_factory=dict, metadata={"help": help, "accepts": accepts})


def parse_options(kind: type[Options], arguments: Sequence[str]) -> Options:
    """`key=value` arguments as an instance of the dataclass `kind`, made by `option`.

    A list is `a,b` or `[a,b]`, nothing is `null`. `kind` may check more in its `__post_init__`.
    Raises UserError for an unknown, repeated or missing key, and for a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    rest = next((name for name, f in fields.items() if "accepts" in f.metadata), None)
    first = next((name for name, f in fields.items() if f.metadata.get("positional")), None)
    named = [name for name in fields if name != rest]
    values: dict[str, Any] = {}
    others: dict[str, str] = {}
    for place, argument in enumerate(arguments):
        key, equals, text = argument.partition("=")
        if first is not None and place == 0 and not equals and not argument.startswith("-"):
            key, text = first, argument
        elif not equals or not key:
            hint = nearest(key.lstrip("-"), named)
            raise UserError(f"{argument!r} is not key=value{hint}; options: {', '.join(named)}")
        if key in values or key in others:
            raise UserError(f"{key} is given twice")
        if key in named:
            values[key] = _value_of(fields[key], hints[key], text)
        elif rest is not None and fields[rest].metadata["accepts"](key):
            others[key] = text
        else:
            hint = nearest(key.lstrip("-"), named)
            raise UserError(f"option {key!r} is unknown{hint}; options: {', '.join(named)}")
    missing = [name for name in named if fields[name].default == MISSING and name not in values]
    if missing:
        raise UserError(f"{', '.join(missing)} not given; --help lists the options")
    return kind(**values, **({rest: others} if rest else {}))


def as_arguments(options: Any) -> list[str]:
    """The `key=value` arguments that `parse_options` reads as `options`; defaults are left out."""
    arguments = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if "accepts" in field.metadata:
            arguments += [f"{key}={text}" for key, text in value.items()]
        elif value != _default_of(field):
            arguments.append(f"{field.name}={text_of(value)}")
    return arguments


def text_of(value: Any) -> str:
    """A value as it is written on the command line, ours and Hydra's."""
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_script(
    main: Callable[[Options], int | None], description: str | None, options: type[Options]
) -> None:
    """Run a script of `scripts/`: `main` on its options, or for --help show what there is.

    Help is `description` and every option. Log lines go to stderr. Exits with what `main` returns.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        with exit_with_one_line():
            print(description)
            print("Options (key=value; default in brackets):")
            _print_settings(_options_of(options), 20)
        return
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S"
    )
    for name in ("matryoshka_lora", "hydra_plugins"):
        logging.getLogger(name).setLevel(logging.INFO)
    with exit_with_one_line():
        code = main(parse_options(options, sys.argv[1:]))
    sys.exit(code)


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Show a user's mistake as one line and exit with 1; Ctrl-C exits with 130.

    Says nothing, and exits with 1, where nobody reads the output any more, as behind `| head`.
    Any other error is shown as one line that says so, with its traceback. With HYDRA_FULL_ERROR=1
    in the environment every error is raised as it is.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    # Hydra then raises what happened instead of printing and exiting itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
        sys.stdout.flush()
        _leave_processes()
        return
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)
    except (Exception, _PastHydra) as raised:
        error = raised.error if isinstance(raised, _PastHydra) else raised
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before
    if before == "1":
        raise error
    _let_launcher_end(error)
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        # Else the interpreter tries again, and complains, when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    # Every process that was started for a run shows its own; the first one's are the run's.
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error in process {rank}"
    if is_of_the_user(error):
        print(f"{who}: {one_line(error)}", file=sys.stderr)
    else:
        what = f"{type(error).__name__}: {one_line(error)}"
        print(f"{who}: this is a bug or the environment, not your input: {what}", file=sys.stderr)
        traceback.print_exception(error)
    sys.exit(1)


class LogHandler(logging.StreamHandler):
    """Hydra's, but a broken pipe ends the run, as it does where something is printed.

    Python's would print a traceback for every line, and the run would go on for nobody.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exception(), BrokenPipeError):
            raise  # logging calls this while it handles the error
        super().handleError(record)


def _nobody_reads() -> bool:
    """Whether it is the pipe of the output that broke, not one between processes."""
    try:
        sys.stdout.flush()
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def is_of_the_user(error: BaseException) -> bool:
    """Whether the message alone says what to mend: a missing file, a full disk, a wrong setting."""
    return isinstance(error, OF_THE_USER) or (
        isinstance(error, OSError) and error.filename is not None
    )


@contextmanager
def past_hydra() -> Iterator[None]:
    """In a function that Hydra runs: take errors of a single run to `exit_with_one_line`.

    Hydra would print a line of its own first. In a multirun that line is wanted, because it names
    the job that failed, and the error is Hydra's to handle.
    """
    try:
        yield
    except Exception as error:
        if HydraConfig.get().mode is not RunMode.RUN:
            raise
        raise _PastHydra(error) from None


class _PastHydra(BaseException):
    """Carries an error; no Exception, because Hydra catches those."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def is_swept() -> bool:
    """In a function that Hydra runs: whether this run is one of several of a sweep or a grid."""
    return HydraConfig.get().mode is RunMode.MULTIRUN or JOB in os.environ


def environment_of_children() -> dict[str, str]:
    """This process's environment without what `exit_with_one_line` sets for this process alone."""
    return {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}


def _leave_processes() -> None:
    """End this process's group, whose threads would now and then abort it at its end.

    Only after success: one that failed would wait here for the others.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _let_launcher_end(error: BaseException) -> None:
    """Where the error is that another process is gone, wait for the launcher to end this one.

    `processes.tell_who_ended` then says what happened, and the launcher's own report names the
    process that ended first.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    # gloo raises a RuntimeError that names the file of its source.
    if isinstance(error, distributed.DistError) or "gloo/transport" in str(error):
        time.sleep(LAUNCHER_SECONDS)


def one_line(error: BaseException) -> str:
    """The message of an error, with the nearest valid names where a key or choice is unknown."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]}: {one_line(cause)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} is not key=value as Hydra reads it: no space around =, and a "
            "value with other characters in quotes of its own, \"key='value'\""
        )
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        schema = error.object_type
        known = (
            [f.name for f in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else []
        )
        first = str(error).splitlines()[0]
        return f"{first}{nearest(str(error.key), known)}; allowed: {', '.join(known)}"
    if isinstance(error, MissingConfigException):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        name = str(error.missing_cfg_file or "").rpartition("/")[2]
        options = [str(option) for option in error.options or []]
        return f"{lines[0]}; allowed: {', '.join(options)}{nearest(name, options)}"
    # OmegaConf adds two lines on classes of this package.
    stripped = (line.strip() for line in str(error).splitlines())
    return " ".join(
        line
        for line in stripped
        if line and not line.startswith(("reference_type=", "object_type="))
    )


def settings(node: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, value, meaning) of every setting of a `Config`, or of a section named `prefix`."""
    found: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            found += settings(value, f"{key}.")
        else:
            found.append((key, "null" if value is None else str(value), field.metadata["help"]))
    return found


def _options_of(kind: type) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every option of a script."""
    found = []
    for field in dataclasses.fields(kind):
        if "accepts" in field.metadata:
            found.append(("...=...", "none", field.metadata["help"]))
            continue
        default, text = _default_of(field), field.metadata["help"]
        if choices := field.metadata.get("choices"):
            text += f" ({', '.join(choices)})"
        if field.metadata.get("positional"):
            text += "; the first argument may be the value alone"
        found.append((field.name, "required" if default == MISSING else text_of(default), text))
    return found


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _value_of(field: dataclasses.Field[Any], hint: Any, text: str) -> Any:
    """The text of an option as a value of its type. Raises UserError."""
    given, words = f"{field.name}={text}", field.metadata.get("words", {})
    if text in words:
        return words[text]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if text == "null" and types.NoneType in kinds:
        return None
    (kind,) = (kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is not list:
        return _scalar(given, kind, text, field.metadata.get("choices", ()))
    (kind,) = typing.get_args(kind)
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    parts = [part.strip().strip("'\"") for part in inner.split(",")] if inner or not text else []
    found = [_scalar(given, kind, part, field.metadata.get("choices", ())) for part in parts]
    if len(set(found)) < len(found):
        raise UserError(f"{given} must name values, each once, separated by commas")
    return found


def _scalar(given: str, kind: type, text: str, choices: Collection[str]) -> Any:
    if not text:
        raise UserError(f"{given} lacks a value")
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise UserError(f"{given} must be true or false (or 1 or 0)")
        return BOOLEANS[text.lower()]
    try:
        value = kind(text)
    except ValueError:
        expected = {int: "an integer", float: "a number"}[kind]
        raise UserError(f"{given}: {text!r} is not {expected}") from None
    if choices and value not in choices:
        key = given.partition("=")[0]
        hint = nearest(text, choices)
        raise UserError(f"{key}={text} is unknown; allowed: {', '.join(choices)}{hint}")
    return value


def _print_settings(settings: list[tuple[str, str, str]], width: int = 32) -> None:
    for key, default, text in settings:
        print(f"  {key:<{width}} {text} [{default}]")


def show_help(configs: Path) -> None:
    """Print usage, the config groups as they lie on disk, and every setting of a plain run."""
    with initialize_config_dir(str(configs.absolute()), version_base="1.3"):
        plain = typed_config(compose("train"))
    print(
        f"Fine-tune once, use the adapter at any rank.\n\n{EXAMPLES}\n\n"
        "Config groups (group=choice):"
    )
    for folder in sorted(p for p in configs.iterdir() if p.is_dir() and p.name != "accelerate"):
        choices = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        if choices:
            print(f"  {folder.name:<12} {choices}")
    print("\nSettings (key=value; default in brackets, which another choice may change):")
    _print_settings(settings(plain))
    print("\nHydra's own options: python train.py --hydra-help")
