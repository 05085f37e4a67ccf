"""What docs/pipelines.md tells people to type works, and what it lists is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from demo.serving import Served
from likely.inference import inference_pb2
from likely.inference.inference_pb2_grpc import GRPCInferenceServiceStub
from likely.serving.openinference.operations import OPERATIONS, Operation, full_name
from tests.interop.others import PYTHON, installed, output_of

PAGE = Path("docs/pipelines.md").read_text()
OURS, REPLICAS, TRITON = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def run(code: str, server: Served) -> str:
    code = re.sub(r"127\.0\.0\.1:5005\d", server.address, code.replace("timeout=10", "timeout=60"))
    words = [sys.executable, "-c", code]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_our_client_does_what_is_shown(stocked: Served) -> None:
    first, last = run(OURS, stocked).splitlines()
    assert first.startswith("100 ")
    assert 0 < float(last) <= 1


def test_several_replicas_are_given_as_shown(server: Served) -> None:
    assert run(REPLICAS, server) == "digits\n"


@installed("tritonclient")
def test_tritonclient_does_what_is_shown(server: Served) -> None:
    code = TRITON.replace("127.0.0.1:50051", server.address)
    assert server.address in code
    assert "True" in output_of([PYTHON, "-c", code])  # a blank picture is none of the digits


def listed() -> dict[str, list[set[str]]]:
    """The table's models: their inputs, outputs and parameters."""
    rows = re.findall(r"^\| `(digits[a-z/]*)` \|(.*)\|(.*)\|(.*)\|$", PAGE, re.M)
    return {
        name: [set(re.findall(r"`([a-z_]+)`", cell)) for cell in cells] for name, *cells in rows
    }


def test_the_table_lists_what_there_is(server: Served) -> None:
    table = listed()
    with grpc.insecure_channel(server.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        index = stub.RepositoryIndex(inference_pb2.RepositoryIndexRequest())
        assert sorted(table) == [model.name for model in index.models]
        for name, (inputs, outputs, _) in table.items():
            meta = stub.ModelMetadata(inference_pb2.ModelMetadataRequest(name=name))
            assert inputs == {tensor.name for tensor in meta.inputs}
            if name != "digits":
                assert outputs == {tensor.name for tensor in meta.outputs}
            else:
                both = table["digits/score"][1] | table["digits/classify"][1]
                assert both == {tensor.name for tensor in meta.outputs}


@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS[1:] if operation.needs is None],
    ids=lambda operation: operation.suffix,
)
def test_the_table_lists_the_parameters(operation: Operation) -> None:
    assert listed()[full_name("digits", operation)][2] == operation.settings
