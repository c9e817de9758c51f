"""What every command has in common: how errors are shown, and the help text."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from matryoshka_lora.config import Config
from matryoshka_lora.core.errors import nearest

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python train.py                                         the embedded model on the embedded data
  python train.py method=dylora adapter.rank=16
  python train.py method=matryoshka model=llama3_8b       GSM8K, 3- and 8-shot
  python train.py -m method=lora,matryoshka seed=42,666   one run for each combination"""


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Show a user's mistake as one line and exit with 1; Ctrl-C exits with 130.

    With HYDRA_FULL_ERROR=1 in the environment the traceback is shown instead.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    wants_traceback = before == "1"
    # Hydra then raises what happened instead of printing and exiting itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
        _leave_processes()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)
    except (
        ValueError,
        OSError,
        FloatingPointError,
        HydraException,
        OmegaConfBaseException,
    ) as error:
        if wants_traceback:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def environment_of_children() -> dict[str, str]:
    """This process's environment without what `exit_with_one_line` sets for this process alone."""
    return {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}


def run_script(
    main: Callable[[list[str]], int | None], description: str | None, options: type | None = None
) -> None:
    """What a script of `scripts/` does with its arguments: run `main`, or show what there is.

    That is `description`, and the fields of `options`, a dataclass.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s")
    logging.getLogger("matryoshka_lora").setLevel(logging.INFO)
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(description)
        if options is not None:
            print("Options (key=value; default in brackets):")
            _print_settings(_settings_of(options()))
    else:
        with exit_with_one_line():
            code = main(sys.argv[1:])
        sys.exit(code)


def _leave_processes() -> None:
    """End this process's group, whose threads would now and then abort it at its end.

    Only after success: one that failed would wait here for the others.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def one_line(error: BaseException) -> str:
    """The message of an error, with the nearest valid names where a key or choice is unknown."""
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]}: {one_line(cause)}"
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
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def settings() -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every setting."""
    return _settings_of(Config())


def _settings_of(node: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            found += _settings_of(value, f"{key}.")
        else:
            found.append((key, "null" if value is None else str(value), field.metadata["help"]))
    return found


def _print_settings(settings: list[tuple[str, str, str]]) -> None:
    for key, default, text in settings:
        print(f"  {key:<32} {text} [{default}]")


def show_help(configs: Path) -> None:
    """Print usage, the config groups as they lie on disk, and every setting."""
    print(
        f"Fine-tune once, use the adapter at any rank.\n\n{EXAMPLES}\n\n"
        "Config groups (group=choice):"
    )
    for folder in sorted(p for p in configs.iterdir() if p.is_dir() and p.name != "accelerate"):
        choices = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        if choices:
            print(f"  {folder.name:<12} {choices}")
    print("\nSettings (key=value; default in brackets; a chosen config may set another):")
    _print_settings(settings())
    print("\nHydra's own options: python train.py --hydra-help")
