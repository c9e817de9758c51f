"""Writing files so that no reader ever sees half of one, and reading JSON that may be damaged."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matryoshka_lora.core.errors import UserError


class CannotWrite(OSError, UserError):
    """The disk refused a file: it is full, broken, or not to be written."""

    def __str__(self) -> str:
        return str(self.strerror)


def check_writable(folder: Path, setting: str, advice: str) -> None:
    """Raises UserError unless `folder` is, or can be made, a folder that can be written.

    setting: what named the folder; advice: what to do instead.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{setting}: {folder} cannot be written ({error.strerror}); {advice}"
        ) from None


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data` so that no reader ever sees half of it; makes missing folders.

    The temporary file lies in the same folder, because a rename is atomic only within one file
    system. Raises CannotWrite (a full disk); the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path, "an older version of this file, if there was one, is unchanged"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:  # an interrupt, too, must not leave the temporary file
            # With a file in the folder's place there is nothing to remove.
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path, state: str, *others: type[Exception]) -> Iterator[None]:
    """While `path` is written: errors of the disk become a CannotWrite that names it.

    state: of what was there before, for the message. others: what a library raises where the disk
    refuses; such an error is taken for the disk's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, *others)):
            raise
        code, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        raise CannotWrite(code, f"cannot write {path} ({reason or error}); {state}") from error


def parse_json(
    text: str | bytes, line: int = 1, parse_constant: Callable[[str], Any] | None = None
) -> Any:
    """What JSON says; the errors of all kinds of damage are one.

    line: the number of the text's first line in its file. parse_constant: as of `json.loads`.
    Raises UserError, to be put behind "FILE is", for what is no JSON or no UTF-8, for nesting that
    Python cannot follow, for a key that an object has twice, of which Python keeps the last, and
    for halves of characters, which no tokenizer and no file takes.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        value = json.loads(decoded, parse_constant=parse_constant, object_pairs_hook=_object)
        # Only an escape makes one, so that most texts need no second look.
        if "\\ud" in decoded.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON at line {line + error.lineno - 1}: {error.msg}") from error
    except UnicodeDecodeError as error:
        number = line + error.object[: error.start].count(b"\n")
        raise UserError(f"not UTF-8 text at line {number}: {error.reason}") from error
    except UnicodeEncodeError as error:
        half = json.dumps(error.object[error.start])
        number = line + decoded.lower().partition(half.strip('"'))[0].count("\n")
        raise UserError(f"not text at line {number}: {half} is half a character") from error
    except ValueError as error:  # such as a number of 5,000 digits
        raise UserError(f"not readable from line {line} on: {error}") from error
    except RecursionError:
        raise UserError(f"not readable from line {line} on: it is nested too deeply") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found
