"""Rules by which a graph runs anywhere as a whole: the same file on a CPU and on a GPU.

ONNX Runtime moves a node without a CUDA kernel to the CPU without an error, and within a
Scan it then copies data in every step. Therefore every node of a graph, Scan bodies
included, must have a kernel of exactly its version and type. Graphs draw no random
numbers, contain no functions and refer to no other file, and only their batch axis is
dynamic. Weights lie where ONNX Runtime packs them once for the kernel that reads them
(`graphs.sink_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx

from likely.bundle import TensorSpec
from likely.errors import BundleError
from likely_export.cuda_kernels import KERNELS

OPSET = 20
RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
BRANCHING = {"If", "Loop"}  # on CUDA, the CPU would have to read each condition
MULTIPLYING = {"Gemm", "MatMul"}
PATH = re.compile(r"^[/~]|^[A-Za-z]:\\|\.py\b")
TYPED_BY_SECOND = {"Where"}


def check(
    model: onnx.ModelProto, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> None:
    """Raises unless a graph follows every rule.

    Args:
        model: the graph.
        inputs: its inputs according to the manifest.
        outputs: its outputs according to the manifest.

    Raises:
        BundleError: names the first rule that is broken, and the node that breaks it.
    """
    _check_opset(model)
    _check_traces(model)
    _check_signature("input", inputs, model.graph.input)
    _check_signature("output", outputs, model.graph.output)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    _check_nodes(inferred.graph, {})
    _check_weights(model.graph, ())


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yields the graph and all graphs in its nodes, outermost first."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from subgraphs(body)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yields the graphs in a node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def _check_weights(graph: onnx.GraphProto, above: tuple[dict[str, bool], ...]) -> None:
    """Raises if a product reads a constant of two or more graphs above; `above` has their names."""
    constant = {tensor.name: True for tensor in graph.initializer}
    constant |= {value.name: False for value in graph.input if value.name not in constant}
    scopes = (constant, *above)

    def bound(name: str) -> int:
        """The number of graphs above in which the name is bound."""
        return next((k for k, scope in enumerate(scopes) if name in scope), 0)

    for node in graph.node:
        for name in node.input[1:2] if node.op_type in MULTIPLYING else ():
            distance = bound(name)
            if distance > 1 and scopes[distance][name]:
                raise BundleError(
                    f"{node.op_type} reads {name} from {distance} graphs above, where ONNX Runtime "
                    "packs it again in every step"
                )
        within = list(bodies(node))
        for body in within:
            _check_weights(body, scopes)
        still = not within and all(scopes[bound(name)].get(name) for name in node.input if name)
        constant |= dict.fromkeys(node.output, still)


def _check_opset(model: onnx.ModelProto) -> None:
    imported = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if imported != {"ai.onnx": OPSET}:
        raise BundleError(f"the graph imports {imported}; only ai.onnx {OPSET} is allowed")
    if model.functions:
        names = ", ".join(function.name for function in model.functions)
        raise BundleError(f"the graph holds the functions {names}; nodes must stand inline")


def _check_traces(model: onnx.ModelProto) -> None:
    for graph in subgraphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise BundleError(f"the weight {tensor.name} lies in another file")
        named: list[Any] = [graph, *graph.node, *graph.input, *graph.output, *graph.initializer]
        for part in [model, *named, *graph.value_info]:
            if part.doc_string or part.metadata_props:
                what = getattr(part, "name", "") or "the model"
                raise BundleError(f"{what} carries notes of the exporter, which name its machine")
        for part in named:
            if PATH.search(part.name):
                raise BundleError(f"{part.name!r} looks like a path of the exporter's machine")


def _check_signature(
    what: str, specs: Iterable[TensorSpec], value_infos: Iterable[onnx.ValueInfoProto]
) -> None:
    declared = {spec.name: spec.shape for spec in specs}
    seen = {value.name: _axes(value) for value in value_infos}
    if declared != seen:
        raise BundleError(f"the graph has the {what}s {seen} where {declared} was declared")
    for name, axes in seen.items():
        if not axes or axes[0] != "batch" or not all(isinstance(axis, int) for axis in axes[1:]):
            raise BundleError(f"the {what} {name} is {axes}; axis 0 alone may vary, as 'batch'")


def _axes(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)


def _check_nodes(graph: onnx.GraphProto, outer: Mapping[str, str]) -> None:
    """Raises if a node of the graph has no kernel; `outer` has the types of names around it."""
    types = {**outer, **_types(graph)}
    for node in graph.node:
        _check_node(node, types)
        for body in bodies(node):
            _check_nodes(body, types)


def _types(graph: onnx.GraphProto) -> dict[str, str]:
    """The element types of the graph's own values, as ONNX names them."""
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: onnx.TensorProto.DataType.Name(kind).lower() for name, kind in types.items()}


def _check_node(node: onnx.NodeProto, types: Mapping[str, str]) -> None:
    op, shown = node.op_type, f"the node {node.name or node.output[0]}"
    if node.domain not in ("", "ai.onnx"):
        raise BundleError(f"{shown} is {node.domain}.{op}; only ai.onnx is allowed")
    if op in RANDOM:
        raise BundleError(f"{shown} is {op}, which draws at random; noise must be an input")
    if op in BRANCHING:
        raise BundleError(f"{shown} is {op}; of control flow, Scan alone is allowed")
    version = onnx.defs.get_schema(op, OPSET).since_version
    kernel = KERNELS.get(op)
    if kernel is None or not kernel.first <= version <= kernel.last:
        raise BundleError(f"{shown} is {op}-{version}, which has no CUDA kernel")
    source = node.input[op in TYPED_BY_SECOND]
    if types[source] not in kernel.types:
        raise BundleError(f"{shown} is {op}-{version} of {types[source]}, which has no CUDA kernel")
