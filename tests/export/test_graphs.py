"""Weights move to where they are read, and nothing else changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnx.helper import make_tensor_value_info as info

from likely.bundle import Graph, TensorSpec
from likely.errors import BundleError
from likely.graphs import Array
from likely_export import graphs
from likely_export.graphs import compact, sink_weights
from likely_export.hygiene import subgraphs

SIZE = 16


def weight(name: str) -> onnx.TensorProto:
    """Exact in half precision, and large enough to be halved."""
    values = np.random.default_rng(len(name)).integers(-8, 8, (SIZE, SIZE)) / 8
    return numpy_helper.from_array(values.astype(np.float32), name)


def scan(body: onnx.GraphProto, start: str, given: str, end: str) -> onnx.NodeProto:
    return helper.make_node("Scan", [start, given], [end], body=body, num_scan_inputs=1)


def body(reads: list[str], name: str, inner: onnx.GraphProto | None = None) -> onnx.GraphProto:
    """state @ reads[0] @ ...[, then a Scan of its own over the row]."""
    nodes, value = [], f"{name}_state"
    for i, read in enumerate(reads):
        nodes.append(helper.make_node("MatMul", [value, read], [f"{name}_{i}"]))
        value = f"{name}_{i}"
    row: list[int | str | None] = ["n", SIZE]
    given = ["t", *row] if inner else row
    if inner:
        nodes.append(scan(inner, value, f"{name}_row", f"{name}_end"))
        value = f"{name}_end"
    else:
        nodes.append(helper.make_node("Add", [value, f"{name}_row"], [f"{name}_sum"]))
        value = f"{name}_sum"
    inputs = [info(f"{name}_state", 1, row), info(f"{name}_row", 1, given)]
    return helper.make_graph(nodes, name, inputs, [info(value, 1, row)])


def model() -> onnx.ModelProto:
    """Two Scans, one within the other, and a third: `deep`, `shallow`, `both` and `here`."""
    inner = body(["deep", "both"], "inner")
    nodes = [
        helper.make_node("MatMul", ["x", "here"], ["y"]),
        scan(body(["shallow"], "outer", inner), "y", "rows", "z"),
        helper.make_node("Squeeze", ["rows", "first"], ["flat"]),
        scan(body(["both"], "other"), "z", "flat", "end"),
    ]
    inputs = [info("x", 1, ["n", SIZE]), info("rows", 1, [1, "t", "n", SIZE])]
    axes = numpy_helper.from_array(np.array([0]), "first")
    weights = [weight(name) for name in ("deep", "shallow", "both", "here", "told")]
    outputs = [info("end", 1, ["n", SIZE]), info("told", 1, [SIZE, SIZE])]
    graph = helper.make_graph(nodes, "main", inputs, outputs, [*weights, axes])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def lying(model: onnx.ModelProto) -> dict[str, list[str]]:
    """The weights of every graph."""
    found = {}
    for graph in subgraphs(model.graph):
        found[graph.name] = sorted(tensor.name for tensor in graph.initializer)
    return found


def answers(model: onnx.ModelProto) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    feeds = {
        "x": generator.normal(size=(3, SIZE)).astype(np.float32),
        "rows": generator.normal(size=(1, 2, 3, SIZE)).astype(np.float32),
    }
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    return found


def test_a_weight_sinks_to_the_one_graph_that_reads_it() -> None:
    made = model()
    before = answers(made)
    sink_weights(made.graph)
    assert lying(made) == {
        "main": ["both", "first", "here", "told"],
        "outer": ["shallow"],
        "inner": ["deep"],
        "other": [],
    }
    onnx.checker.check_model(made, full_check=True)
    assert all(map(np.array_equal, answers(made), before))


def test_a_name_that_a_body_binds_itself_is_another() -> None:
    made = model()
    for graph in subgraphs(made.graph):
        if graph.name == "other":
            graph.initializer.append(weight("both"))
    sink_weights(made.graph)
    assert lying(made)["inner"] == ["both", "deep"] and lying(made)["other"] == ["both"]


def test_weights_are_halved_wherever_they_lie() -> None:
    made = model()
    before = answers(made)
    sink_weights(made.graph)
    compact(made)
    onnx.checker.check_model(made, full_check=True)
    for graph in subgraphs(made.graph):
        for tensor in graph.initializer:
            assert tensor.data_type != onnx.TensorProto.FLOAT, tensor.name
    assert all(map(np.array_equal, answers(made), before))


@pytest.mark.parametrize(("name", "most"), [("log_px", 2e-3), ("surprise", 0.1)])
def test_how_far_torch_and_onnx_may_differ(name: str, most: float) -> None:
    value = np.full((2, 1), 1000.0, np.float32)
    spec = TensorSpec(name=name, dtype="float32", shape=("batch", 1))
    graphs._compare(spec, value, value + np.float32(0.9 * most), 2)
    with pytest.raises(BundleError, match=f"{name} differs by"):
        graphs._compare(spec, value, value + np.float32(1.2 * most), 2)


class Levels:
    """A stand-in for a session: each pixel's level is its noise in steps of 1e-2, of so many."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        c, h, w = shape
        axes = {"gumbel": ("float32", (h, w, c, 1)), "x": ("uint8", shape)}
        gumbel, x = (
            TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": ("batch", *own)})
            for name, (dtype, own) in axes.items()
        )
        self.spec = Graph(
            file="levels.onnx", inputs=(gumbel,), outputs=(x,), kind=None, importance_samples=0
        )
        self.runs = 0

    def run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        assert list(names) == ["x"]
        self.runs += 1
        steps = np.rint(feeds["gumbel"][..., 0] * 100).clip(0, 255)
        return [steps.transpose(0, 3, 1, 2).astype(np.uint8)]


def test_where_any_noise_leaves_near_ties_those_pixels_alone_get_other_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "GOLDEN_TRIES", 10)
    session: Any = Levels((3, 32, 32))
    found = graphs.golden(session, 256, 1)
    assert session.runs > 2 * 10  # no noise as it was drawn would do
    (drawn,) = session.run(found, ["x"])
    assert np.array_equal(drawn, found["x"])
    for jitter in (-1e-6, 1e-6):  # as another processor rounds
        moved = {"gumbel": found["gumbel"] + np.float32(jitter)}
        assert np.mean(session.run(moved, ["x"])[0] != drawn) < 1e-3
    own = graphs.example(session.spec.inputs, 2, 256, 1, seed=9)["gumbel"]
    assert np.mean(own == found["gumbel"]) > 0.9


def test_noise_that_stands_as_it_was_drawn_is_kept() -> None:
    session: Any = Levels((1, 2, 2))
    found = graphs.golden(session, 256, 1)["gumbel"]
    drawn = [graphs.example(session.spec.inputs, 2, 256, 1, seed)["gumbel"] for seed in range(9)]
    assert any(np.array_equal(found, one) for one in drawn)


def test_a_matrix_and_its_transpose_are_stored_once(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((5, 48)).astype(np.float32)
    files, outputs = [], []
    for name, matrix in {"a": values.T, "b": values, "c": values + 1}.items():
        width, height = matrix.shape
        inputs = [info("x", 1, ["n", width])]
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            name,
            inputs,
            [info("y", 1, ["n", height])],
            [numpy_helper.from_array(np.ascontiguousarray(matrix), "w")],
        )
        file = tmp_path / f"{name}.onnx"
        opset = helper.make_opsetid("", 20)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), file)
        files.append(file)
        feed = np.resize(x, (5, width))
        outputs.append((feed, ort.InferenceSession(file).run(None, {"x": feed})[0]))
    graphs.share_weights(files, tmp_path / "weights.bin")
    size = values.nbytes
    assert 2 * size <= (tmp_path / "weights.bin").stat().st_size < 2 * size + graphs.ALIGNMENT
    for file, (feed, output) in zip(files, outputs, strict=True):
        assert np.array_equal(ort.InferenceSession(file).run(None, {"x": feed})[0], output)
