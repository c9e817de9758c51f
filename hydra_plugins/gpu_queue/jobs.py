"""The queue itself, without Hydra: jobs wait for a free slot, a slot is one or more GPUs."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from matryoshka_lora.cli import JOB, environment_of_children
from matryoshka_lora.core.errors import UserError

logger = logging.getLogger(__name__)

# Seconds that interrupted jobs get to end by themselves, and then to end when told to.
GRACE, PATIENCE = 2.0, 30.0


@dataclass(frozen=True)
class Slot:
    """What one job at a time runs on: `processes` > 1 are started by torchrun, one a GPU."""

    name: str
    environment: Mapping[str, str]
    processes: int = 1


@dataclass(frozen=True)
class Job:
    """`python <script> <overrides>`; the name goes into messages and names the log file."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a job ended; `error` is None where it exited with 0."""

    job: Job
    log: Path
    seconds: float
    error: str | None


def find_slots(gpus: int | Sequence[int | str] | None, gpus_per_job: int = 1) -> list[Slot]:
    """The slots of this host.

    gpus: null takes all visible GPUs, a number the first so many, a list those ids. Without a GPU a
    number gives as many CPU slots, which share the cores, and null gives one. Raises UserError for
    GPUs that are not there, and for a number that `gpus_per_job` does not divide.
    """
    ids = visible_gpus()
    wanted: list[str]
    if gpus is None:
        wanted = ids or ["cpu"] * gpus_per_job
    elif isinstance(gpus, int) and not isinstance(gpus, bool):
        if gpus < 1 or (ids and gpus > len(ids)):
            raise UserError(
                f"gpus={gpus} must be 1 to {len(ids)}" if ids else "gpus must be positive"
            )
        wanted = ids[:gpus] or ["cpu"] * gpus
    elif isinstance(gpus, Sequence) and not isinstance(gpus, str):
        wanted = [str(gpu) for gpu in gpus]
        if unknown := [gpu for gpu in wanted if gpu not in ids]:
            raise UserError(
                f"gpus={list(gpus)}: {', '.join(unknown)} not visible; "
                f"visible: {', '.join(ids) or 'none'}"
            )
    else:
        raise UserError(f"gpus={gpus!r} must be null, a number or a list of GPU ids")
    if not wanted or (ids and len(set(wanted)) < len(wanted)):
        raise UserError(f"gpus={list(wanted)} must name each GPU once, and at least one")
    if gpus_per_job < 1 or len(wanted) % gpus_per_job:
        raise UserError(
            f"gpus_per_job={gpus_per_job} does not divide {len(wanted)} GPUs or CPU slots"
        )
    shares = [wanted[i : i + gpus_per_job] for i in range(0, len(wanted), gpus_per_job)]
    if ids:
        return [
            Slot(f"GPU {','.join(share)}", {"CUDA_VISIBLE_DEVICES": ",".join(share)}, len(share))
            for share in shares
        ]
    threads = max(1, (os.cpu_count() or 1) // len(wanted))
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    return [Slot(f"CPU slot {number}", environment, gpus_per_job) for number in range(len(shares))]


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # here, because Hydra imports every plugin module at each start

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in given.split(",")][:count]


def run_jobs(
    jobs: Sequence[Job], slots: Sequence[Slot], script: Path, logs: Path, *, show: bool = False
) -> list[Outcome]:
    """Run every job, as many at a time as there are slots; a failed one does not stop the others.

    logs: folder for the jobs' output, appended to `<job name>.log`; `show` prints it here as well.
    An interrupt (Ctrl-C or SIGTERM) ends the running jobs, starts no other and raises
    KeyboardInterrupt.
    """
    logs.mkdir(parents=True, exist_ok=True)
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)
    running: set[subprocess.Popen[bytes]] = set()
    lock = threading.Lock()
    stopping = threading.Event()
    done: list[Outcome] = []

    def work(job: Job) -> Outcome | None:
        slot = free.get()
        log = logs / f"{file_name(job.name)}.log"
        began = time.monotonic()
        try:
            with log.open("ab") as output:
                start = output.tell()  # behind what an earlier attempt left
                with lock:
                    if stopping.is_set():
                        return None
                    process = _start(job, slot, script, None if show else output)
                    running.add(process)
                logger.info("started on %s: %s -> %s", slot.name, job.name, log)
                if isinstance(pipe := process.stdout, io.BufferedReader):
                    for chunk in iter(pipe.read1, b""):
                        output.write(chunk)
                        sys.stdout.buffer.write(chunk)
                        sys.stdout.flush()
                code = process.wait()
            with lock:
                running.discard(process)
                text = log.read_bytes()[start:].decode(errors="replace")
                error = None if code == 0 else f"exit code {code}: {last_error(text)}"
                outcome = Outcome(job, log, time.monotonic() - began, error)
                done.append(outcome)
                if not stopping.is_set():
                    _report(outcome, len(done), len(jobs))
            return outcome
        finally:
            free.put(slot)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with ThreadPoolExecutor(len(slots)) as pool:
            futures = [pool.submit(work, job) for job in jobs]
            try:
                outcomes = [future.result() for future in futures]
            except BaseException:
                with lock:
                    stopping.set()
                for future in futures:
                    future.cancel()
                _end(list(running))
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return [outcome for outcome in outcomes if outcome is not None]


def file_name(name: str) -> str:
    """`name` as one segment of a path."""
    return re.sub(r"[^\w.,=+-]+", "-", name)[:200].strip("-") or "job"


def last_error(text: str) -> str:
    """The last line that starts with `error:`, without that word, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1]


def _start(job: Job, slot: Slot, script: Path, output: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable]
    if slot.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={slot.processes}"]
    return subprocess.Popen(
        [*command, str(script), *job.overrides],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if output is None else output,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        env={**environment_of_children(), JOB: "1", "PYTHONUNBUFFERED": "1", **slot.environment},
    )


def _report(outcome: Outcome, number: int, total: int) -> None:
    if outcome.error is None:
        logger.info("[%d/%d] done in %.0f s: %s", number, total, outcome.seconds, outcome.job.name)
    else:
        logger.error("[%d/%d] failed: %s: %s", number, total, outcome.job.name, outcome.error)


def _end(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    """End interrupted jobs: a terminal's Ctrl-C has reached them already, a lone signal has not."""
    for seconds, next_signal in ((GRACE, signal.SIGINT), (PATIENCE, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(next_signal)
