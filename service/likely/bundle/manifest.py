"""The manifest of a bundle: everything about it except the weights.

It says what every graph computes, takes and gives, and names every file with its
size and SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from likely.answers import NAME_PATTERN
from likely.errors import NotAnswered

Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.[a-z0-9]{1,8}){1,2}$"
FileName = Annotated[str, Field(pattern=FILE_NAME)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Role(StrEnum):
    """What a graph computes."""

    DENSITY = "density"  # x -> log p(x), surprise, statistics
    CONDITIONAL = "conditional"  # x[, noise] -> log p(x|y) for all labels
    GENERATE = "generate"  # y, noise -> x in one pass (latent-variable models)
    SAMPLE = "sample"  # [y,] noise -> x pixel by pixel (autoregressive models)
    DISCRIMINATE = "discriminate"  # x -> log p(y|x) for all labels, under the manifest's priors
    ENCODE = "encode"  # x[, y] -> mean[ and log-variance] of the latent features
    DECODE = "decode"  # z[, noise][, y] -> mean[, deviation and a draw] of every pixel


# The inputs that a graph of each role must take, further ones that it may take, and the outputs
# that it must give; it may give more.
_PORTS: Mapping[Role, tuple[set[str], set[str], set[str]]] = {
    Role.DENSITY: ({"x"}, set(), {"log_px", "surprise", "statistics"}),
    Role.CONDITIONAL: ({"x"}, {"eps"}, {"log_pxy"}),
    Role.GENERATE: (set(), {"y", "eps", "gumbel"}, {"x"}),
    Role.SAMPLE: ({"gumbel"}, {"y"}, {"x"}),
    Role.DISCRIMINATE: ({"x"}, set(), {"log_pyx"}),
    Role.ENCODE: ({"x"}, {"y"}, {"mean"}),
    Role.DECODE: ({"z"}, {"y", "gumbel"}, {"mean"}),
}


class Kind(StrEnum):
    """The kind of a graph's log-likelihoods."""

    EXACT = "exact"
    ELBO = "elbo"
    IWAE = "iwae"


class _FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_FrozenModel):
    """One input or output of a graph; the first axis is the batch."""

    name: str
    dtype: Literal["uint8", "int64", "float32"]
    shape: tuple[int | Literal["batch"], ...]

    def array_shape(self, n: int) -> tuple[int, ...]:
        """The shape for a batch of `n`."""
        return tuple(n if axis == "batch" else axis for axis in self.shape)


class Graph(_FrozenModel):
    """One ONNX file and what it computes."""

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kind: Kind | None = None
    importance_samples: int = Field(0, ge=0, le=2**31 - 1)

    def input(self, name: str) -> TensorSpec | None:
        """The input with that name; None if there is none."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output with that name; None if there is none."""
        return next((spec for spec in self.outputs if spec.name == name), None)


class Label(_FrozenModel):
    """A label and its prior probability."""

    name: str = Field(min_length=1, max_length=64)
    prior: Probability


class Calibration(_FrozenModel):
    """The file of the calibration arrays, and how they are used.

    The posterior is softmax_y(sum_e weights_e log p_e(x|y) / temperature + log p(y)); without
    weights, there is one expert. `statistics` maps each statistic to its number of values.
    """

    file: FileName
    size: int = Field(ge=1)
    temperature: float = Field(1.0, ge=1e-6, allow_inf_nan=False)
    weights: tuple[Probability, ...] = ()
    statistics: dict[str, Annotated[int, Field(ge=1)]] = {}

    @property
    def finest_alpha(self) -> float:
        """The smallest alpha that ranking against `size` scores can guarantee."""
        return 1 / (self.size + 1)


class Direction(_FrozenModel):
    """A direction in the space of latent features, along which one property changes.

    A point of 1 is one standard deviation of an attribute within a label, or the way from the
    mean of all other labels to the label's own mean.
    """

    name: str = Field(min_length=1, max_length=80)
    kind: Literal["attribute", "label"]


class Latent(_FrozenModel):
    """The file of the directions' arrays, and the directions in the order of the arrays."""

    file: FileName
    directions: tuple[Direction, ...]


class FileRecord(_FrozenModel):
    """The size in bytes and the SHA-256 that a file of the bundle must have."""

    size: int = Field(ge=0)
    sha256: Digest


class Manifest(_FrozenModel):
    """Everything about a bundle except the weights."""

    format: Literal[1] = 1
    name: Name
    version: Name
    description: str = Field(max_length=1000)
    shape: tuple[
        Annotated[int, Field(ge=1, le=4)],
        Annotated[int, Field(ge=1, le=1024)],
        Annotated[int, Field(ge=1, le=1024)],
    ]
    levels: int = Field(ge=2, le=256)
    labels: tuple[Label, ...] = ()
    graphs: dict[Role, Graph]
    calibration: Calibration | None = None
    latent: Latent | None = None
    golden: FileName
    parity_nats: float = Field(ge=0, allow_inf_nan=False)  # of every graph, on random pictures
    test_parity_nats: float | None = Field(None, ge=0, allow_inf_nan=False)  # of log p(x)
    decisions_compared: int = Field(0, ge=0)
    decisions_changed: int = Field(0, ge=0)
    recipe: dict[str, Any] = {}
    data_digest: Digest
    files: dict[FileName, FileRecord]

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        if (Role.DENSITY in self.graphs) != (self.calibration is not None):
            raise ValueError("a density graph and a calibration are there together, or neither")
        if Role.CONDITIONAL in self.graphs and Role.DENSITY not in self.graphs:
            raise ValueError("a conditional graph needs a density graph beside it")
        if not self.graphs:
            raise ValueError("a bundle needs a graph")
        for role, graph in self.graphs.items():
            required_inputs, optional_inputs, required_outputs = _PORTS[role]
            inputs = {spec.name for spec in graph.inputs}
            if not required_inputs <= inputs <= required_inputs | optional_inputs:
                raise ValueError(f"the {role} graph cannot take {', '.join(sorted(inputs))}")
            if lacking := sorted(required_outputs - {spec.name for spec in graph.outputs}):
                raise ValueError(f"the {role} graph must give {' and '.join(lacking)}")
        encode, decode = self.graphs.get(Role.ENCODE), self.graphs.get(Role.DECODE)
        if encode and decode and decode.input("y") and not encode.input("y"):
            raise ValueError("a graph that decodes under labels needs one that encodes under them")
        if self.latent and not {Role.ENCODE, Role.DECODE} <= set(self.graphs):
            raise ValueError("directions need a graph that encodes and one that decodes")
        if self.labels and abs(sum(label.prior for label in self.labels) - 1) > 1e-6:
            raise ValueError("the priors of the labels must sum to 1")
        conditional = self.graphs.get(Role.CONDITIONAL)
        evidence = conditional.output("evidence") if conditional else None
        experts = evidence.shape[1] if evidence and len(evidence.shape) > 1 else 0
        weights = self.calibration.weights if self.calibration else ()
        if len(weights) != experts:
            raise ValueError(f"{len(weights)} weights for {experts} experts")
        for role, graph in self.graphs.items():
            if (x := graph.input("x") or graph.output("x")) and x.shape != ("batch", *self.shape):
                raise ValueError(f"x of the {role} graph is {x.shape}, and pictures {self.shape}")
            for name in ("log_pxy", "log_pyx"):
                if (p := graph.output(name)) and p.shape != ("batch", len(self.labels)):
                    raise ValueError(f"{name} of the {role} graph is not a number for every label")
        named = {graph.file for graph in self.graphs.values()}
        named |= {part.file for part in (self.calibration, self.latent) if part}
        named.add(self.golden)
        if missing := named - set(self.files):
            raise ValueError(f"files without a record: {', '.join(sorted(missing))}")
        return self

    @property
    def calibrated(self) -> Calibration:
        """The calibration.

        Raises:
            NotAnswered: the bundle has no density graph, and therefore no calibration.
        """
        if self.calibration is None:
            raise NotAnswered(
                f"model {self.name} has no {Role.DENSITY} graph, so it does not answer this"
            )
        return self.calibration

    def latent_dimensions(self, role: Role = Role.ENCODE) -> int:
        """The number of features that a graph gives or takes; 0 if there is no such graph."""
        graph = self.graphs.get(role)
        if graph is None:
            return 0
        spec = graph.output("mean") if role is Role.ENCODE else graph.input("z")
        return int(spec.shape[-1]) if spec else 0

    @property
    def samples_density(self) -> bool:
        """Whether log p(x) is that of the model that samples; assumed if the recipe names neither.

        A density's role may name further models, which only add statistics.
        """
        density, sample = self._models_of(Role.DENSITY), self._models_of(Role.SAMPLE)
        return density[: len(sample)] == sample

    def _models_of(self, role: Role) -> tuple[str, ...]:
        """The names of a role's models by the recipe, which anyone may have written."""
        roles = self.recipe.get("roles")
        named = roles.get(role) if isinstance(roles, dict) else None
        names = named if isinstance(named, list | tuple) else [named]
        return tuple(name for name in names if isinstance(name, str))

    @property
    def deterministic(self) -> bool:
        """Whether features have no variance, or are decoded without a distribution of pictures."""
        encode, decode = self.graphs.get(Role.ENCODE), self.graphs.get(Role.DECODE)
        return bool(
            (encode and not encode.output("log_variance")) or (decode and not decode.output("x"))
        )

    @property
    def dimensions(self) -> int:
        """The number of pixels of a picture times its channels."""
        c, h, w = self.shape
        return c * h * w

    @property
    def priors(self) -> npt.NDArray[np.float64]:
        """p(y) in the labels' order, float64 (labels,)."""
        return np.array([label.prior for label in self.labels])
