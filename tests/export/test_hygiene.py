import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import autoregressive
import onnx
import pytest
from autoregressive import CONFIGS
from onnx import TensorProto, helper

from likely.bundle import Bundle, Role, TensorSpec
from likely.errors import BundleError
from likely_export import graphs, hygiene, roles
from likely_export.cuda_kernels import KERNELS
from likely_export.cvae import CVAE, CVAEConfig
from likely_export.pixelrnn import PixelRNNConfig
from likely_export.roles import GraphSource
from likely_export.statistics import STATISTICS

NAMES = tuple(name for name, each in STATISTICS.items() if each.needs is None)
BOUND = CVAEConfig((1, 3, 2), 5, 3, latent=4, width=16, importance_samples=7)
BOUNDS = {"cvae": BOUND, "cvae_logistic": replace(BOUND, shape=(3, 4, 4), levels=64, logistics=2)}
BUNDLES = [*Path("service/likely/bundles").iterdir(), *sorted(Path("bundles").iterdir())]
SHIPPED = [(folder, role) for folder in BUNDLES for role in Bundle.open(folder).manifest.graphs]

Plant = Callable[[onnx.ModelProto], None]


def sources() -> dict[str, tuple[Role, str]]:
    found: dict[str, tuple[Role, str]] = {}
    for name, config in CONFIGS.items():
        own = [Role.DENSITY, Role.SAMPLE] + [Role.CONDITIONAL] * bool(config.labels)
        if isinstance(config, PixelRNNConfig):
            own = [Role.CONDITIONAL]  # the others are exported, and so checked, by other tests
        found |= {f"{name}-{role}": (role, name) for role in own}
    for name in BOUNDS:
        for role in (Role.CONDITIONAL, Role.GENERATE, Role.ENCODE):
            found[f"{name}-{role}"] = (role, name)
    return found


def source(role: Role, name: str) -> tuple[GraphSource, int, int]:
    if name in CONFIGS:
        config = CONFIGS[name]
        return (
            roles.graph_source(role, [autoregressive.model(name)], NAMES),
            config.levels,
            config.labels,
        )
    bound = BOUNDS[name]
    return roles.graph_source(role, [CVAE(bound).eval()], NAMES), bound.levels, bound.labels


@functools.cache
def sample(folder: Path) -> tuple[bytes, GraphSource]:
    """The sampler's graph and what it was exported from."""
    given, levels, labels = source(Role.SAMPLE, "grey")
    graphs.write(given, folder / "sample.onnx", levels, labels)
    return (folder / "sample.onnx").read_bytes(), given


def checked(model: onnx.ModelProto, given: GraphSource) -> None:
    hygiene.check(model, given.inputs, given.outputs)


def innermost(model: onnx.ModelProto) -> onnx.GraphProto:
    """The body of the Scan over columns."""
    return list(hygiene.subgraphs(model.graph))[-1]


@pytest.mark.parametrize("which", sources())
def test_every_exported_graph_keeps_the_rules(which: str, tmp_path: Path) -> None:
    given, levels, labels = source(*sources()[which])
    graphs.write(given, tmp_path / "graph.onnx", levels, labels)
    model = onnx.load(tmp_path / "graph.onnx")
    checked(model, given)
    operators = {node.op_type for body in hygiene.subgraphs(model.graph) for node in body.node}
    assert "Pad" not in operators
    scanned = which.endswith("-sample") or "lstm" in which
    scanned |= which.startswith("cvae") and "conditional" in which
    assert ("Scan" in operators) == scanned


@pytest.mark.parametrize(("folder", "role"), SHIPPED)
def test_every_shipped_graph_keeps_the_rules(folder: Path, role: Role) -> None:
    bundle = Bundle.open(folder)
    spec = bundle.manifest.graphs[role]
    hygiene.check(onnx.load(bundle.graph(role)), spec.inputs, spec.outputs)


def pad(model: onnx.ModelProto) -> None:
    plant_pad(model.graph, "gumbel", 6)


def pad_in_scan(model: onnx.ModelProto) -> None:
    body = innermost(model)
    plant_pad(body, body.input[0].name, 2)


def plant_pad(graph: onnx.GraphProto, name: str, rank: int) -> None:
    pads = helper.make_tensor("pads", TensorProto.INT64, [2 * rank], [0] * 2 * rank)
    graph.initializer.append(pads)
    graph.node.append(helper.make_node("Pad", [name, "pads"], ["padded"]))


def randomness(model: onnx.ModelProto) -> None:
    body = innermost(model)
    node = helper.make_node("RandomUniformLike", [body.input[0].name], ["chance"])
    body.node.append(node)


def without_kernel(model: onnx.ModelProto) -> None:
    innermost(model).node.append(
        helper.make_node("Selu", [innermost(model).input[0].name], ["scaled"])
    )


def newer_than_its_kernel(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ReduceMax", ["gumbel"], ["largest"]))


def type_without_kernel(model: onnx.ModelProto) -> None:
    node = helper.make_node("Cast", ["gumbel"], ["whole"], to=TensorProto.INT64)
    model.graph.node.extend([node, helper.make_node("ArgMax", ["whole"], ["first"])])


def loop(model: onnx.ModelProto) -> None:
    count = helper.make_tensor("count", TensorProto.INT64, [], [1])
    going = helper.make_tensor("going", TensorProto.BOOL, [], [True])
    model.graph.initializer.extend([count, going])
    inputs = [
        helper.make_tensor_value_info("step", TensorProto.INT64, []),
        helper.make_tensor_value_info("on", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("still", TensorProto.BOOL, [])]
    node = helper.make_node("Identity", ["on"], ["still"])
    body = helper.make_graph([node], "body", inputs, outputs)
    model.graph.node.append(helper.make_node("Loop", ["count", "going"], [], body=body, name="l"))


def newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 22


def other_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    opset = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("", "copy", ["a"], ["b"], [node], opset))


def external_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def stack_trace(model: onnx.ModelProto) -> None:
    innermost(model).node[0].doc_string = "sampler.py:12"


def path_for_a_name(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "/somewhere/sampler.py"


def weight_far_above(model: onnx.ModelProto) -> None:
    body = innermost(model)
    weight = next(each for each in body.initializer if len(each.dims) == 2)
    assert any(weight.name in node.input for node in body.node if node.op_type == "Gemm")
    model.graph.initializer.append(weight)
    body.initializer.remove(weight)


def made_weight_far_above(model: onnx.ModelProto) -> None:
    weight_far_above(model)
    weight = model.graph.initializer[-1]
    name, weight.name = weight.name, "half"
    model.graph.node.insert(0, helper.make_node("Transpose", ["half"], ["turned"], perm=[1, 0]))
    model.graph.node.insert(1, helper.make_node("Transpose", ["turned"], [name], perm=[1, 0]))


def fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def second_dynamic_axis(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "rows"


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (pad, "Pad-19, which has no CUDA kernel"),
        (pad_in_scan, "Pad-19, which has no CUDA kernel"),
        (randomness, "RandomUniformLike, which draws at random"),
        (without_kernel, "Selu-6, which has no CUDA kernel"),
        (newer_than_its_kernel, "ReduceMax-20, which has no CUDA kernel"),
        (type_without_kernel, "ArgMax-13 of int64, which has no CUDA kernel"),
        (loop, "is Loop; of control flow, Scan alone is allowed"),
        (newer_opset, "imports {'ai.onnx': 22}"),
        (other_domain, "only ai.onnx 20 is allowed"),
        (function, "holds the functions copy"),
        (external_weight, "lies in another file"),
        (stack_trace, "carries notes of the exporter"),
        (path_for_a_name, "looks like a path"),
        (weight_far_above, "from 2 graphs above"),
        (made_weight_far_above, "from 2 graphs above"),
        (fixed_batch, "was declared"),
        (second_dynamic_axis, "was declared"),
    ],
)
def test_a_planted_fault_is_found(
    plant: Plant, problem: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content, given = sample(tmp_path_factory.getbasetemp())
    model = onnx.load_from_string(content)
    checked(model, given)
    plant(model)
    with pytest.raises(BundleError, match=problem.replace("{", r"\{")):
        checked(model, given)


def test_a_signature_with_a_second_dynamic_axis_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content, given = sample(tmp_path_factory.getbasetemp())
    model = onnx.load_from_string(content)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "batch"
    declared = TensorSpec(name="x", dtype="uint8", shape=("batch", 1, "batch", 4))
    with pytest.raises(BundleError, match="axis 0 alone may vary"):
        hygiene.check(model, given.inputs, [declared])


def test_kernels_are_of_operators_that_opset_20_has() -> None:
    for op, kernel in KERNELS.items():
        version = onnx.defs.get_schema(op, hygiene.OPSET).since_version
        assert kernel.first <= version, f"{op}-{version} is older than its kernel"
        assert kernel.types


def test_an_export_that_breaks_a_rule_fails(tmp_path: Path) -> None:
    import torch

    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rand_like(x.float()).flatten(1).sum(1)

    x = TensorSpec(name="x", dtype="uint8", shape=("batch", 1, 2, 2))
    log_px = TensorSpec(name="log_px", dtype="float32", shape=("batch",))
    path = tmp_path / "graph.onnx"
    with pytest.raises(BundleError, match="draws at random"):
        graphs.write(GraphSource(Noisy(), (x,), (log_px,)), path, 2, 0)
    assert not path.exists()
