"""The programs that others wrote, in a venv of their own, and how a test runs one."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

VENV = Path(".venv-interop").absolute()
SCRIPTS = Path(__file__).parent / "scripts"
PYTHON = VENV / "bin" / "python"


def installed(package: str) -> pytest.MarkDecorator:
    """Skips where the venv does not have that package."""
    there = any(VENV.glob(f"lib/python*/*/{package}"))
    return pytest.mark.skipif(not there, reason=f"{package} is not in {VENV.name}")


def output_of(words: Sequence[str | Path], given: str = "", seconds: float = 60) -> str:
    """What a program prints; it has to end well."""
    ran = subprocess.run(
        [str(word) for word in words],
        input=given,
        capture_output=True,
        text=True,
        timeout=seconds,
        # Nothing of this environment's own packages reaches the other one.
        env={"PATH": "/usr/bin:/bin", "HOME": str(VENV)},
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return ran.stdout
