"""The queue itself, without Hydra: jobs wait for a free slot, a slot is one or more GPUs.

A slot's process, see `worker`, takes one job after another; where a job needs several processes,
torchrun starts them anew for each, see `processes`.
"""

import contextlib
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from matryoshka_lora.cli import JOB, environment_of_children
from matryoshka_lora.core.errors import UserError

logger = logging.getLogger(__name__)

# Seconds that interrupted jobs get to end by themselves, and then to end when told to.
GRACE, PATIENCE = 2.0, 30.0
# Seconds between two looks at the output of a job that is shown.
LOOK = 0.2
# How often a job is started whose process is killed, by the system for want of memory, say.
ATTEMPTS = 2


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


def find_slots(
    gpus: int | Sequence[int | str] | None,
    gpus_per_job: int = 1,
    workers_per_gpu: int = 1,
    cpu_slots: int | None = None,
) -> list[Slot]:
    """The slots of this host.

    gpus: null takes all visible GPUs, a number the first so many, a list those ids. Without a GPU a
    number gives as many CPU slots, which share the cores, and null gives one. workers_per_gpu: jobs
    that share a GPU. cpu_slots: so many slots of one thread each instead, whatever GPUs there are.
    Raises UserError for GPUs that are not there, and for a number that `gpus_per_job` does not
    divide.
    """
    if cpu_slots is not None:
        if cpu_slots < 1:
            raise UserError(f"slots={cpu_slots} must be positive")
        return [Slot(f"CPU slot {number}", _on_cpu(1)) for number in range(cpu_slots)]
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
    if workers_per_gpu < 1 or (workers_per_gpu > 1 and gpus_per_job > 1):
        raise UserError(
            f"workers_per_gpu={workers_per_gpu} must be positive, and 1 where gpus_per_job is not"
        )
    shares = [wanted[i : i + gpus_per_job] for i in range(0, len(wanted), gpus_per_job)]
    if not ids:
        threads = max(1, (os.cpu_count() or 1) // len(wanted))
        shared = _on_cpu(int(os.environ.get("OMP_NUM_THREADS", threads)))
        return [Slot(f"CPU slot {number}", shared, gpus_per_job) for number in range(len(shares))]
    slots = []
    for worker in range(workers_per_gpu):
        for share in shares:
            names = ",".join(share)
            environment = {"CUDA_VISIBLE_DEVICES": names}
            if workers_per_gpu > 1:
                threads = max(1, (os.cpu_count() or 1) // (len(shares) * workers_per_gpu))
                environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
            name = f"GPU {names}" + (f" worker {worker}" if workers_per_gpu > 1 else "")
            slots.append(Slot(name, environment, len(share)))
    return slots


def _on_cpu(threads: int) -> dict[str, str]:
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": str(threads),
    }


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # here, because Hydra imports every plugin module at each start

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in given.split(",")][:count]


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    script: Path,
    logs: Path,
    *,
    show: bool = False,
    more: Callable[[Outcome], Sequence[Job]] | None = None,
) -> list[Outcome]:
    """Run every job, as many at a time as there are slots; a failed one does not stop the others.

    logs: folder for the jobs' output, appended to `<job name>.log`; `show` prints it here as well.
    more: called with each outcome, in one thread at a time; the jobs that it returns are run, too.
    A job whose process is killed gets ATTEMPTS in all. An interrupt (Ctrl-C or SIGTERM) ends the
    running jobs, starts no other and raises KeyboardInterrupt.
    """
    logs.mkdir(parents=True, exist_ok=True)
    jobs = list(jobs)
    taken = 0
    running: set[Worker] = set()
    # Also wakes those that wait for a job that another one may bring.
    lock = threading.Condition()
    stopping = threading.Event()
    done: dict[int, Outcome] = {}

    def take() -> int | None:
        """The next job's number; None where there is none and no running one can bring any."""
        nonlocal taken
        with lock:
            if more is not None:
                lock.wait_for(lambda: stopping.is_set() or taken < len(jobs) or len(done) == taken)
            if stopping.is_set() or taken == len(jobs):
                return None
            taken += 1
            return taken - 1

    def serve(slot: Slot) -> None:
        worker = Worker(slot, script)
        try:
            while (number := take()) is not None:
                job = jobs[number]
                log = logs / f"{file_name(job.name)}.log"
                began = time.monotonic()
                start = log.stat().st_size if log.exists() else 0  # behind an earlier attempt's
                for _ in range(ATTEMPTS):
                    with lock:
                        if stopping.is_set():
                            return
                        worker.start(job, log)
                        running.add(worker)
                    logger.info("started on %s: %s -> %s", slot.name, job.name, log)
                    code = worker.wait(log, show)
                    if code >= 0 or stopping.is_set():  # below 0: killed by a signal
                        break
                text = log.read_bytes()[start:].decode(errors="replace")
                error = None if code == 0 else f"exit code {code}: {last_error(text)}"
                outcome = Outcome(job, log, time.monotonic() - began, error)
                with lock:
                    if more is not None and not stopping.is_set():
                        jobs.extend(more(outcome))
                    done[number] = outcome
                    if not stopping.is_set():
                        _report(outcome, len(done), len(jobs))
                    lock.notify_all()
        finally:
            if not stopping.is_set():
                worker.close()

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with ThreadPoolExecutor(len(slots)) as pool:
            useful = slots if more is not None else slots[: len(jobs)]
            served = [pool.submit(serve, slot) for slot in useful]
            try:
                for future in as_completed(served):
                    future.result()
            except BaseException:
                with lock:
                    stopping.set()
                    lock.notify_all()
                _end([worker.process for worker in running if worker.process is not None])
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return [done[number] for number in sorted(done)]


class Worker:
    """The process of a slot: one for all jobs, or where torchrun is needed one for each."""

    def __init__(self, slot: Slot, script: Path) -> None:
        self.slot, self.script = slot, script
        self.process: subprocess.Popen[bytes] | None = None
        self.answers: BinaryIO | None = None
        """Where the process of all jobs says how each ended."""

    def start(self, job: Job, log: Path) -> None:
        """Start the job, in a new process if there is none that lives."""
        log.touch()
        self.shown = log.stat().st_size
        if self.slot.processes > 1:
            self.close()
            command = ["-m", "hydra_plugins.gpu_queue.processes", "--standalone"]
            command += [f"--nproc-per-node={self.slot.processes}"]
            with log.open("ab") as output:
                self._open([*command, str(self.script), *job.overrides], output)
            return
        if self.process is None or self.process.poll() is not None:
            self.close()
            answers, theirs = os.pipe()
            self.answers = os.fdopen(answers, "rb", buffering=0)
            command = ["-m", "hydra_plugins.gpu_queue.worker", str(self.script), str(theirs)]
            with log.open("ab") as output:
                self._open(command, output, pass_fds=(theirs,), stdin=subprocess.PIPE)
            os.close(theirs)
        line = json.dumps({"arguments": job.overrides, "log": str(log.resolve())}) + "\n"
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just died, as `wait` will see
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def wait(self, log: Path, show: bool) -> int:
        """The job's exit code, once it has ended; below 0 is the signal that killed the process."""
        while (code := self._code(LOOK if show else None)) is None:
            self._show(log)
        if show:
            self._show(log)
        return code

    def close(self) -> None:
        """Let the process end; it has no job."""
        if self.process is not None:
            if self.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.close()
            self.process.wait()
        if self.answers is not None:
            self.answers.close()
        self.process = self.answers = None

    def _open(
        self,
        command: list[str],
        output: BinaryIO,
        stdin: int = subprocess.DEVNULL,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **environment_of_children(),
                JOB: "1",
                "PYTHONUNBUFFERED": "1",
                **self.slot.environment,
            },
            stdin=stdin,
            pass_fds=pass_fds,
        )

    def _code(self, seconds: float | None) -> int | None:
        """The exit code, or None where there is none within the time."""
        assert self.process is not None
        if self.answers is None:
            try:
                return self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
        if not select.select([self.answers], [], [], seconds)[0]:
            return None
        answer = self.answers.readline()
        return int(answer) if answer else self.process.wait()

    def _show(self, log: Path) -> None:
        with log.open("rb") as output:
            output.seek(self.shown)
            text = output.read()
        self.shown += len(text)
        sys.stdout.buffer.write(text)
        sys.stdout.flush()


def file_name(name: str) -> str:
    """`name` as one segment of a path."""
    return re.sub(r"[^\w.,=+-]+", "-", name)[:200].strip("-") or "job"


def last_error(text: str) -> str:
    """The last line that starts with `error:`, without that word, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1]


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
