"""The reference models, with random weights, and the graphs to measure."""

from __future__ import annotations

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from likely.bundle import Graph, TensorSpec
from likely_export import roles
from likely_export.autoregressive import Autoregressive
from likely_export.cvae import CVAE, CVAEConfig
from likely_export.pixelcnn import PixelCNN, PixelCNNConfig
from likely_export.roles import GraphSource

PIXELCNN = PixelCNNConfig((1, 28, 28), 256, channels=64, layers=8, head=64)
BOUNDS = {
    "bernoulli": CVAEConfig((1, 28, 28), 2, 10, latent=32, width=400, importance_samples=16),
    "logistic": CVAEConfig(
        (1, 28, 28), 256, 10, latent=32, width=400, importance_samples=16, logistics=2
    ),
    # The form of the CVAEs of MNIST and Fashion-MNIST.
    "prior": CVAEConfig(
        (1, 28, 28), 256, 10, latent=24, width=256, importance_samples=4, logistics=1,
        convolutions=(32, 64, 64), convolution_depth=2, label_prior=True,
    ),
}  # fmt: skip
MATMUL = (2048, 512, 512)


def pixelcnn() -> PixelCNN:
    """The reference PixelCNN; the head's weights, zero before training, are drawn too."""
    torch.manual_seed(0)
    model = PixelCNN(PIXELCNN)
    nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def cvae(config: CVAEConfig) -> CVAE:
    """A CVAE with random weights."""
    torch.manual_seed(0)
    return CVAE(config).eval()


def pass_flops(config: PixelCNNConfig) -> int:
    """Floating-point operations of log p(x) for one picture, for a model of convolutions only.

    A multiplication and an addition count as two. Kernels are cropped, so no multiplication is by
    a masked zero.
    """
    c, h, w = config.shape
    rows, side, left = config.stem
    width, units = config.channels, config.channels * (2 if config.gated else 1)
    stems = (rows * (2 * side + 1) + left) * c * width
    block = (2 * 3 + 1 + 2) * width * units + width * width
    head = width * config.head + config.head * config.levels * c
    return 2 * h * w * (stems + config.layers * block + head)


class Pass(nn.Module):
    """x -> log p(x): the forward pass that sampling is compared with."""

    def __init__(self, model: Autoregressive) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """log_px (n,) of uint8 x (n, c, h, w)."""
        return self.model.log_prob(x)


class NaiveStep(nn.Module):
    """One step of naive sampling: a whole pass to choose one pixel."""

    def __init__(self, model: PixelCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, gumbel: Tensor, at: Tensor) -> Tensor:
        """The level chosen for pixel `at` (n,) with its noise (n, levels), int64 (n,)."""
        here = _logits(self.model, x).flatten(1, 2)[torch.arange(x.shape[0]), at]
        return (here + gumbel).argmax(-1)


class Choices(nn.Module):
    """The level that a pass over x chooses for every pixel; drawn pictures are fixed points."""

    def __init__(self, model: PixelCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, gumbel: Tensor) -> Tensor:
        """The levels chosen for uint8 x (n, 1, h, w) with noise (n, h, w, 1, 1, levels), as x."""
        noisy = _logits(self.model, x) + gumbel[:, :, :, 0, 0]
        return noisy.argmax(-1)[:, None].to(torch.uint8)


class OneLabel(nn.Module):
    """log p(x|y) for one label per picture: the separate calls that a fused graph replaces."""

    def __init__(self, model: CVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """log_pxy (n,) of uint8 x (n, c, h, w), labels y (n,) and noise eps (n, k, z)."""
        return self.model.iwae(x, y, eps)


def _logits(model: PixelCNN, x: Tensor) -> Tensor:
    """Logits (n, h, w, levels) of a grey model that draws a level as one digit."""
    features = torch.relu(model.features(x).permute(0, 2, 3, 1))
    return features @ model.head.weight[0] + model.head.bias[0]


def sources() -> dict[str, tuple[GraphSource, int, int]]:
    """Every graph to measure, with the numbers of levels and labels of its model."""
    model = pixelcnn()
    levels, (_, h, w) = PIXELCNN.levels, PIXELCNN.shape
    x = TensorSpec(name="x", dtype="uint8", shape=("batch", *PIXELCNN.shape))
    chosen = TensorSpec(name="levels", dtype="int64", shape=("batch",))
    noise = TensorSpec(name="gumbel", dtype="float32", shape=("batch", h, w, 1, 1, levels))
    pixel_noise = TensorSpec(name="gumbel", dtype="float32", shape=("batch", levels))
    at = TensorSpec(name="y", dtype="int64", shape=("batch",))
    log_px = TensorSpec(name="log_px", dtype="float32", shape=("batch",))
    choices = TensorSpec(name="choices", dtype="uint8", shape=("batch", *PIXELCNN.shape))
    graphs = {
        "pass": (GraphSource(Pass(model), (x,), (log_px,)), levels, 0),
        "sample": (roles.sample(model), levels, 0),
        "naive": (GraphSource(NaiveStep(model), (x, pixel_noise, at), (chosen,)), levels, h * w),
        "choices": (GraphSource(Choices(model), (x, noise), (choices,)), levels, 0),
    }
    for name, config in BOUNDS.items():
        bound = cvae(config)
        fused = roles.conditional(bound)
        y = TensorSpec(name="y", dtype="int64", shape=("batch",))
        log_pxy = TensorSpec(name="log_pxy", dtype="float32", shape=("batch",))
        pictures, eps = fused.inputs
        single = GraphSource(OneLabel(bound), (pictures, y, eps), (log_pxy,))
        graphs[f"{name}_fused"] = (fused, config.levels, config.labels)
        graphs[f"{name}_single"] = (single, config.levels, config.labels)
    return graphs


def matmul() -> tuple[onnx.ModelProto, Graph]:
    """A large matrix product, whose speed is taken as ONNX Runtime's limit on this machine."""
    _, inner, columns = MATMUL
    weight = torch.randn(inner, columns, generator=torch.Generator().manual_seed(0)).numpy()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "main",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", inner])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", columns])],
        [numpy_helper.from_array(weight, "b")],
    )
    spec = Graph(
        file="matmul.onnx",
        inputs=(TensorSpec(name="a", dtype="float32", shape=("batch", inner)),),
        outputs=(TensorSpec(name="c", dtype="float32", shape=("batch", columns)),),
        importance_samples=0,
    )
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10), spec
