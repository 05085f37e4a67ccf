"""Checks what an ONNX file contains, before ONNX Runtime opens it.

A file that passes holds one graph of listed ai.onnx operators, nested at most a few levels,
with complete weights: inside the file, or in a plain file of the bundle that the manifest
names. It has no functions, no other domains and no unknown fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from likely.bundle.wire import Field, Kind, Reader, Schema, Value, Values, WireError
from likely.errors import BundleError

OPSET = 20
_OPERATORS = """
    Abs Add And ArgMax ArgMin Cast Ceil Clip Concat Conv ConvTranspose Cos CumSum DepthToSpace
    Div Einsum Elu Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
    Greater GreaterOrEqual Identity IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual
    Log LogSoftmax MatMul Max MaxPool Min Mod Mul Neg Not OneHot Or Pow Range Reciprocal
    ReduceLogSumExp ReduceMean ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round
    Scan ScatterElements ScatterND Shape Sigmoid Sign Sin Slice Softmax Softplus Softsign
    Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_OPERATORS.split())
"""The operators that the export can write (a test keeps the two equal)."""

ENDING = ".onnx"  # ONNX Runtime reads .ort files as another format, without these checks
LARGEST_FILE = (1 << 31) - 1  # limit of protocol buffers
MOST_FIELDS = 4_000_000
DEEPEST_NESTING = 4
MOST_AXES = 16
_LARGEST_TEXT = 1 << 12
_LARGEST_PACKED = 1 << 22

# Bytes of an element by ONNX's number of its type; other types are not allowed.
_ELEMENT_SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_EXTERNAL_LOCATION = 1

_NUMBER, _TEXT = (Kind.VARINT,), (Kind.BYTES,)


def _singular(name: str, kinds: tuple[Kind, ...] = _TEXT) -> Field:
    return Field(name, kinds)


def _repeated(name: str, kinds: tuple[Kind, ...] = _TEXT) -> Field:
    return Field(name, kinds, repeated=True)


# Field numbers of onnx.proto. Fields that are left out are refused: metadata (from which the
# runtime reads settings), training, functions, quantisation, sparse and sharded tensors.
_MODEL: Schema = {
    1: _singular("ir_version", _NUMBER),
    2: _singular("producer_name"),
    3: _singular("producer_version"),
    4: _singular("domain"),
    5: _singular("model_version", _NUMBER),
    6: _singular("doc_string"),
    7: _singular("graph"),
    8: _repeated("opset_import"),
}
_OPSET: Schema = {1: _singular("domain"), 2: _singular("version", _NUMBER)}
_GRAPH: Schema = {
    1: _repeated("node"),
    2: _singular("name"),
    5: _repeated("initializer"),
    10: _singular("doc_string"),
    11: _repeated("value"),
    12: _repeated("value"),
    13: _repeated("value"),
}
_NODE: Schema = {
    1: _repeated("input"),
    2: _repeated("output"),
    3: _singular("name"),
    4: _singular("op_type"),
    5: _repeated("attribute"),
    6: _singular("doc_string"),
    7: _singular("domain"),
}
_ATTRIBUTE: Schema = {
    1: _singular("name"),
    2: _singular("f", (Kind.FIXED32,)),
    3: _singular("i", _NUMBER),
    4: _singular("s"),
    5: _singular("tensor"),
    6: _singular("graph"),
    7: _repeated("floats", (Kind.FIXED32, Kind.BYTES)),
    8: _repeated("ints", (Kind.VARINT, Kind.BYTES)),
    9: _repeated("strings"),
    13: _singular("doc_string"),
    20: _singular("type", _NUMBER),
}
_TENSOR: Schema = {
    1: _repeated("dims", (Kind.VARINT, Kind.BYTES)),
    2: _singular("data_type", _NUMBER),
    4: _singular("float_data"),
    5: _singular("int32_data"),
    7: _singular("int64_data"),
    8: _singular("name"),
    9: _singular("raw_data"),
    10: _singular("double_data"),
    11: _singular("uint64_data"),
    12: _singular("doc_string"),
    13: _repeated("external_data"),
    14: _singular("data_location", _NUMBER),
}
_ENTRY: Schema = {1: _singular("key"), 2: _singular("value")}
_VALUE: Schema = {1: _singular("name"), 2: _singular("type"), 3: _singular("doc_string")}
_TYPE: Schema = {1: _singular("tensor"), 6: _singular("denotation")}
_TENSOR_TYPE: Schema = {1: _singular("elem_type", _NUMBER), 2: _singular("shape")}
_SHAPE: Schema = {1: _repeated("dim")}
_DIM: Schema = {
    1: _singular("dim_value", _NUMBER),
    2: _singular("dim_param"),
    3: _singular("denotation"),
}
# Fields of typed data, with their element types; all but the first two hold varints.
_TYPED_FIELDS = {
    "float_data": {1},
    "double_data": {11},
    "int32_data": {2, 3, 4, 5, 6, 9, 10, 16},
    "int64_data": {7},
    "uint64_data": {12, 13},
}
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}


def check_graph(path: Path, files: Mapping[str, int]) -> frozenset[str]:
    """Checks a graph; returns the names of the weights files that it reads besides its own file.

    Args:
        path: the ONNX file.
        files: the size in bytes of every file that the manifest names, by name.

    Raises:
        BundleError: with reason `graph`, something in the file is not allowed (the first fault is
            named); with reason `unreadable`, the file cannot be read.
    """
    if path.suffix != ENDING:
        raise BundleError(f"{path} does not end in {ENDING}, so it is no graph", "graph")
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise BundleError(
                f"{path} has {size} bytes; a graph has at most {LARGEST_FILE}", "graph"
            )
        scan = _Scan(files)
        scan.check_model(memoryview(path.read_bytes()))
    except (WireError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a graph that is allowed: {error}", "graph") from error
    except OSError as error:
        raise BundleError.unreadable(path, error) from error
    return frozenset(scan.weight_files)


class _Scan:
    """One pass over one file."""

    def __init__(self, files: Mapping[str, int]) -> None:
        self._files = files
        self._reader = Reader(MOST_FIELDS)
        self._read = self._reader.read_message
        self.weight_files: set[str] = set()

    def check_model(self, data: memoryview) -> None:
        model = self._read(data, _MODEL, "the model")
        opsets = [
            self._read(part, _OPSET, "an opset") for part in _byte_fields(model, "opset_import")
        ]
        imported = {(_text(opset, "domain"), _number(opset, "version")) for opset in opsets}
        if imported not in ({("", OPSET)}, {("ai.onnx", OPSET)}):
            imports = ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in sorted(imported)) or "nothing"
            raise WireError(f"it imports {imports}; ai.onnx {OPSET} alone is allowed")
        graphs = list(_byte_fields(model, "graph"))
        if not graphs:
            raise WireError("it holds no graph")
        self._check_graph(graphs[0], 0)

    def _check_graph(self, data: memoryview, depth: int) -> None:
        if depth > DEEPEST_NESTING:
            raise WireError(f"graphs are nested deeper than {DEEPEST_NESTING}")
        graph = self._read(data, _GRAPH, "a graph")
        for part in _byte_fields(graph, "value"):
            for kind in _byte_fields(self._read(part, _VALUE, "a value"), "type"):
                self._check_type(kind)
        for part in _byte_fields(graph, "initializer"):
            self._check_tensor(part)
        for part in _byte_fields(graph, "node"):
            self._check_node(part, depth)

    def _check_type(self, data: memoryview) -> None:
        for tensor in _byte_fields(self._read(data, _TYPE, "a type"), "tensor"):
            for shape in _byte_fields(self._read(tensor, _TENSOR_TYPE, "a type"), "shape"):
                for dim in _byte_fields(self._read(shape, _SHAPE, "a shape"), "dim"):
                    self._read(dim, _DIM, "an axis")

    def _check_node(self, data: memoryview, depth: int) -> None:
        node = self._read(data, _NODE, "a node")
        domain, operator = _text(node, "domain"), _text(node, "op_type")
        if domain not in ("", "ai.onnx") or operator not in OPERATORS:
            raise WireError(f"the operator {_format_operator(domain, operator)} is not allowed")
        for part in _byte_fields(node, "attribute"):
            attribute = self._read(part, _ATTRIBUTE, "an attribute")
            self._check_packed_lists(attribute)
            for tensor in _byte_fields(attribute, "tensor"):
                self._check_tensor(tensor)
            for graph in _byte_fields(attribute, "graph"):
                self._check_graph(graph, depth + 1)

    def _check_tensor(self, data: memoryview) -> None:
        tensor = self._read(data, _TENSOR, "a tensor")
        kind = _number(tensor, "data_type")
        if kind not in _ELEMENT_SIZES:
            raise WireError(f"a tensor's elements are of type {kind}, which is not allowed")
        count = math.prod(self._read_dims(tensor))  # Python's integers cannot overflow
        data_fields = [name for name in ("raw_data", *_TYPED_FIELDS) if name in tensor]
        if _number(tensor, "data_location") == _EXTERNAL_LOCATION:
            if data_fields:
                raise WireError("a tensor has its data in the file and in another one")
            self._check_external_data(tensor, count * _ELEMENT_SIZES[kind])
            return
        if "external_data" in tensor or _number(tensor, "data_location"):
            raise WireError("a tensor names another file, but is not marked as external")
        if len(data_fields) > 1:
            raise WireError(f"a tensor has its data twice, as {' and '.join(data_fields)}")
        self._check_inline_data(tensor, data_fields, kind, count)

    def _check_external_data(self, tensor: Values, expected: int) -> None:
        """Checks that external weights lie completely in a file of the bundle."""
        entries: dict[str, str] = {}
        for part in _byte_fields(tensor, "external_data"):
            entry = self._read(part, _ENTRY, "an entry")
            key = _text(entry, "key")
            if key in entries or key not in _EXTERNAL_KEYS:
                raise WireError(f"a tensor in another file gives {key[:40]!r}, or gives it twice")
            entries[key] = _text(entry, "value")
        location = entries.get("location", "")
        # Names in the manifest contain no slash, and are never `..` or an address in memory.
        if location not in self._files:
            raise WireError(
                f"a tensor lies in {location[:80]!r}, which is no file that the manifest names"
            )
        offset, length = _decimal(entries, "offset", 0), _decimal(entries, "length", expected)
        if length != expected or offset + length > self._files[location]:
            raise WireError(
                f"a tensor of {expected} bytes claims the bytes {offset} to {offset + length} of "
                f"{location}, which has {self._files[location]}"
            )
        self.weight_files.add(location)

    def _check_inline_data(
        self, tensor: Values, data_fields: list[str], kind: int, count: int
    ) -> None:
        """Checks that the file holds exactly as many elements as the tensor's shape claims."""
        name = data_fields[0] if data_fields else "raw_data"
        data = next(_byte_fields(tensor, name), memoryview(b""))
        if name in _TYPED_FIELDS and kind not in _TYPED_FIELDS[name]:
            raise WireError(f"a tensor of type {kind} has {name}")
        if name in ("raw_data", "float_data", "double_data"):
            elements, rest = divmod(len(data), _ELEMENT_SIZES[kind])
        else:
            elements, rest = self._count_varints(data), 0
        if elements != count or rest:
            raise WireError(f"a tensor of {count} elements of type {kind} has {len(data)} bytes")

    def _check_packed_lists(self, attribute: Values) -> None:
        """Checks that packed numbers of an attribute are complete."""
        for value in attribute.get("floats", ()):
            if isinstance(value, memoryview) and len(value) % 4:
                raise WireError("the last of an attribute's numbers is incomplete")
        for value in attribute.get("ints", ()):
            if isinstance(value, memoryview):
                self._count_varints(value)

    def _count_varints(self, data: memoryview) -> int:
        """The number of packed varints."""
        if len(data) > _LARGEST_PACKED:
            raise WireError(
                f"{len(data)} bytes of numbers are packed; at most {_LARGEST_PACKED} are"
            )
        return sum(1 for _ in self._reader.read_varints(data))

    def _read_dims(self, tensor: Values) -> list[int]:
        dims: list[int] = []
        for value in tensor.get("dims", ()):
            if isinstance(value, int):
                dims.append(value)
            else:
                dims += islice(self._reader.read_varints(value), MOST_AXES + 1)
            if len(dims) > MOST_AXES:
                raise WireError(f"a tensor has more than {MOST_AXES} axes")
        if any(length >= 1 << 31 for length in dims):  # negative ones are encoded as larger numbers
            raise WireError("a tensor's dimension is negative, or above 2**31")
        return dims


def _byte_fields(message: Values, name: str) -> Iterator[memoryview]:
    for value in message.get(name, ()):
        assert isinstance(value, memoryview)
        yield value


def _number(message: Values, name: str) -> Value:
    return message.get(name, [0])[0]


def _text(message: Values, name: str) -> str:
    part = next(_byte_fields(message, name), memoryview(b""))
    if len(part) > _LARGEST_TEXT:
        raise WireError(f"{name} has {len(part)} bytes")
    return bytes(part).decode()


def _decimal(entries: Mapping[str, str], key: str, default: int) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise WireError(f"a tensor in another file has the {key} {text[:40]!r}")
    return int(text)


def _format_operator(domain: str, operator: str) -> str:
    name = f"{domain}.{operator}" if domain else operator
    return repr(name[:80])
