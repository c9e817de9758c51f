"""A process that runs a script for one job after another: imports and compiling are paid once.

    python -m hydra_plugins.gpu_queue.worker SCRIPT DESCRIPTOR

Each line of standard input is a job, `{"arguments": [...], "log": path}`: the script runs as
`python SCRIPT arguments` would, its output is appended to the log, and a line with its exit code
goes to the file descriptor. A job that fails leaves the worker alive.
"""

import gc
import json
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 130


def main(script: str, descriptor: str) -> None:
    # Its folder is where the script's own imports are, as when Python is started with it.
    sys.path[0] = str(Path(script).resolve().parent)
    with os.fdopen(int(descriptor), "w") as answers:
        for line in sys.stdin:
            job = json.loads(line)
            with open(job["log"], "ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = run(script, job["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            print(code, file=answers, flush=True)
            if code == INTERRUPTED:
                return
            forget()


def run(script: str, arguments: Sequence[str]) -> int:
    """The exit code of `python script arguments`."""
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, str):
            return int(end.code or 0)
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forget() -> None:
    """Drop what a job leaves behind: Hydra's one instance, and memory that other workers may use.

    Raises an error, and so ends the worker, where a job has left the GPU unusable.
    """
    if (hydra := sys.modules.get("hydra.core.global_hydra")) is not None:
        hydra.GlobalHydra.instance().clear()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
