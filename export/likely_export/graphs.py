"""Exports a module to an ONNX file that provably computes the same.

An export succeeds only if the graph follows the rules of `hygiene`, and if names, dynamic
axes, shapes and then values agree with torch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from likely.bundle import Graph, TensorSpec
from likely.errors import BundleError
from likely.graphs import Array, Device, Session, agrees
from likely_export import hygiene
from likely_export.hygiene import OPSET, bodies, subgraphs
from likely_export.roles import GraphSource

BATCHES = (1, 3, 64)
NOISY_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
TOLERANCE = 1e-3  # nats
SMALLEST_HALVED = 256  # numbers of a weight
SMALLEST_SHARED = 1024  # bytes of a weight
ALIGNMENT = 64
GOLDEN_TRIES = 200
JITTER = 1e-4


@dataclass(frozen=True)
class Exported:
    """An ONNX file that passed all checks.

    Attributes:
        graph: its entry in the manifest.
        parity: largest difference of a log-likelihood from torch's, in nats.
        golden: inputs and outputs by name, to be replayed by servers.
        source: what it was exported from.
    """

    graph: Graph
    parity: float
    golden: dict[str, Array]
    source: GraphSource


def export(source: GraphSource, path: Path, levels: int, labels: int) -> Exported:
    """Writes a module as ONNX, and compares the two.

    Args:
        source: the module and its signature.
        path: path of the ONNX file.
        levels: number of levels in the pictures that are made for the comparison.
        labels: number of labels in it.

    Raises:
        BundleError: the graph differs from the module (a log-likelihood by more than `TOLERANCE`
            and a millionth of its size), or breaks a rule of `hygiene`.
    """
    write(source, path, levels, labels)
    graph = source.graph(path.name)
    session = Session(path, graph, Device("cpu"))
    parity = max(_difference(source, session, levels, labels, n) for n in BATCHES)
    return Exported(graph, parity, golden(session, levels, labels), source)


def golden(session: Session, levels: int, labels: int) -> dict[str, Array]:
    """Returns inputs and outputs to replay on other machines, with noise that avoids near ties.

    Other processors round differently. If two levels of a pixel nearly tie, the other one may be
    drawn there, which changes the rest of the picture too.
    """
    specs, names = session.spec.inputs, [spec.name for spec in session.spec.outputs]
    feeds: dict[str, Array] = {}
    outputs: list[Array] = []
    moved: list[Array] = []
    draws = any(spec.name == "gumbel" for spec in specs)
    for seed in range(2 * GOLDEN_TRIES if draws else GOLDEN_TRIES):
        fresh = example(specs, 2, levels, labels, seed)
        if seed < GOLDEN_TRIES:
            feeds = fresh
        else:  # with very many pixels, some nearly tie under any noise: only these get other noise
            fallen = _changed_pixels(outputs, moved, feeds["gumbel"])
            feeds["gumbel"] = np.where(fallen, fresh["gumbel"], feeds["gumbel"])
        outputs = session.run(feeds, names)
        moved = session.run(_jittered(feeds, seed), names)
        if all(map(agrees, moved, outputs)):
            return {**feeds, **dict(zip(names, outputs, strict=True))}
    raise BundleError(
        f"no noise of {GOLDEN_TRIES} draws pictures that a jitter of {JITTER:g} leaves unchanged"
    )


def _changed_pixels(outputs: list[Array], moved: list[Array], gumbel: Array) -> Array:
    """Indicator of pixels whose level the jitter changed, (n, h, w, c, 1, ...)."""
    pairs = zip(outputs, moved, strict=True)
    (changed,) = (one != other for one, other in pairs if one.dtype == np.uint8)
    places = changed.transpose(0, 2, 3, 1)
    return places.reshape(places.shape + (1,) * (gumbel.ndim - places.ndim))


def _jittered(feeds: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Returns the inputs with jitter of up to `JITTER` added to their Gumbel noise."""
    if "gumbel" not in feeds:
        return dict(feeds)
    generator = np.random.Generator(np.random.Philox(key=[seed, 7]))
    moved = generator.uniform(-JITTER, JITTER, feeds["gumbel"].shape)
    return {**feeds, "gumbel": feeds["gumbel"] + moved.astype(np.float32)}


def write(source: GraphSource, path: Path, levels: int, labels: int) -> None:
    """Writes a module as one ONNX file, without a trace of the exporting machine.

    Raises:
        BundleError: the graph breaks a rule of `hygiene`.
    """
    feeds = example(source.inputs, 2, levels, labels, seed=0)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), _silence_exporter(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.onnx.export(
            source.module,
            tuple(torch.from_numpy(feeds[spec.name]) for spec in source.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in source.inputs],
            output_names=[spec.name for spec in source.outputs],
            dynamic_shapes=tuple({0: batch} for _ in source.inputs),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    strip_metadata(model)
    sink_weights(model.graph)
    compact(model)
    onnx.checker.check_model(model, full_check=True)
    hygiene.check(model, source.inputs, source.outputs)
    path.write_bytes(model.SerializeToString(deterministic=True))


def share_weights(files: Iterable[Path], weights: Path) -> None:
    """Moves the large weights of ONNX files into one file beside them, each distinct weight once.

    The graphs of one model have many weights in common; equal ones are found by their bytes. A
    matrix that is the transpose of one already stored is replaced by that one and a Transpose,
    which ONNX Runtime folds, or merges with what reads it, when a session is opened.
    """
    places: dict[bytes, int] = {}
    with weights.open("wb") as out:
        for file in files:
            model = onnx.load(file)
            for graph in subgraphs(model.graph):
                for tensor in graph.initializer:
                    values = onnx.numpy_helper.to_array(tensor)
                    content = values.tobytes()
                    if len(content) < SMALLEST_SHARED:
                        continue
                    if content not in places and values.ndim == 2:
                        transposed = values.T.tobytes()
                        if transposed in places:
                            graph.node.insert(0, _transpose(tensor))
                            content = transposed
                    if content not in places:
                        out.write(b"\0" * (-out.tell() % ALIGNMENT))
                        places[content] = out.tell()
                        out.write(content)
                    _refer(tensor, weights.name, places[content], len(content))
            file.write_bytes(model.SerializeToString(deterministic=True))


def _transpose(tensor: onnx.TensorProto) -> onnx.NodeProto:
    """Declares a matrix transposed; returns the node that transposes it back."""
    name, dims = tensor.name, tensor.dims[::-1]
    tensor.name = f"{name}_transposed"
    tensor.dims[:] = dims
    return onnx.helper.make_node("Transpose", [tensor.name], [name], perm=[1, 0])


def _refer(tensor: onnx.TensorProto, file: str, offset: int, length: int) -> None:
    """Replaces the values of a weight by a place in a file."""
    for field in ("raw_data", "float_data", "int32_data", "int64_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": file, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))


def extract_outputs(path: Path, target: Path, outputs: list[str]) -> None:
    """Writes the part of an ONNX file that computes these outputs.

    Unlike onnx's own Extractor, it keeps what is read only by the body of a node.
    """
    model = onnx.load(path)
    graph, wanted = model.graph, set(outputs)
    for node in reversed(list(graph.node)):
        if wanted.isdisjoint(filter(None, node.output)):  # an omitted output has the name ""
            graph.node.remove(node)
            continue
        wanted |= set(node.input).union(*map(_free_names, bodies(node)))
    for tensor in [weight for weight in graph.initializer if weight.name not in wanted]:
        graph.initializer.remove(tensor)
    for output in [value_info for value_info in graph.output if value_info.name not in outputs]:
        graph.output.remove(output)
    onnx.save(model, target)


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Silences the exporter's messages about absent packages and skipped steps."""
    levels = {logger: logger.level for logger in map(logging.getLogger, NOISY_LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def strip_metadata(model: onnx.ModelProto) -> None:
    """Removes stack traces, paths and doc strings that the exporter left."""
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    for graph in subgraphs(model.graph):
        del graph.metadata_props[:]
        graph.ClearField("doc_string")
        graph.name = "main"
        parts: Iterable[onnx.NodeProto | onnx.ValueInfoProto | onnx.TensorProto]
        for parts in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
            for part in parts:
                del part.metadata_props[:]
                part.ClearField("doc_string")


def sink_weights(graph: onnx.GraphProto) -> None:
    """Moves every weight into the graph that reads it, if only one does.

    When a session is opened, ONNX Runtime packs weights for its matrix kernels once, except those
    that lie two or more graphs above their node: it packs these again in every step.
    """
    used_here = {name for node in graph.node for name in node.input}
    used_here |= {output.name for output in graph.output}
    within = [(body, _free_names(body)) for node in graph.node for body in bodies(node)]
    for tensor in list(graph.initializer):
        users = [body for body, names in within if tensor.name in names]
        if tensor.name not in used_here and len(users) == 1:
            users[0].initializer.append(tensor)
            graph.initializer.remove(tensor)
    for body, _ in within:
        sink_weights(body)


def _free_names(graph: onnx.GraphProto) -> set[str]:
    """The names that a graph, with the graphs in its nodes, reads from the graphs around it."""
    read = {name for node in graph.node for name in node.input}
    read |= {output.name for output in graph.output}
    for node in graph.node:
        for body in bodies(node):
            read |= _free_names(body)
    defined = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {name for node in graph.node for name in node.output}
    return read - defined


def round_to_half(model: torch.nn.Module) -> torch.nn.Module:
    """Rounds the weights of a model to half precision, which `compact` then stores."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half().float())
    return model


def compact(model: onnx.ModelProto) -> None:
    """Stores weights in half precision if that represents them exactly.

    A Cast at the start of the graph restores them. ONNX Runtime folds it once, when a session is
    opened, and all results stay the same to the bit.
    """
    for graph in subgraphs(model.graph):
        casts = [cast for tensor in graph.initializer if (cast := _halved_exactly(tensor))]
        for cast in reversed(casts):
            graph.node.insert(0, cast)


def _halved_exactly(tensor: onnx.TensorProto) -> onnx.NodeProto | None:
    """Halves a weight in place if that loses nothing; returns the node that casts it back."""
    values = onnx.numpy_helper.to_array(tensor)
    if values.dtype != np.float32 or values.size < SMALLEST_HALVED:
        return None
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        return None
    name = tensor.name
    tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_half"))
    return onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT)


def example(
    specs: Iterable[TensorSpec], n: int, levels: int, labels: int, seed: int
) -> dict[str, Array]:
    """Returns inputs for a batch of `n`: random pictures and labels, and noise as in serving."""
    generator = np.random.Generator(np.random.Philox(key=[seed, n]))
    feeds: dict[str, Array] = {}
    for spec in specs:
        shape = spec.array_shape(n)
        if spec.name == "x":
            feeds["x"] = generator.integers(0, levels, shape).astype(np.uint8)
        elif spec.name == "y":
            feeds["y"] = generator.integers(0, labels, shape)
        elif spec.name == "gumbel":
            feeds["gumbel"] = generator.gumbel(size=shape).astype(np.float32)
        else:
            feeds[spec.name] = generator.standard_normal(shape, dtype=np.float32)
    return feeds


def _difference(source: GraphSource, session: Session, levels: int, labels: int, n: int) -> float:
    """Compares a batch of `n`; returns the largest difference of a log-likelihood, in nats."""
    feeds = example(source.inputs, n, levels, labels, seed=1)
    with torch.no_grad():
        result = source.module(*(torch.from_numpy(feeds[spec.name]) for spec in source.inputs))
    expected = (result,) if isinstance(result, torch.Tensor) else result
    outputs = session.run(feeds, [spec.name for spec in source.outputs])
    worst = 0.0
    for spec, torch_value, got in zip(source.outputs, expected, outputs, strict=True):
        value = torch_value.numpy()
        _compare(spec, value, got, n)
        if spec.name.startswith("log_p"):
            worst = max(worst, float(np.abs(value - got).max()))
    return worst


def _compare(spec: TensorSpec, value: Array, got: Array, n: int) -> None:
    if got.shape != spec.array_shape(n) or got.dtype != spec.dtype:
        raise BundleError(
            f"{spec.name} is {got.dtype} {got.shape} in ONNX; {spec.dtype} {spec.array_shape(n)} "
            "was declared"
        )
    if spec.dtype == "uint8":
        # Two levels that tie up to rounding may be drawn either way, and change the rest.
        changed = int(np.any((value != got).reshape(n, -1), 1).sum())
        if changed > 1 + n // 20:
            raise BundleError(f"{changed} of {n} drawn pictures differ between torch and ONNX")
        return
    relative, size = 1e-6, np.abs(value)
    if spec.name == "surprise":
        # A pixel far out in the tail of a sharp logistic: the sharpness amplifies rounding.
        relative = 1e-4
    if spec.name == "statistics":
        # A small number may be the difference of large ones: compare with the column's largest.
        relative, size = 1e-4, size.max(0)
    allowed = TOLERANCE + relative * size
    if not np.all(np.abs(value - got) <= allowed):  # neither is NaN
        worst = float(np.abs(value - got).max())
        raise BundleError(
            f"{spec.name} differs by {worst:.2e} between torch and ONNX at batch {n}; "
            f"{TOLERANCE:g} and {relative:g} of its size are allowed"
        )
