"""Coverage-guided fuzzing of what reads foreign bytes: `python decoders.py TARGET [OPTIONS]`.

Targets: `images` (a request's pictures), `tensors` (those of the Open Inference Protocol), `graph`
(an ONNX file), `arrays` (an archive), `manifest`. Each may refuse with the error that is its own;
anything else is a finding.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["likely", "zipfile", "numpy.lib"]):
    from likely import codec
    from likely.bundle import MANIFEST, Bundle, arrays, scan
    from likely.errors import BundleError, InvalidInput
    from likely.inference.inference_pb2 import DataType, ModelInferRequest, ModelInferResponse
    from likely.serving.openinference import tensors
    from likely.serving.openinference.tensors import Tensor
    from likely.v1.images_pb2 import Images

FOLDER = Path(tempfile.mkdtemp())
TYPES = [name.removeprefix("TYPE_") for name, number in DataType.items() if number]
WANTED = {
    "images": Tensor("images", "UINT8", (-1, 1, 3, 3), optional=True),
    **{name: Tensor(name, name, (-1, 2), optional=True) for name in TYPES},
}


def images(data: bytes) -> None:
    """The tensor decoder: bytes become a message, the message an array of its own shape."""
    from google.protobuf.message import DecodeError

    try:
        message = Images.FromString(data)
        x = codec.pixels(message)
    except (DecodeError, InvalidInput):
        return
    assert x.shape == tuple(message.shape)
    assert x.tobytes() == message.data


def inputs(data: bytes) -> None:
    """The decoder of the Open Inference Protocol: what it reads is written as it came."""
    from google.protobuf.message import DecodeError

    try:
        message = ModelInferRequest.FromString(data)
        found = tensors.read(message, list(WANTED.values()), 1 << 20)
    except (DecodeError, InvalidInput):
        return
    truths = [array.tobytes() for array in found.values() if array.dtype.kind == "b"]
    assert not b"".join(truths).strip(b"\0\1")
    again, raw = ModelInferResponse(), list(message.raw_input_contents)
    tensors.write(again, [(WANTED[name], array) for name, array in found.items()], bool(raw))
    assert list(again.raw_output_contents) == raw
    for given, written in zip(message.inputs, again.outputs, strict=True):
        assert (written.name, list(written.shape)) == (given.name, list(given.shape))
        # As text, in which a NaN is equal to itself.
        assert raw or str(written.contents) == str(given.contents)


def graph(data: bytes) -> None:
    """The scan: what passes, a library reads as well."""
    path = FOLDER / "graph.onnx"
    path.write_bytes(data)
    try:
        scan.check_graph(path, {"weights.data": 64})
    except BundleError:
        return
    import onnx

    onnx.ModelProto.FromString(data)


def archive(data: bytes) -> None:
    """The reader of arrays: nothing but numbers, no larger than the file can say."""
    path = FOLDER / "arrays.npz"
    path.write_bytes(data)
    try:
        found = arrays.read(path)
    except BundleError:
        return
    assert all(array.dtype.kind in "biuf" for array in found.values())


def manifest(data: bytes) -> None:
    """The reader of bundles, up to the files that the manifest names."""
    (FOLDER / MANIFEST).write_bytes(data)
    try:
        Bundle.open(FOLDER)
    except BundleError as error:
        assert "\n" not in str(error)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "images": images,
    "tensors": inputs,
    "graph": graph,
    "arrays": archive,
    "manifest": manifest,
}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
