"""One process at a time works on a run."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.runs.folder import RunFolder

# It tells every attempt.
logging.getLogger("filelock").setLevel(logging.WARNING)


@contextmanager
def locked(folder: RunFolder, main: bool) -> Iterator[None]:
    """Hold the run's lock; main: whether this is the main process, the only one to hold it.

    It is a lock of the operating system, so that of a process that was killed none is left. Raises
    UserError where another process holds it.
    """
    if not main:
        yield
        return
    folder.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.lock, timeout=0):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            folder.lock.write_text(
                f"process {os.getpid()} on {socket.gethostname()}, since {since}"
            )
            yield
    except Timeout:
        owner = folder.lock.read_text() or "another process"
        raise UserError(
            f"{folder.path} is already running ({owner}); wait for its end, or stop it"
        ) from None
