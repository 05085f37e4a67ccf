"""What importing loads, seen from a fresh interpreter."""

import subprocess
import sys

import pytest

TRAINING = {"torch", "onnx", "onnxscript", "lightning_fabric", "sklearn", "scipy", "likely_export"}
SERVING = {"onnxruntime", "pydantic", "prometheus_client", "structlog"}
EVERYTHING = """
import importlib, pkgutil, likely
for module in pkgutil.walk_packages(likely.__path__, "likely."):
    importlib.import_module(module.name)
"""


def loaded(code: str) -> set[str]:
    """The top-level packages that are loaded once the code has run."""
    listing = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    ran = subprocess.run(
        [sys.executable, "-c", code + listing], capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


@pytest.mark.parametrize("module", ["likely", "likely.client", "likely.cli"])
def test_the_client_loads_neither_runtime_nor_server(module: str) -> None:
    assert loaded(f"import {module}") & (TRAINING | SERVING) == set()


def test_nothing_of_the_service_loads_what_only_training_needs() -> None:
    everything = loaded(EVERYTHING)
    assert "pydantic" in everything
    assert everything & TRAINING == set()


def test_who_asks_for_no_tokens_and_no_encryption_loads_neither() -> None:
    assert loaded("import likely.processes.supervisor") & {"jwt", "cryptography"} == set()


def test_a_server_loads_nothing_that_only_other_commands_need() -> None:
    code = "import likely.cli, likely.cli.serve, likely.processes.supervisor"
    assert loaded(code) & {"rich", "pygments", "PIL"} == set()


def test_rich_is_there_for_who_needs_it_beside_the_logs() -> None:
    assert "rich" in loaded("import likely.logs, rich.console")
    code = "import sys, rich; import likely.logs; assert sys.modules['rich'] is rich"
    assert "rich" in loaded(code)


def test_the_runtime_is_loaded_by_the_first_session_only() -> None:
    assert "onnxruntime" not in loaded("import likely.serving.server")
