"""Converts tensors of the Open Inference Protocol to arrays and back; types are never cast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from likely.errors import InvalidInput
from likely.inference import inference_pb2

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]


CHUNK = 1 << 14  # elements converted at a time; also bytes from which a typed request is long


@dataclass(frozen=True, slots=True)
class DataType:
    """A type of elements.

    Attributes:
        name: name in the protocol.
        dtype: NumPy type, as stored in raw contents.
        field: field of `InferTensorContents` for typed elements.
        number: number in a model's configuration.
    """

    name: str
    dtype: np.dtype[Any]
    field: str
    number: inference_pb2.DataType.ValueType


_TYPES = {
    name: DataType(name, np.dtype(dtype), f"{field}_contents", inference_pb2.DataType.Value(number))
    for name, dtype, field, number in (
        ("BOOL", "?", "bool", "TYPE_BOOL"),
        ("UINT8", "u1", "uint", "TYPE_UINT8"),
        ("INT8", "i1", "int", "TYPE_INT8"),
        ("INT32", "<i4", "int", "TYPE_INT32"),
        ("INT64", "<i8", "int64", "TYPE_INT64"),
        ("FP32", "<f4", "fp32", "TYPE_FP32"),
        ("FP64", "<f8", "fp64", "TYPE_FP64"),
    )
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a model.

    Attributes:
        name: name in requests and answers.
        datatype: the protocol's name of the elements' type.
        shape: lengths of the axes; -1 for any length.
        optional: whether an input may be left out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    @property
    def type(self) -> DataType:
        """The type of its elements."""
        return _TYPES[self.datatype]


def is_long(request: inference_pb2.ModelInferRequest) -> bool:
    """Whether the inputs are so many typed elements that reading them takes long."""
    return not request.raw_input_contents and request.ByteSize() > CHUNK


def read(
    request: inference_pb2.ModelInferRequest, wanted: Sequence[Tensor], most: int
) -> dict[str, Array]:
    """Returns the request's inputs by name, in their claimed shapes.

    Each input's type and shape are checked before its elements are read.

    Args:
        request: the request.
        wanted: the model's inputs.
        most: largest length of an axis that may have any length.

    Raises:
        InvalidInput: an input is missing, unknown, given twice, of another type or shape, or its
            elements do not match its type or shape.
    """
    known = {tensor.name: tensor for tensor in wanted}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            "raw_input_contents", f"{len(raw)} entries for {len(request.inputs)} inputs"
        )
    arrays: dict[str, Array] = {}
    for at, request_tensor in enumerate(request.inputs):
        tensor = known.get(request_tensor.name)
        if tensor is None or request_tensor.name in arrays:
            names = ", ".join(known)
            why = "given twice" if tensor else f"not an input; there are {names}"
            raise InvalidInput(f"inputs[{at}].name", f"{request_tensor.name[:64]!r} is {why}")
        if request_tensor.datatype != tensor.datatype:
            raise InvalidInput(
                f"inputs[{at}].datatype",
                f"{request_tensor.datatype[:64]!r}; {tensor.name} takes {tensor.datatype}",
            )
        shape = _check_shape(request_tensor, tensor, most)
        if raw:
            arrays[tensor.name] = _from_bytes(raw[at], tensor, shape, f"raw_input_contents[{at}]")
        else:
            arrays[tensor.name] = _from_contents(request_tensor.contents, tensor, shape)
    for tensor in wanted:
        if not tensor.optional and tensor.name not in arrays:
            raise InvalidInput("inputs", f"{tensor.name} is missing")
    return arrays


def write(
    response: inference_pb2.ModelInferResponse, outputs: Sequence[tuple[Tensor, Array]], raw: bool
) -> None:
    """Adds outputs to a response, as raw bytes or as typed elements, which takes longer."""
    for tensor, values in outputs:
        into = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=values.shape)
        stored = np.ascontiguousarray(values, tensor.type.dtype)
        if raw:
            response.raw_output_contents.append(stored.tobytes())
        else:
            elements, flat = getattr(into.contents, tensor.type.field), stored.ravel()
            for at in range(0, len(flat), CHUNK):  # other threads may run between chunks
                elements.extend(flat[at : at + CHUNK].tolist())


def requested_outputs(
    request: inference_pb2.ModelInferRequest, offered: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Returns the outputs that a request names, in its order; all if it names none.

    Raises:
        InvalidInput: an output does not exist, or is named twice.
    """
    if not request.outputs:
        return tuple(offered)
    known = {tensor.name: tensor for tensor in offered}
    names: list[str] = []
    for at, wanted in enumerate(request.outputs):
        if wanted.name not in known or wanted.name in names:
            why = "named twice" if wanted.name in names else f"none of {', '.join(known)}"
            raise InvalidInput(f"outputs[{at}].name", f"{wanted.name[:64]!r} is {why}")
        names.append(wanted.name)
    return tuple(known[name] for name in names)


def _check_shape(
    request_tensor: inference_pb2.ModelInferRequest.InferInputTensor, tensor: Tensor, most: int
) -> tuple[int, ...]:
    if len(request_tensor.shape) != len(tensor.shape):  # before copying it, as it may have millions
        raise InvalidInput(
            f"{tensor.name}.shape",
            f"{len(request_tensor.shape)} dimensions; expected {len(tensor.shape)}",
        )
    shape = tuple(request_tensor.shape)
    for axis, (length, asked) in enumerate(zip(shape, tensor.shape, strict=True)):
        field = f"{tensor.name}.shape[{axis}]"
        if length < 0:
            raise InvalidInput(field, f"{length} is negative")
        if asked >= 0 and length != asked:
            raise InvalidInput(field, f"{length}; {tensor.name} takes {asked}")
        if asked < 0 and length > most:
            raise InvalidInput(field, f"{length}; one request brings at most {most}")
    return shape


def _from_bytes(data: bytes, tensor: Tensor, shape: tuple[int, ...], field: str) -> Array:
    dtype = tensor.type.dtype
    expected = math.prod(shape) * dtype.itemsize  # Python's integers do not overflow
    if len(data) != expected:
        raise InvalidInput(
            field, f"{len(data)} bytes; {tensor.name} of shape {shape} asks for {expected}"
        )
    if tensor.datatype == "BOOL" and data.strip(b"\0\1"):
        raise InvalidInput(field, f"a byte of {tensor.name} is neither 0 nor 1")
    return np.frombuffer(data, dtype).reshape(shape)


def _from_contents(
    contents: inference_pb2.InferTensorContents, tensor: Tensor, shape: tuple[int, ...]
) -> Array:
    for descriptor, _ in contents.ListFields():
        if descriptor.name != tensor.type.field:
            raise InvalidInput(
                f"{tensor.name}.contents", f"{descriptor.name}; expected {tensor.type.field}"
            )
    values = getattr(contents, tensor.type.field)
    if len(values) != math.prod(shape):
        raise InvalidInput(
            f"{tensor.name}.contents",
            f"{len(values)} elements; the shape {shape} asks for {math.prod(shape)}",
        )
    dtype = tensor.type.dtype
    is_whole = dtype.kind in "iu"
    elements = np.empty(len(values), np.int64 if is_whole else dtype)
    for at in range(0, len(values), CHUNK):  # other threads may run between chunks
        elements[at : at + CHUNK] = values[at : at + CHUNK]
    if is_whole and elements.size:
        limits = np.iinfo(dtype)
        if elements.min() < limits.min or elements.max() > limits.max:
            raise InvalidInput(f"{tensor.name}.contents", f"a value does not fit {tensor.datatype}")
    return elements.astype(dtype, copy=False).reshape(shape)
