"""torchrun, for a job of several processes whose end the queue understands.

    python -m hydra_plugins.gpu_queue.processes OPTIONS SCRIPT ARGUMENTS

torchrun describes the end of a process in thirty lines and always exits with 1. This says it in
one, and where the process was killed it ends by the same signal, as a job of one process does.
"""

import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> None:
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # it has said why
            sys.exit(failure.exitcode)
        print(
            f"error: process {rank} was killed ({failure.signal_name()})",
            file=sys.stderr,
            flush=True,
        )
        os.kill(os.getpid(), -failure.exitcode)


if __name__ == "__main__":
    run()
