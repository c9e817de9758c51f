"""Where a record was made: the commit of the code, package versions and hardware."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, TypedDict

PACKAGES = (
    "matryoshka-lora",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "lm_eval",
    "hydra-core",
    "omegaconf",
    "numpy",
    "pandas",
    "matplotlib",
    "wandb",
)


class Environment(TypedDict):
    """The part of a phase that describes where it was done."""

    git: dict[str, Any] | None
    versions: dict[str, Any]
    device: dict[str, Any]


def environment() -> Environment:
    """Facts about code, packages and hardware."""
    return {"git": git_state(), "versions": package_versions(), "device": device_facts()}


def new_phase(name: str, processes: int, **facts: Any) -> dict[str, Any]:
    """An entry of `Record.phases`: what is done from now on, where and by which code."""
    where = environment()
    where["device"]["processes"] = processes
    return {"phase": name, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **where, **facts}


def git_state() -> dict[str, Any] | None:
    """Commit of this package's checkout and whether tracked files outside results/ differ from it.

    A copy without `.git` may name its commit in MATRYOSHKA_GIT_SHA=<sha>[-dirty]. None where
    neither is known, also when the package is installed below somebody else's checkout.
    """
    given = os.environ.get("MATRYOSHKA_GIT_SHA")
    if given:
        return {"sha": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):  # no git here, or no answer from it
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "--", Path(__file__).name) is None:
        return None
    sha = git("rev-parse", "HEAD")
    changes = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"
    )
    if sha is None or changes is None:
        return None
    return {"sha": sha, "dirty": bool(changes)}


def package_versions() -> dict[str, Any]:
    """Package -> version, of Python and of every installed package that can change a number."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def device_facts() -> dict[str, Any]:
    """What computes: the first GPU and how many there are, or the CPU; memory in GiB."""
    import torch  # here, because reading records and making tables needs no torch

    facts: dict[str, Any] = {
        "kind": "cpu",
        "name": _cpu_name(),
        "count": 1,
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "kind": "cuda",
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def _cpu_name() -> str:
    try:  # platform.processor() is empty on most Linux systems
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
