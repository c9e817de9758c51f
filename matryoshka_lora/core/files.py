"""Writing files so that no reader ever sees half of one."""

import os
import tempfile
from pathlib import Path

from matryoshka_lora.core.errors import UserError


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
    system. On an OSError (a full disk) the old file is untouched and the temporary one removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"cannot write {path} ({reason}); an older version of this "
            "file, if there was one, is unchanged",
        ) from error
