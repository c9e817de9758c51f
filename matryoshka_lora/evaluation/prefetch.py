"""An engine's answers, made in a thread of their own while the caller scores earlier ones."""

import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from queue import Full, Queue
from typing import TypeVar

import torch

from matryoshka_lora.evaluation.engines.protocol import Engine, Outputs, Point, Request

MAX_PREFETCHED = 4096
"""Answers of an engine that may wait to be scored."""
SWITCH_SECONDS = 1e-4
"""After which Python lets another thread run that waits. By default 5 ms, which the engine would
wait after each call that releases the interpreter (copies, graph launches) while the caller
scores: longer than a decode step of a small model."""

T = TypeVar("T")


class _End:
    """Stands behind the last item."""


def answers_of(
    engine: Engine, jobs: Sequence[tuple[Point, Request]], parts: Iterator[range] | None = None
) -> Outputs:
    """`engine.run(jobs, parts)`, prefetched where a GPU works in the meantime.

    On a CPU the engine and the caller want the same cores, and each would wait for the other. In
    lockstep one thread alone calls collectives, so that all processes call them in one order.
    """
    answers = engine.run(jobs, parts)
    return prefetch(answers) if torch.cuda.is_initialized() and not engine.lockstep else answers


def prefetch(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, made in another thread, at most MAX_PREFETCHED before they are taken.

    The harness takes half a millisecond to score an answer, and the device would wait for it.
    Scoring stays in the caller's thread: graders of the harness set alarms, which only the main
    thread can. Closing this closes `items`, and waits until that is done.
    """
    made: Queue[T | _End] = Queue(MAX_PREFETCHED)
    closed = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def hand_over(item: T | _End) -> bool:
        while not closed.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own
        try:
            with closing(items):
                for item in items:
                    if not hand_over(item):
                        return
        finally:
            hand_over(_End())

    with frequent_switches(), ThreadPoolExecutor(max_workers=1) as thread:
        working = thread.submit(work)
        try:
            while not isinstance(item := made.get(), _End):
                yield item
        finally:
            closed.set()
        working.result()  # raises what `items` raised


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Threads of this process take turns every SWITCH_SECONDS, for a block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
