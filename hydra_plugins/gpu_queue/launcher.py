"""The launcher: `python train.py -m hydra/launcher=gpu_queue method=lora,dylora seed=42,666`."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.gpu_queue.jobs import Job, find_slots, run_jobs

logger = logging.getLogger(__name__)

# Hydra's own overrides that say how this sweep is launched, and nothing about a job.
_OF_THE_SWEEP = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweep", "hydra.mode")


@dataclass
class GpuQueueConf:
    """Settings below `hydra.launcher`.

    gpus: null for all visible GPUs, a number, or a list of ids; on a host without GPUs a number of
    CPU slots. gpus_per_job: more than one starts that many processes a job. workers_per_gpu: jobs
    that share a GPU. slots: so many CPU slots of one thread each instead, whatever GPUs there are.
    logs: folder for the output of the jobs.
    """

    _target_: str = "hydra_plugins.gpu_queue.launcher.GpuQueueLauncher"
    gpus: Any = None
    gpus_per_job: int = 1
    workers_per_gpu: int = 1
    slots: int | None = None
    logs: str = "${output_dir}/logs"


ConfigStore.instance().store(
    group="hydra/launcher", name="gpu_queue", node=GpuQueueConf, provider="gpu_queue"
)


class GpuQueueLauncher(Launcher):
    """Runs the program for each job of a sweep in a process of the next GPU that is free."""

    def __init__(
        self, gpus: Any, gpus_per_job: int, workers_per_gpu: int, slots: int | None, logs: str
    ) -> None:
        self.gpus = OmegaConf.to_container(gpus) if OmegaConf.is_config(gpus) else gpus
        self.gpus_per_job, self.workers_per_gpu, self.slots = gpus_per_job, workers_per_gpu, slots
        self.logs = Path(logs)
        self.config: DictConfig | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Raises HydraException that names every failed job, once all jobs have ended."""
        assert self.config is not None, "Hydra calls setup first"
        hydra = self.config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)
        shared = ["--config-name", hydra.job.config_name]
        for source in hydra.runtime.config_sources:
            if source.provider == "command-line":
                shared += ["--config-dir", source.path]
        shared += [o for o in hydra.overrides.hydra if not o.lstrip("+~").startswith(_OF_THE_SWEEP)]
        jobs = [
            Job(
                f"{number}-{','.join(filter_overrides(overrides))}",
                (*shared, *overrides),
            )
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        slots = find_slots(
            self.gpus,  # type: ignore[arg-type]
            self.gpus_per_job,
            self.workers_per_gpu,
            self.slots,
        )
        logger.info("%d jobs on %s", len(jobs), ", ".join(slot.name for slot in slots))
        outcomes = run_jobs(jobs, slots, Path(sys.argv[0]), self.logs)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:
            lines = [f"{o.job.name}: {o.error} (see {o.log})" for o in failed]
            raise HydraException(
                f"{len(failed)} of {len(jobs)} jobs failed; the others are done, and the same "
                "command runs these again:\n" + "\n".join(lines)
            )
        return [
            JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
            for overrides in job_overrides
        ]
