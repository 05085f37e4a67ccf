"""What an ONNX file may hold, rule by rule; what the export side writes passes."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from likely.bundle import Role
from likely.bundle.scan import DEEPEST_NESTING, OPERATORS, OPSET, check_graph
from likely.bundle.wire import Field, Kind, Reader, WireError
from likely.errors import BundleError

if TYPE_CHECKING:
    from tests.conftest import Toy

onnx = pytest.importorskip("onnx")
SHIPPED = sorted(
    path for shelf in ("service/likely/bundles", "bundles") for path in Path(shelf).glob("*/*.onnx")
)
FILES = {"weights.data": 64, "density.onnx": 9}


def model(*nodes: Any, **changes: Any) -> Any:
    """A sound graph with these nodes."""
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    add = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([add, *nodes], "g", [x], [y], [weights])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def outside(location: str, offset: str = "0", length: str = "16", **more: str) -> Any:
    made = model()
    weights = made.graph.initializer[0]
    del weights.float_data[:]
    weights.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": location, "offset": offset, "length": length, **more}
    for key, value in entries.items():
        weights.external_data.add(key=key, value=value)
    return made


def nested(depth: int) -> Any:
    from onnx import helper

    body = helper.make_graph([], "innermost", [], [])
    for level in range(depth):
        scan = helper.make_node("Scan", ["x"], ["z"], body=body, num_scan_inputs=1)
        body = helper.make_graph([scan], f"level {level}", [], [])
    return model(*body.node)


def deep(levels: int) -> bytes:
    """The bytes of graphs in graphs, more than a library would write."""

    def field(number: int, value: bytes) -> bytes:
        size, head = len(value), bytearray([number << 3 | 2])
        while size >= 0x80:
            head.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes([*head, size]) + value

    graph = b""
    for _ in range(levels):
        graph = field(1, field(4, b"Scan") + field(5, field(6, graph)))
    return field(8, b"\x10" + bytes([OPSET])) + field(7, graph)


def written(path: Path, made: Any) -> Path:
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return path


def refused(folder: Path, made: Any, sentence: str) -> None:
    with pytest.raises(BundleError, match=sentence) as caught:
        check_graph(written(folder / "density.onnx", made), FILES)
    assert caught.value.reason == "graph"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_ships_passes(path: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in path.parent.iterdir()}
    assert check_graph(path, sizes) <= set(sizes)


def test_the_toy_passes(toy: Toy) -> None:
    for role in Role:
        assert check_graph(toy.path / f"{role}.onnx", {}) == frozenset()


def test_the_list_is_what_the_export_side_can_write() -> None:
    kernels = pytest.importorskip("likely_export.cuda_kernels").KERNELS
    hygiene = pytest.importorskip("likely_export.hygiene")
    forbidden = hygiene.RANDOM | hygiene.BRANCHING
    possible = {
        name
        for name, kernel in kernels.items()
        if kernel.first <= onnx.defs.get_schema(name, OPSET).since_version <= kernel.last
    }
    assert possible - forbidden == OPERATORS
    assert hygiene.OPSET == OPSET


def test_weights_may_lie_in_a_file_that_the_manifest_names(tmp_path: Path) -> None:
    for offset in ("0", "48"):
        path = written(tmp_path / "density.onnx", outside("weights.data", offset, checksum="x"))
        assert check_graph(path, FILES) == {"weights.data"}


PLACES = [
    ("../weights.data", "names"),
    ("/etc/passwd", "names"),
    ("./weights.data", "names"),
    ("sub/weights.data", "names"),
    ("other.data", "names"),
    ("", "names"),
    ("weights.data\0", "names"),
    ("*/_ORT_MEM_ADDR_/*", "names"),
]


@pytest.mark.parametrize(("location", "sentence"), PLACES)
def test_weights_lie_nowhere_else(tmp_path: Path, location: str, sentence: str) -> None:
    refused(tmp_path, outside(location), sentence)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        ("49", "16"), ("0", "15"), ("0", "17"), ("-1", "16"), ("1e1", "16"), ("", "16"),
        ("٣", "16"), ("9" * 30, "16"), ("0", "x"),
    ],
)  # fmt: skip
def test_weights_lie_within_their_file(tmp_path: Path, offset: str, length: str) -> None:
    refused(tmp_path, outside("weights.data", offset, length), "a tensor")


def inner_tensor(**fields: Any) -> Any:
    made = model()
    weights = made.graph.initializer[0]
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(weights, name)[:]
            getattr(weights, name).extend(value)
        else:
            setattr(weights, name, value)
    return made


def twice(made: Any) -> bytes:
    """The model with a second graph field, which a parser would merge into the first."""
    return bytes(made.SerializeToString() + made.SerializeToString())


def without_graph() -> Any:
    made = model()
    made.ClearField("graph")
    return made


def with_(**fields: Callable[[Any], Any]) -> Any:
    made = model()
    for change in fields.values():
        change(made)
    return made


def node(operator: str, domain: str = "", **attributes: Any) -> Any:
    return model(onnx.helper.make_node(operator, ["x"], ["z"], domain=domain, **attributes))


RULES: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: b"", "imports nothing"),
    "no protocol buffers": (lambda: b"\xff" * 40, "more than 64 bits"),
    "text": (lambda: b"no graph at all", "the model"),
    "cut": (lambda: model().SerializeToString()[:-3], "ends within"),
    "no graph": (without_graph, "no graph"),
    "twice": (lambda: twice(model()), "twice"),
    "another opset": (
        lambda: with_(a=lambda m: m.opset_import[0].__setattr__("version", 21)),
        "21",
    ),
    "another domain": (
        lambda: with_(a=lambda m: m.opset_import.add(domain="evil", version=1)),
        "e",
    ),
    "a custom operator": (lambda: node("Load", "evil"), r"'evil\.Load' is not allowed"),
    "a contributed one": (lambda: node("Gelu", "com.microsoft"), "com.microsoft"),
    "control flow": (lambda: node("Loop"), "'Loop' is not allowed"),
    "chance": (lambda: node("RandomNormal"), "'RandomNormal'"),
    "an overload": (lambda: with_(a=lambda m: m.graph.node[0].__setattr__("overload", "x")), "8"),
    "a function": (lambda: with_(a=lambda m: m.functions.add(name="f")), "field 25"),
    "metadata": (lambda: with_(a=lambda m: m.metadata_props.add(key="k")), "field 14"),
    "training": (lambda: with_(a=lambda m: m.training_info.add()), "field 20"),
    "sparse": (lambda: with_(a=lambda m: m.graph.sparse_initializer.add()), "field 15"),
    "a huge claim": (lambda: inner_tensor(dims=[2**30, 2**30]), "has 16 bytes"),
    "a negative one": (lambda: inner_tensor(dims=[-4]), "negative"),
    "many axes": (lambda: inner_tensor(dims=[1] * 17), "more than 16 axes"),
    "strings": (lambda: inner_tensor(data_type=8), "type 8"),
    "data twice": (lambda: inner_tensor(raw_data=bytes(16)), "data twice"),
    "another type": (lambda: inner_tensor(data_type=7), "type 7 has float_data"),
    "too deep": (lambda: nested(DEEPEST_NESTING + 1), "nested deeper"),
    "far too deep": (lambda: deep(500), "nested deeper"),
    "a long name": (lambda: node("A" * 10**6), "1000000 bytes"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_graph_that_breaks_a_rule_is_refused(tmp_path: Path, rule: str) -> None:
    make, sentence = RULES[rule]
    refused(tmp_path, make(), sentence)


def test_graphs_may_be_nested_a_little(tmp_path: Path) -> None:
    for depth in range(DEEPEST_NESTING + 1):
        check_graph(written(tmp_path / "density.onnx", nested(depth)), FILES)


def test_another_ending_is_another_format(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"does not end in \.onnx"):
        check_graph(written(tmp_path / "density.ort", model()), FILES)


def test_a_graph_that_cannot_be_read_now_is_not_forbidden(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(BundleError, match="cannot be read: Stale file handle") as caught:
        check_graph(toy.path / "density.onnx", {})
    assert caught.value.reason == "unreadable"


def test_a_file_of_tiny_fields_ends_soon() -> None:
    schema = {1: Field("a", (Kind.VARINT,), repeated=True)}
    data = memoryview(b"\x08\x01" * 1000)
    assert len(Reader(1000).read_message(data, schema, "it")["a"]) == 1000
    with pytest.raises(WireError, match="too many fields"):
        Reader(999).read_message(data, schema, "it")


def test_so_does_one_of_numbers_packed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = inner_tensor(data_type=7, dims=[1000], float_data=[], int64_data=[0] * 1000)
    check_graph(written(tmp_path / "density.onnx", made), FILES)
    monkeypatch.setattr("likely.bundle.scan.MOST_FIELDS", 1000)
    refused(tmp_path, made, "too many fields, or numbers in them")


def test_what_the_scan_lets_pass_a_parser_reads_alike(toy: Toy, tmp_path: Path) -> None:
    """Random harm: the scan raises nothing else, and what passes is a model to onnx too."""
    whole = (toy.path / "density.onnx").read_bytes()
    rng, passed = random.Random(5), 0
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path = written(tmp_path / "harmed.onnx", bytes(data))
        try:
            check_graph(path, {})
        except BundleError:
            continue
        passed += 1
        onnx.ModelProto.FromString(bytes(data))
    assert 0 < passed < 3000
