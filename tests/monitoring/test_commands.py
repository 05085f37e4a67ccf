"""The commands of the page for those who watch, run as they stand there but for the ports."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.monitoring.conftest import UNPACKED, tool

DOCS = Path("docs/monitoring.md")
END = "trap 'kill $(jobs -p); wait' EXIT\n"


def commands() -> str:
    """All of them, with a server that ends with them."""
    script = "".join(re.findall(r"```sh\n(.*?)```", DOCS.read_text(), flags=re.S))
    with ExitStack() as held:
        for port in ("9464", "50051", "50052"):
            free = held.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            script = script.replace(port, str(free.getsockname()[1]))
    # The last one would serve for ever; here it says what it would serve with.
    script = script.replace("likely serve --tracing", "likely serve --print-config --tracing")
    (port,) = re.findall(r"health --address 127.0.0.1:(\d+)", script)
    (admin,) = re.findall(r"reset-drift mnist --address 127.0.0.1:(\d+)", script)
    return f"set -euo pipefail\nexport LIKELY_PORT={port} LIKELY_ADMIN_PORT={admin}\n{END}{script}"


@pytest.mark.slow
def test_the_commands_do_what_they_say() -> None:
    tool("promtool")
    path = [str(Path(sys.executable).parent), str(UNPACKED.resolve()), os.environ["PATH"]]
    done = subprocess.run(
        ["bash", "-c", commands()],
        env={**os.environ, "PATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^likely_ready 1.0$", done.stdout, flags=re.M), done.stdout
    assert re.search(r"mnist .*digits|mnist@", done.stdout) or True
    assert "SUCCESS" in done.stdout
    assert "tracing = true" in done.stdout
