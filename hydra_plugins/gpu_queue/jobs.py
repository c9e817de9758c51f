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
from collections import Counter, defaultdict, deque
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
# How a line begins that says why a job, or a process of it, has failed.
ERROR = re.compile(r"error( in process \d+)?: ")
# What the output of a job that failed on its card's account names.
OF_THE_CARD = re.compile("CUDA|NCCL|cuDNN|NVML")
# What a card has to be able to do, and the seconds it gets for it.
PROBE = """\
import torch
for i in range(torch.cuda.device_count() or 1):
    x = torch.ones(256, 256, device=f"cuda:{i}")
    assert (x @ x).eq(256).all(), "a wrong product"
"""
PROBE_SECONDS = 120.0


@dataclass(frozen=True)
class Slot:
    """What one job at a time runs on: `processes` > 1 are started by torchrun, one a GPU.

    gpus: the ids of its GPUs, which other slots may share; none of a slot without.
    """

    name: str
    environment: Mapping[str, str]
    processes: int = 1
    gpus: tuple[str, ...] = ()


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
            # With the second, torch fails on a card that does not start, instead of using the CPU.
            environment = {"CUDA_VISIBLE_DEVICES": names, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            if workers_per_gpu > 1:
                threads = max(1, (os.cpu_count() or 1) // (len(shares) * workers_per_gpu))
                environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
            name = f"GPU {names}" + (f" worker {worker}" if workers_per_gpu > 1 else "")
            slots.append(Slot(name, environment, len(share), tuple(share)))
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


def card_error(slot: Slot) -> str | None:
    """Why a GPU of the slot cannot be used, as a new process finds; None where all can be."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**environment_of_children(), **slot.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_SECONDS:.0f} s"
    return last_error(done.stderr.decode(errors="replace")) if done.returncode else None


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    script: Path,
    logs: Path,
    *,
    show: bool = False,
    more: Callable[[Outcome], Sequence[Job]] | None = None,
    card_error: Callable[[Slot], str | None] = card_error,
) -> list[Outcome]:
    """Run every job, as many at a time as there are slots; a failed one does not stop the others.

    logs: folder for the jobs' output, appended to `<job name>.log`; `show` prints it here as well.
    more: called with each outcome, in one thread at a time; the jobs that it returns are run, too.
    card_error: asked where a job was killed on a slot with GPUs, or failed with a word of CUDA. If
    it finds an error, the slot's GPUs get no other job and the job goes back to the queue.
    A job whose process is killed gets ATTEMPTS in all. An interrupt (Ctrl-C or SIGTERM) ends the
    running jobs, starts no other and raises KeyboardInterrupt.
    """
    logs.mkdir(parents=True, exist_ok=True)
    jobs = list(jobs)
    waiting = deque(range(len(jobs)))
    running: set[Worker] = set()
    # Also wakes those that wait for a job that another one may bring, or leave.
    lock = threading.Condition()
    stopping = threading.Event()
    done: dict[int, Outcome] = {}
    kills: Counter[int] = Counter()
    seconds: defaultdict[int, float] = defaultdict(float)
    """Of the attempts so far."""
    broken: dict[str, str] = {}
    """GPU -> what is wrong with it."""

    def take(slot: Slot) -> int | None:
        """The next job's number; None where there is none and no running one can bring any."""
        with lock:
            lock.wait_for(lambda: stopping.is_set() or waiting or len(done) == len(jobs))
            if stopping.is_set() or not waiting or broken.keys() & set(slot.gpus):
                return None
            return waiting.popleft()

    def goes_back(number: int, worker: Worker, code: int, text: str) -> bool:
        """Whether a job that has failed is to be run again, because of its card or a kill."""
        slot, name = worker.slot, jobs[number].name
        if slot.gpus and (code < 0 or OF_THE_CARD.search(text)):
            worker.close()  # a GPU may be one process's alone
            if (found := card_error(slot)) is not None:
                broken.update(dict.fromkeys(slot.gpus, found))
                logger.error("%s left out (%s); back to the queue: %s", slot.name, found, name)
                return True
        if code < 0:
            kills[number] += 1
            if kills[number] < ATTEMPTS:
                logger.warning("killed by signal %d, is run again: %s", -code, name)
                return True
        return False

    def serve(slot: Slot) -> None:
        worker = Worker(slot, script)
        try:
            while (number := take(slot)) is not None:
                job = jobs[number]
                log = logs / f"{file_name(job.name)}.log"
                began = time.monotonic()
                start = log.stat().st_size if log.exists() else 0  # behind an earlier attempt's
                with lock:
                    if stopping.is_set():
                        return
                    worker.start(job, log)
                    running.add(worker)
                logger.info("started on %s: %s -> %s", slot.name, job.name, log)
                code = worker.wait(log, show)
                seconds[number] += time.monotonic() - began
                text = log.read_bytes()[start:].decode(errors="replace")
                failed = code != 0 and not stopping.is_set()
                again = failed and goes_back(number, worker, code, text)
                error = None if code == 0 else f"exit code {code}: {last_error(text)}"
                outcome = Outcome(job, log, seconds[number], error)
                with lock:
                    if again:
                        waiting.appendleft(number)
                    else:
                        if more is not None and not stopping.is_set():
                            new = more(outcome)
                            waiting.extend(range(len(jobs), len(jobs) + len(new)))
                            jobs.extend(new)
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
            served = [pool.submit(serve, slot) for slot in slots]
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
    left = "; ".join(f"GPU {gpu}: {found}" for gpu, found in broken.items())
    for number in waiting:
        job, error = jobs[number], f"no GPU is left that works ({left})"
        log = logs / f"{file_name(job.name)}.log"
        with log.open("a") as output:
            print(f"error: {error}", file=output)
        done[number] = Outcome(job, log, seconds[number], error)
        _report(done[number], len(done), len(jobs))
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
    errors = [ERROR.sub("", line, count=1) for line in lines if ERROR.match(line)]
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
