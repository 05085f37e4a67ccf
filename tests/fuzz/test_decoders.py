"""A bounded run of the coverage-guided fuzzer over every reader of foreign bytes."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely.inference.inference_pb2 import DataType, ModelInferRequest
from likely.serving.openinference.tensors import Tensor
from likely.v1.images_pb2 import Images

if TYPE_CHECKING:
    from tests.conftest import Toy

pytest.importorskip("atheris")
RUNS = {"images": 200_000, "tensors": 200_000}  # most bytes are no message at all
OTHERWISE = 20_000
SECONDS = 20


# No pictures, of a size that there cannot be: no mutation comes to so much from one picture.
NONE = (0, 1, 3, 2**63 - 1)
ONE = (1, 1, 3, 3)


def requests() -> Iterator[ModelInferRequest]:
    """One for pictures and for the extremes of each type, as bytes or one by one."""
    types = [name.removeprefix("TYPE_") for name, number in DataType.items() if number]
    wanted = [Tensor("images", "UINT8", ONE), Tensor("images", "UINT8", NONE)]
    wanted += [Tensor(datatype, datatype, (1, 2)) for datatype in types]
    for tensor, is_raw in product(wanted, (True, False)):
        request = ModelInferRequest()
        given = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        elements = np.resize(extremes(tensor.type.dtype), math.prod(tensor.shape))
        if is_raw:
            request.raw_input_contents.append(elements.tobytes())
        else:
            getattr(given.contents, tensor.type.field).extend(elements.tolist())
        yield request


def extremes(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return np.array([False, True])
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([limits.min, limits.max], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["images", "tensors", "graph", "arrays", "manifest"])
def test_no_bytes_harm_a_reader(toy: Toy, tmp_path: Path, target: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    match target:
        case "images":
            for shape in (ONE, NONE):
                found = Images(data=bytes(math.prod(shape)), shape=shape)
                (corpus / f"{shape}").write_bytes(found.SerializeToString())
        case "tensors":
            for at, request in enumerate(requests()):
                (corpus / f"{at}").write_bytes(request.SerializeToString())
        case "graph":
            for path in toy.path.glob("*.onnx"):
                shutil.copy(path, corpus)
        case "arrays":
            for path in toy.path.glob("*.npz"):
                shutil.copy(path, corpus)
        case "manifest":
            shutil.copy(toy.path / "manifest.json", corpus)
    script = str(Path(__file__).with_name("decoders.py"))
    options = [
        f"-runs={RUNS.get(target, OTHERWISE)}",
        f"-max_total_time={SECONDS}",
        "-seed=1",
        "-max_len=20000",
    ]
    ran = subprocess.run(
        [sys.executable, script, target, *options, f"-artifact_prefix={tmp_path}/", str(corpus)],
        capture_output=True, text=True, timeout=10 * SECONDS, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Done" in ran.stderr
