"""CUDA graphs of functions that work on tensors of fixed places and sizes.

A forward of a small model is thousands of short kernels, which take longer to launch one by one
than to run. A graph launches all of them at once.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

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
    """Calls functions as graphs that share their memory, one for each key.

    The first function of a kind runs as it is, which is when layers compile and libraries set
    themselves up; all others are captured at once, so that no memory but the graphs' is needed for
    them. All that a function reads and leaves behind must stay where it is between calls, and its
    result is good until the next call.
    """

    def __init__(self, capture: Callable[[Function, object], Function] = cuda_capture) -> None:
        self._capture = capture
        self._pool = torch.cuda.graph_pool_handle() if capture is cuda_capture else None
        self._kinds: set[Hashable] = set()
        self._replays: dict[Hashable, Function] = {}

    def __call__(self, kind: Hashable, sizes: Hashable, function: Function) -> Tensor:
        """kind: of functions that run the same code; sizes: of all that this one works on.

        Raises ValueError for what cannot be captured, such as a function that waits for the device.
        """
        if kind not in self._kinds:
            self._kinds.add(kind)
            return function()
        key = (kind, sizes)
        if key not in self._replays:
            try:
                self._replays[key] = self._capture(function, self._pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # The device stays in the middle of the capture, so there is no going on without.
                raise ValueError(
                    f"this model cannot be captured as a CUDA graph ({_cause(error)}); set "
                    "trainer.cuda_graphs=false and eval.cuda_graphs=false"
                ) from error
        return self._replays[key]()


def _cause(error: BaseException) -> str:
    """The first line of what failed first: the end of a failed capture fails, too."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]
