"""A sweep's documents shared out over processes, which are threads of this one here."""

import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from matryoshka_lora.evaluation import sharing
from matryoshka_lora.evaluation.sharing import LARGEST_PART, PARTS_LEFT, Exchange, parts_of


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.distributed.TCPStore]:
    """The one that a launcher's processes meet at."""
    here = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    c10d = torch.distributed.distributed_c10d
    monkeypatch.setattr(c10d, "_get_default_store", lambda: here)
    yield here


def exchange(process: int, processes: int, name: str = "x") -> Exchange[Any]:
    place = SimpleNamespace(process_index=process, num_processes=processes)
    return Exchange(cast(Accelerator, place), name)


@pytest.mark.parametrize(("count", "processes"), [(0, 2), (1, 4), (7, 2), (1319, 4), (23742, 8)])
def test_parts_become_smaller_at_the_end(count: int, processes: int) -> None:
    parts = parts_of(count, processes)
    assert [unit for part in parts for unit in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True) and all(0 < size <= LARGEST_PART for size in sizes)
    assert sizes[-PARTS_LEFT * processes :] == [1] * min(PARTS_LEFT * processes, count)


@pytest.mark.parametrize("send_seconds", [0.0, 0.01, 100.0])
@pytest.mark.parametrize("count", [0, 2, 700])
def test_all_items_arrive_once(
    count: int, send_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "SEND_SECONDS", send_seconds)
    monkeypatch.setattr(sharing, "SEND_BYTES", 2000)

    def work(process: int, name: str) -> list[tuple[int, int, str]]:
        mine = exchange(process, 4, name)

        def items() -> Iterator[tuple[int, int, str]]:
            for part in mine.parts(count):
                for number in random.Random(process).sample(part, len(part)):
                    time.sleep(0.002 if process == 2 else 0.0002)
                    yield process, number, "x" * number

        if process:
            mine.send(items())
            return []
        return list(mine.gather(items()))

    with ThreadPoolExecutor(4) as pool:
        # Two lists one after the other, as two tasks are: who is done with one starts the next.
        both = [pool.submit(lambda p=p: [work(p, name) for name in ("a", "b")]) for p in range(4)]
        for found in both[0].result():
            assert sorted(number for _, number, _ in found) == list(range(count))
            assert all(text == "x" * number for _, number, text in found)
            by = [[number for p, number, _ in found if p == process] for process in range(4)]
            if count > 100:
                assert len(by[2]) < max(len(by[1]), len(by[3]))  # who is slow takes less


def test_items_arrive_while_the_main_process_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "SEND_SECONDS", 0.0)
    exchange(1, 2).send(iter(["theirs"] * 3))

    def slow() -> Iterable[str]:
        for _ in range(3):
            time.sleep(2 * sharing.LOOK_SECONDS)
            yield "mine"

    assert list(exchange(0, 2).gather(slow())) == ["mine", *["theirs"] * 3, "mine", "mine"]


def test_a_process_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "SILENCE_SECONDS", 0.2)
    exchange(1, 4).send(iter(["theirs"]))
    stuck = threading.Thread(target=lambda: exchange(3, 4)._push([]))
    found = exchange(0, 4).gather(iter(["mine"]))
    assert [next(found), next(found)] == ["mine", "theirs"]
    stuck.start()
    with pytest.raises(RuntimeError, match="process 2 has not answered"):
        next(found)
