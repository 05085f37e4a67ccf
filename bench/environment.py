"""The environment that figures depend on: the machine and the versions."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from likely import machine

CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def environment() -> dict[str, object]:
    """The machine, its instruction sets and the versions; no names of hosts or folders."""
    runtime = next(name for name in machine.RUNTIMES if machine.version(name))
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _field("model name") or platform.processor() or "unknown",
        "instructions": [flag for flag in CPU_FLAGS if flag in _flags()],
        "cores": machine.cores(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        runtime: metadata.version(runtime),
        "numpy": metadata.version("numpy"),
    }


def _flags() -> list[str]:
    return (_field("flags") or _field("Features") or "").split()


def _field(name: str) -> str | None:
    """The first core's entry of that name in /proc/cpuinfo; None if there is none."""
    if not CPUINFO.exists():
        return None
    for line in CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
