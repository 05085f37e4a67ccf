"""What docs/serving.md tells people to type works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Running, Toy


def test_labels_are_set_and_taken_back_as_shown(
    make_toy: Callable[..., Toy], running: Running
) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", Path("docs/serving.md").read_text(), re.M | re.S
    )
    bundles = tuple(make_toy("digits", version).path for version in ("1.0", "1.1"))
    with running(bundles=bundles, labels=("digits:stable=1.0",), admin_port=0) as live:
        told = {"50051": live.address, "50052": f"127.0.0.1:{live.server.admin_port}"}
        code = re.sub(r"127\.0\.0\.1:(5005\d)", lambda found: told[found[1]], code)
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["canary 1.1", "stable 1.1", "stable 1.0"], ran.stderr
