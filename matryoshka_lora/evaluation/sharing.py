"""The documents of a sweep over several processes: who answers what, and how it reaches the writer.

Each process takes a few more whenever it has room for them, so a slow one answers fewer, and sends
what it has scored to the main one. Both go through the key-value store of the process group; no
call waits for the slowest process, as a collective would.
"""

import io
import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator

LARGEST_PART = 64
"""Units that a process takes at once; fewer at the end of the list."""
PARTS_LEFT = 8
"""Parts that are left for each process when parts become smaller."""
SEND_COUNT, SEND_BYTES, SEND_SECONDS = 256, 2**20, 5.0
"""A process sends when it has so many items or bytes (the store takes 8 MiB), or after so long."""
LOOK_SECONDS = 0.2
"""Between two looks of the main process at what the others have sent."""
SILENCE_SECONDS = 1800.0
"""Without a word from the others, after which the main process does not wait any more."""

T = TypeVar("T")


class Exchange(Generic[T]):
    """One list of units that the processes share, and the items that they make of them.

    name: one of its own, the same on all processes.
    """

    def __init__(self, processes: Accelerator, name: str) -> None:
        store = torch.distributed.distributed_c10d._get_default_store()
        # Any: its stubs know nothing of bytes, which it takes and gives.
        self._store: Any = torch.distributed.PrefixStore(name, store)
        self._process, self._processes = processes.process_index, processes.num_processes

    def parts(self, count: int) -> Iterator[range]:
        """Of `count` units, those that this process is to do; the next ones each time it asks."""
        parts = parts_of(count, self._processes)
        while (number := self._store.add("taken", 1) - 1) < len(parts):
            yield parts[number]

    def send(self, items: Iterable[T]) -> None:
        """Send items to the main process as they are made; on all others."""
        message, count, sent, number = io.BytesIO(), 0, time.monotonic(), 0
        for item in items:
            pickle.dump(item, message)
            count += 1
            late = time.monotonic() - sent > SEND_SECONDS
            if late or count == SEND_COUNT or message.tell() > SEND_BYTES:
                self._store.set(f"{self._process}/{number}", message.getvalue())
                message, count, sent, number = io.BytesIO(), 0, time.monotonic(), number + 1
        self._store.set(f"{self._process}/{number}", message.getvalue())
        self._store.set(f"{self._process}/{number + 1}", b"")  # an empty one is the last

    def gather(self, items: Iterable[T]) -> Iterator[T]:
        """The items of the main process, which calls this, and between them those of all others.

        Raises RuntimeError where the others are silent for SILENCE_SECONDS while it waits.
        """
        number = dict.fromkeys(range(1, self._processes), 0)
        looked = heard = time.monotonic()
        for item in items:
            yield item
            heard = time.monotonic()
            if heard - looked > LOOK_SECONDS:
                yield from self._receive(number)
                looked = time.monotonic()
        while number:
            found = list(self._receive(number))
            yield from found
            now = time.monotonic()
            if found:
                heard = now
            elif now - heard > SILENCE_SECONDS:
                silent = ", ".join(map(str, number))
                raise RuntimeError(f"process {silent} has not answered for {SILENCE_SECONDS:.0f} s")
            else:
                time.sleep(LOOK_SECONDS / 10)

    def _receive(self, number: dict[int, int]) -> Iterator[T]:
        """What has been sent. number: of each process's next message; the done ones are removed."""
        for process in list(number):
            while self._store.check([key := f"{process}/{number[process]}"]):
                message = self._store.get(key)
                self._store.delete_key(key)
                number[process] += 1
                if not message:
                    del number[process]
                    break
                stream = io.BytesIO(message)
                with suppress(EOFError):
                    while True:
                        yield pickle.load(stream)


def parts_of(count: int, processes: int) -> list[range]:
    """`count` units in parts: of LARGEST_PART, and ever smaller ones at the end.

    All processes then end at about the same time.
    """
    parts: list[range] = []
    start = 0
    while start < count:
        size = max(1, min(LARGEST_PART, (count - start) // (PARTS_LEFT * processes)))
        parts.append(range(start, start + size))
        start += size
    return parts
