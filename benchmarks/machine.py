"""Which machine measured: numbers mean nothing without it."""

import math
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

_PACKAGES = ("torch", "nixl", "uvloop", "numpy")
_ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What of a machine bears on these numbers. `gpus` has one line per device."""

    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...]
    kernel: str
    python: str
    packages: dict[str, str]


def describe_machine() -> Machine:
    """This machine, as far as it can be read without rights."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=_gpus(),
        kernel=platform.release(),
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
    )


def arena_device(machine: Machine) -> str:
    """Where the arenas of a bench lie: on the first GPU that torch can use, else in memory."""
    if not machine.gpus:
        return "cpu"
    import torch  # noqa: PLC0415 - seconds to import, and only asked where there is a GPU

    return "cuda" if torch.cuda.is_available() else "cpu"


def raise_file_limit() -> float:
    """Allow this process, and those it starts from now on, as many open files as it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return math.inf if hard == resource.RLIM_INFINITY else hard


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _gpus() -> tuple[str, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    asked = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            asked, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
