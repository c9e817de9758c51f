"""CUDA graphs of functions that work on tensors of fixed addresses and sizes.

A forward of a small model is thousands of short kernels, which take longer to launch one by one
than to run. A graph launches all of them at once.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from matryoshka_lora.core.errors import UserError

Function = Callable[[], Tensor]


def cuda_capture(function: Function, pool: object) -> Function:
    """Record what `function` launches; the result replays it and returns the same tensor."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Graphs:
    """Calls functions as CUDA graphs, one for each kind and sizes, which share their memory.

    The first call of a kind runs the function itself, so that layers compile and libraries
    initialise outside a capture. Every further call is captured, if it is the first of its sizes,
    and replayed, so no memory is needed but that of the graphs. All that a function reads and
    writes must stay at its address between calls, and its result is valid until the next call.
    """

    def __init__(self, capture: Callable[[Function, object], Function] = cuda_capture) -> None:
        self._capture = capture
        self._pool = torch.cuda.graph_pool_handle() if capture is cuda_capture else None
        self._kinds: set[Hashable] = set()
        self._replays: dict[Hashable, Function] = {}

    def __call__(self, kind: Hashable, sizes: Hashable, function: Function) -> Tensor:
        """kind: names functions that run the same code; sizes: of the tensors that it works on.

        Raises UserError for what cannot be captured, such as a function that waits for the device.
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
                # The device is left within the capture, so the run cannot go on without graphs.
                raise UserError(
                    f"this model cannot be captured as a CUDA graph ({_cause(error)}); set "
                    "trainer.cuda_graphs=false and eval.cuda_graphs=false"
                ) from error
        return self._replays[key]()


def _cause(error: BaseException) -> str:
    """The first line of the first error, as the end of a failed capture raises another."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]
