"""CUDA graphs of functions that work on tensors of fixed places and sizes.

A forward of a small model is thousands of short kernels, which take longer to launch one by one
than to run. A graph launches all of them at once.
"""

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Function = Callable[[], Tensor]


def cuda_capture(function: Function, pool: object) -> Function:
    """Record what `function` asks of the device; the result replays it into the same tensor."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Graphs:
    """Calls functions, from the second call of a key on as graphs that share their memory.

    The first call runs as it is, which is when layers compile and libraries set themselves up. All
    that a function reads and leaves behind must stay where it is between calls, and its result is
    good until the next call. A function that cannot be captured, because it waits for the device or
    for want of memory, is named in the log, and everything runs as it is from then on.
    """

    def __init__(self, capture: Callable[[Function, object], Function] = cuda_capture) -> None:
        self._capture = capture
        self._pool = torch.cuda.graph_pool_handle() if capture is cuda_capture else None
        self._seen: set[Hashable] = set()
        self._replays: dict[Hashable, Function] = {}
        self._off = False

    def __call__(self, key: Hashable, function: Function) -> Tensor:
        """key: stands for the function and for the sizes of all that it works on."""
        if self._off or key not in self._seen:
            self._seen.add(key)
            return function()
        if key not in self._replays:
            try:
                self._replays[key] = self._capture(function, self._pool)
            except RuntimeError as error:
                logger.warning("going on without CUDA graphs: %s", str(error).partition("\n")[0])
                self._off = True
                self._replays.clear()
                return function()
        return self._replays[key]()
