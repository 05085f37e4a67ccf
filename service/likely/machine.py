"""What this machine and this installation offer: cores, versions, ONNX Runtime."""

from __future__ import annotations

import math
import os
import platform
from importlib import metadata
from pathlib import Path

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
INSTALL = (
    "install one: pip install 'likely[cpu]' (CPU), 'likely[gpu]' (a GPU whose CUDA and cuDNN "
    "are installed) or 'likely[cuda]' (a GPU, bringing CUDA and cuDNN)"
)
_CGROUPS = Path("/sys/fs/cgroup")
_QUOTAS = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")  # of cgroup v2, of v1


def cores(groups: Path = _CGROUPS) -> int:
    """Number of CPU cores that this process may use, by its affinity and its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return math.ceil(min(count or 1, max(1.0, _quota(groups))))


def _quota(groups: Path) -> float:
    """The number of cores that the container's control group allows; infinite for no limit."""
    for files in _QUOTAS:
        try:
            words = " ".join((groups / file).read_text(encoding="ascii") for file in files).split()
            share, period = (math.inf if word == "max" else int(word) for word in words)
        except (OSError, ValueError):
            continue
        return share / period if share > 0 < period else math.inf
    return math.inf


def version(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def runtimes() -> dict[str, str]:
    """The installed ONNX Runtime distributions and their versions; more than one is a conflict."""
    distributions = {name: version(name) for name in RUNTIMES}
    return {name: number for name, number in distributions.items() if number}


def versions() -> dict[str, str]:
    """The versions of Python, likely, and the client's main dependencies."""
    names = ("likely", "numpy", "grpcio", "protobuf")
    return {"python": platform.python_version()} | {
        name: version(name) or "not installed" for name in names
    }
