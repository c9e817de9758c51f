"""The documents of a sweep over several processes: who answers what, and how it reaches the writer.

Each process takes a few more whenever it has room for them, so a slow one answers fewer, and sends
what it has scored to the main one. Both go through the store that the processes have met at; no
call waits for the slowest process, as a collective would.
"""

import pickle
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator

LARGEST_PART = 64
"""Units that a process takes at once; fewer at the end of the list."""
PARTS_LEFT = 8
"""Parts that are left for each process when parts become smaller."""
SEND_SECONDS, SEND_BYTES = 1.0, 2**20
"""A process sends when its last message is so old, or it has so many bytes; the store takes 8 MiB
at once. A message for each item would cost the main process as much as writing it."""
LOOK_SECONDS = 0.02
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
        self._store = torch.distributed.PrefixStore(name, store)
        self._process, self._processes = processes.process_index, processes.num_processes

    def parts(self, count: int) -> Iterator[range]:
        """Of `count` units, those that this process is to do; the next ones each time it asks."""
        parts = parts_of(count, self._processes)
        while (number := self._store.add("taken", 1) - 1) < len(parts):
            yield parts[number]

    def send(self, items: Iterable[T]) -> None:
        """Send items to the main process as they are made; on all others."""
        made: list[bytes] = []
        size, sent = 0, time.monotonic()
        for item in items:
            made.append(pickle.dumps(item))
            size += len(made[-1])
            if time.monotonic() - sent > SEND_SECONDS or size > SEND_BYTES:
                self._push(made)
                made, size, sent = [], 0, time.monotonic()
        if made:
            self._push(made)
        self._push([])  # the last message

    def gather(self, items: Iterable[T]) -> Iterator[T]:
        """The items of the main process, which calls this, and between them those of all others.

        Raises RuntimeError where the others are silent for SILENCE_SECONDS while it waits.
        """
        working = set(range(1, self._processes))
        looked = time.monotonic()
        for item in items:
            yield item
            if time.monotonic() - looked > LOOK_SECONDS:
                yield from self._received(working)
                looked = time.monotonic()
        heard = time.monotonic()
        while working:
            time.sleep(LOOK_SECONDS)
            for item in self._received(working):
                yield item
                heard = time.monotonic()
            if working and time.monotonic() - heard > SILENCE_SECONDS:
                silent = ", ".join(map(str, sorted(working)))
                raise RuntimeError(f"process {silent} has not answered for {SILENCE_SECONDS:.0f} s")

    def _push(self, made: list[bytes]) -> None:
        self._store.queue_push("sent", pickle.dumps((self._process, made)))

    def _received(self, working: set[int]) -> Iterator[T]:
        """What was sent before this call. working: processes; those that are done are removed."""
        for _ in range(self._store.queue_len("sent")):
            process, made = pickle.loads(self._store.queue_pop("sent"))
            yield from map(pickle.loads, made)
            if not made:
                working.remove(process)


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
