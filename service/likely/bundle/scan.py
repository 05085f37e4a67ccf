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
DEEPEST = 4
MOST_AXES = 16
_LARGEST_TEXT = 1 << 12
_LARGEST_PACKED = 1 << 22

# Bytes of an element by ONNX's number of its type; other types are not allowed.
_SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_EXTERNAL = 1

_NUMBER, _TEXT = (Kind.VARINT,), (Kind.BYTES,)


def _one(name: str, kinds: tuple[Kind, ...] = _TEXT) -> Field:
    return Field(name, kinds)


def _many(name: str, kinds: tuple[Kind, ...] = _TEXT) -> Field:
    return Field(name, kinds, many=True)


# Field numbers of onnx.proto. Fields that are left out are refused: metadata (from which the
# runtime reads settings), training, functions, quantisation, sparse and sharded tensors.
_MODEL: Schema = {
    1: _one("ir_version", _NUMBER),
    2: _one("producer_name"),
    3: _one("producer_version"),
    4: _one("domain"),
    5: _one("model_version", _NUMBER),
    6: _one("doc_string"),
    7: _one("graph"),
    8: _many("opset_import"),
}
_OPSET: Schema = {1: _one("domain"), 2: _one("version", _NUMBER)}
_GRAPH: Schema = {
    1: _many("node"),
    2: _one("name"),
    5: _many("initializer"),
    10: _one("doc_string"),
    11: _many("value"),
    12: _many("value"),
    13: _many("value"),
}
_NODE: Schema = {
    1: _many("input"),
    2: _many("output"),
    3: _one("name"),
    4: _one("op_type"),
    5: _many("attribute"),
    6: _one("doc_string"),
    7: _one("domain"),
}
_ATTRIBUTE: Schema = {
    1: _one("name"),
    2: _one("f", (Kind.FIXED32,)),
    3: _one("i", _NUMBER),
    4: _one("s"),
    5: _one("tensor"),
    6: _one("graph"),
    7: _many("floats", (Kind.FIXED32, Kind.BYTES)),
    8: _many("ints", (Kind.VARINT, Kind.BYTES)),
    9: _many("strings"),
    13: _one("doc_string"),
    20: _one("type", _NUMBER),
}
_TENSOR: Schema = {
    1: _many("dims", (Kind.VARINT, Kind.BYTES)),
    2: _one("data_type", _NUMBER),
    4: _one("float_data"),
    5: _one("int32_data"),
    7: _one("int64_data"),
    8: _one("name"),
    9: _one("raw_data"),
    10: _one("double_data"),
    11: _one("uint64_data"),
    12: _one("doc_string"),
    13: _many("external_data"),
    14: _one("data_location", _NUMBER),
}
_ENTRY: Schema = {1: _one("key"), 2: _one("value")}
_VALUE: Schema = {1: _one("name"), 2: _one("type"), 3: _one("doc_string")}
_TYPE: Schema = {1: _one("tensor"), 6: _one("denotation")}
_TENSOR_TYPE: Schema = {1: _one("elem_type", _NUMBER), 2: _one("shape")}
_SHAPE: Schema = {1: _many("dim")}
_DIM: Schema = {1: _one("dim_value", _NUMBER), 2: _one("dim_param"), 3: _one("denotation")}
# Fields of typed data, with their element types; all but the first two hold varints.
_TYPED = {
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
        scan.model(memoryview(path.read_bytes()))
    except (WireError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a graph that is allowed: {error}", "graph") from error
    except OSError as error:
        raise BundleError.unreadable(path, error) from error
    return frozenset(scan.external)


class _Scan:
    """One pass over one file."""

    def __init__(self, files: Mapping[str, int]) -> None:
        self._files = files
        self._reader = Reader(MOST_FIELDS)
        self._read = self._reader.message
        self.external: set[str] = set()

    def model(self, data: memoryview) -> None:
        model = self._read(data, _MODEL, "the model")
        opsets = [self._read(part, _OPSET, "an opset") for part in _parts(model, "opset_import")]
        imported = {(_text(opset, "domain"), _number(opset, "version")) for opset in opsets}
        if imported not in ({("", OPSET)}, {("ai.onnx", OPSET)}):
            imports = ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in sorted(imported)) or "nothing"
            raise WireError(f"it imports {imports}; ai.onnx {OPSET} alone is allowed")
        graphs = list(_parts(model, "graph"))
        if not graphs:
            raise WireError("it holds no graph")
        self._graph(graphs[0], 0)

    def _graph(self, data: memoryview, depth: int) -> None:
        if depth > DEEPEST:
            raise WireError(f"graphs are nested deeper than {DEEPEST}")
        graph = self._read(data, _GRAPH, "a graph")
        for part in _parts(graph, "value"):
            for kind in _parts(self._read(part, _VALUE, "a value"), "type"):
                self._type(kind)
        for part in _parts(graph, "initializer"):
            self._tensor(part)
        for part in _parts(graph, "node"):
            self._node(part, depth)

    def _type(self, data: memoryview) -> None:
        for tensor in _parts(self._read(data, _TYPE, "a type"), "tensor"):
            for shape in _parts(self._read(tensor, _TENSOR_TYPE, "a type"), "shape"):
                for dim in _parts(self._read(shape, _SHAPE, "a shape"), "dim"):
                    self._read(dim, _DIM, "an axis")

    def _node(self, data: memoryview, depth: int) -> None:
        node = self._read(data, _NODE, "a node")
        domain, operator = _text(node, "domain"), _text(node, "op_type")
        if domain not in ("", "ai.onnx") or operator not in OPERATORS:
            raise WireError(f"the operator {_shown(domain, operator)} is not allowed")
        for part in _parts(node, "attribute"):
            attribute = self._read(part, _ATTRIBUTE, "an attribute")
            self._check_lists(attribute)
            for tensor in _parts(attribute, "tensor"):
                self._tensor(tensor)
            for graph in _parts(attribute, "graph"):
                self._graph(graph, depth + 1)

    def _tensor(self, data: memoryview) -> None:
        tensor = self._read(data, _TENSOR, "a tensor")
        kind = _number(tensor, "data_type")
        if kind not in _SIZES:
            raise WireError(f"a tensor's elements are of type {kind}, which is not allowed")
        count = math.prod(self._dims(tensor))  # Python's integers cannot overflow
        given = [name for name in ("raw_data", *_TYPED) if name in tensor]
        if _number(tensor, "data_location") == _EXTERNAL:
            if given:
                raise WireError("a tensor has its data in the file and in another one")
            self._outside(tensor, count * _SIZES[kind])
            return
        if "external_data" in tensor or _number(tensor, "data_location"):
            raise WireError("a tensor names another file, but is not marked as external")
        if len(given) > 1:
            raise WireError(f"a tensor has its data twice, as {' and '.join(given)}")
        self._check_inside(tensor, given, kind, count)

    def _outside(self, tensor: Values, expected: int) -> None:
        """Checks that external weights lie completely in a file of the bundle."""
        entries: dict[str, str] = {}
        for part in _parts(tensor, "external_data"):
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
        self.external.add(location)

    def _check_inside(self, tensor: Values, given: list[str], kind: int, count: int) -> None:
        """Checks that the file holds exactly as many elements as the tensor's shape claims."""
        name = given[0] if given else "raw_data"
        data = next(_parts(tensor, name), memoryview(b""))
        if name in _TYPED and kind not in _TYPED[name]:
            raise WireError(f"a tensor of type {kind} has {name}")
        if name in ("raw_data", "float_data", "double_data"):
            found, rest = divmod(len(data), _SIZES[kind])
        else:
            found, rest = self._count(data), 0
        if found != count or rest:
            raise WireError(f"a tensor of {count} elements of type {kind} has {len(data)} bytes")

    def _check_lists(self, attribute: Values) -> None:
        """Checks that packed numbers of an attribute are complete."""
        for value in attribute.get("floats", ()):
            if isinstance(value, memoryview) and len(value) % 4:
                raise WireError("the last of an attribute's numbers is incomplete")
        for value in attribute.get("ints", ()):
            if isinstance(value, memoryview):
                self._count(value)

    def _count(self, data: memoryview) -> int:
        """The number of packed varints."""
        if len(data) > _LARGEST_PACKED:
            raise WireError(
                f"{len(data)} bytes of numbers are packed; at most {_LARGEST_PACKED} are"
            )
        return sum(1 for _ in self._reader.numbers(data))

    def _dims(self, tensor: Values) -> list[int]:
        dims: list[int] = []
        for value in tensor.get("dims", ()):
            if isinstance(value, int):
                dims.append(value)
            else:
                dims += islice(self._reader.numbers(value), MOST_AXES + 1)
            if len(dims) > MOST_AXES:
                raise WireError(f"a tensor has more than {MOST_AXES} axes")
        if any(length >= 1 << 31 for length in dims):  # negative ones are encoded as larger numbers
            raise WireError("a tensor's dimension is negative, or above 2**31")
        return dims


def _parts(message: Values, name: str) -> Iterator[memoryview]:
    for value in message.get(name, ()):
        assert isinstance(value, memoryview)
        yield value


def _number(message: Values, name: str) -> Value:
    return message.get(name, [0])[0]


def _text(message: Values, name: str) -> str:
    part = next(_parts(message, name), memoryview(b""))
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


def _shown(domain: str, operator: str) -> str:
    name = f"{domain}.{operator}" if domain else operator
    return repr(name[:80])
