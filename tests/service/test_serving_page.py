"""What docs/serving.md tells people to type works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from likely import Client
from likely.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Running, Toy


@pytest.fixture
def shown() -> Callable[[str], str]:
    """The page's one example in a language."""
    page = Path("docs/serving.md").read_text()

    def find(language: str) -> str:
        (code,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)
        return str(code)

    return find


def test_labels_are_set_and_taken_back_as_shown(
    make_toy: Callable[..., Toy], running: Running, shown: Callable[[str], str]
) -> None:
    bundles = tuple(make_toy("digits", version).path for version in ("1.0", "1.1"))
    with running(bundles=bundles, labels=("digits:stable=1.0",), admin_port=0) as live:
        addresses = {"50051": live.address, "50052": f"127.0.0.1:{live.server.admin_port}"}
        code = re.sub(r"127\.0\.0\.1:(5005\d)", lambda found: addresses[found[1]], shown("python"))
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["canary 1.1", "stable 1.1", "stable 1.0"], ran.stderr


def test_a_release_from_a_terminal_goes_as_shown(
    make_toy: Callable[..., Toy],
    running: Running,
    shown: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = (make_toy("digits", version).path for version in ("1.0", "1.1"))
    with running(bundles=(old,), admin_port=0) as live:
        monkeypatch.setenv("LIKELY_ADMIN_ADDRESS", f"127.0.0.1:{live.server.admin_port}")
        answered = []
        for line in shown("sh").replace("/bundles/digits-1.1", str(new)).splitlines():
            command, *words = shlex.split(line)
            assert command == "likely"
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, result.output
            with Client(live.address) as client:
                answered.append(client.model("digits").version)
    assert answered == ["1.0", "1.0", "1.0", "1.1", "1.0", "1.0"]
