"""Fixtures: a toy bundle with known answers, built without torch, and a real server for it."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings as hypothesis_settings

from likely import bayes
from likely.answers import Doubles, Pixels
from likely.outliers import Combination, Mahalanobis, Ranks, label_score

if TYPE_CHECKING:
    from likely.bundle import Manifest
    from likely.serving.server import Server
    from likely.settings import Settings

# On shared cores, single examples are slow now and then, so there is no deadline; the tests have a
# timeout anyway. Examples are the same in every run; HYPOTHESIS_PROFILE=searching tries new ones.
hypothesis_settings.register_profile("shared", deadline=None, derandomize=True)
hypothesis_settings.register_profile("searching", deadline=None, derandomize=False)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "shared"))

T = TypeVar("T")
Array = npt.NDArray[Any]
SHAPE, LEVELS, LABELS, LATENT = (1, 3, 3), 4, 3, 2
PRIORS = (0.5, 0.3, 0.2)
CALIBRATION = 199


@dataclass(frozen=True)
class Toy:
    """Independent categorical pixels, so that every answer has a closed form.

    p(x) = prod_d q[d, x_d] and p(x|y) = prod_d theta[y, d, x_d]. The discriminative p(y|x) depends
    on the first pixel only, t[x_0, y], and is consistent: sum_x p(y|x) p(x) is the prior of y.
    """

    path: Path
    log_q: Doubles  # (c, h, w, levels)
    log_theta: Doubles  # (labels, c, h, w, levels)
    log_t: Doubles  # (levels, labels)

    def log_px(self, x: Pixels) -> Doubles:
        total: Doubles = -self.surprise(x).sum((1, 2, 3))
        return total

    def surprise(self, x: Pixels) -> Doubles:
        nats: Doubles = -(self.hot(x) * self.log_q).sum(-1)
        return nats

    def log_pxy(self, x: Pixels) -> Doubles:
        log_pxy: Doubles = np.einsum("nchwl,ychwl->ny", self.hot(x), self.log_theta)
        return log_pxy

    def log_pyx(self, x: Pixels) -> Doubles:
        log_pyx: Doubles = self.log_t[x[:, 0, 0, 0]]
        return log_pyx

    @property
    def log_tables(self) -> Doubles:
        """log p(x_d|y) of every label, then log p(x_d), as (labels + 1, c, h, w, levels)."""
        tables: Doubles = np.concatenate((self.log_theta, self.log_q[None]))
        return tables

    def hot(self, x: Pixels) -> Doubles:
        return np.eye(LEVELS)[x]

    def draw(self, rng: np.random.Generator, n: int) -> Pixels:
        noise = rng.gumbel(size=(n, *self.log_q.shape))
        x: Pixels = (self.log_q + noise).argmax(-1).astype(np.uint8)
        return x

    def statistics(self, x: Pixels) -> Array:
        columns = (-self.log_px(x), x.mean((1, 2, 3), dtype=np.float64))
        return np.stack(columns, 1).astype(np.float32)

    def moments(self, p: Doubles) -> dict[str, Array]:
        """Pixel means and deviations, in [0, 1], (n, c, h, w), under p (n, h, w, c, levels)."""
        levels = np.linspace(0, 1, LEVELS)
        mean = p @ levels
        deviation = np.sqrt((p * np.square(levels - mean[..., None])).sum(-1))
        return {
            "mean": mean.transpose(0, 3, 1, 2).astype(np.float32),
            "deviation": deviation.transpose(0, 3, 1, 2).astype(np.float32),
        }

    def answer(self, role: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Returns the outputs of the graph of that role."""
        if role == "density":
            x = feeds["x"]
            return {
                "log_px": self.log_px(x).astype(np.float32),
                "surprise": self.surprise(x).astype(np.float32),
                "statistics": self.statistics(x),
            }
        if role == "conditional":
            return {"log_pxy": self.log_pxy(feeds["x"]).astype(np.float32)}
        if role == "discriminate":
            return {"log_pyx": self.log_pyx(feeds["x"]).astype(np.float32)}
        if role == "encode" and "y" not in feeds:
            total = feeds["x"].sum((1, 2, 3), dtype=np.float32)
            return {"mean": np.stack((total, total), 1)}
        if role == "decode" and "y" not in feeds:
            odds = np.exp(feeds["z"].sum(1))
            share = (odds / (1 + odds)).astype(np.float32)
            return {"mean": np.broadcast_to(share[:, None, None, None], (len(share), *SHAPE))}
        if role == "encode":
            total = feeds["x"].sum((1, 2, 3), dtype=np.float32)
            mean = np.stack((total, feeds["y"].astype(np.float32)), 1)
            return {"mean": mean, "log_variance": mean * np.float32(-0.1)}
        logits = self.log_tables[feeds["y"]].transpose(0, 2, 3, 1, 4)
        if role in TILTED:
            tilt = feeds[TILTED[role]].sum(1)[:, None, None, None, None]
            logits = logits + tilt * np.arange(LEVELS)
        if role == "decode":
            return {
                **self.moments(np.exp(_log_softmax(logits))),
                **self.answer("sample", {**feeds, "logits": logits}),
            }
        logits = feeds.get("logits", logits) + feeds["gumbel"]
        return {"x": logits.argmax(-1).transpose(0, 3, 1, 2).astype(np.uint8)}


Inputs = dict[str, tuple[str, tuple[int | str, ...]]]
NOISE = ("batch", SHAPE[1], SHAPE[2], SHAPE[0], LEVELS)
X: dict[str, tuple[str, tuple[int | str, ...]]] = {"x": ("uint8", ("batch", *SHAPE))}
Y: Inputs = {"y": ("int64", ("batch",))}
ROLES: dict[str, tuple[Inputs, Inputs]] = {
    "density": (
        X,
        {
            "log_px": ("float32", ("batch",)),
            "surprise": ("float32", ("batch", *SHAPE)),
            "statistics": ("float32", ("batch", 2)),
        },
    ),
    "conditional": (X, {"log_pxy": ("float32", ("batch", LABELS))}),
    "generate": (
        {**Y, "eps": ("float32", ("batch", LATENT)), "gumbel": ("float32", NOISE)},
        X,
    ),
    "sample": ({**Y, "gumbel": ("float32", NOISE)}, X),
    "encode": (
        {**X, **Y},
        {"mean": ("float32", ("batch", LATENT)), "log_variance": ("float32", ("batch", LATENT))},
    ),
    "discriminate": (X, {"log_pyx": ("float32", ("batch", LABELS))}),
    "decode": (
        {"z": ("float32", ("batch", LATENT)), "gumbel": ("float32", NOISE), **Y},
        {
            "mean": ("float32", ("batch", *SHAPE)),
            "deviation": ("float32", ("batch", *SHAPE)),
            **X,
        },
    ),
}
# The graphs of a model without labels and without a distribution, such as an autoencoder.
PLAIN: dict[str, tuple[Inputs, Inputs]] = {
    "encode": (X, {"mean": ("float32", ("batch", LATENT))}),
    "decode": (
        {"z": ("float32", ("batch", LATENT))},
        {"mean": ("float32", ("batch", *SHAPE))},
    ),
}
TILTED = {"generate": "eps", "decode": "z"}
DIRECTIONS = ("brightness", "label label-1")
STEPS, PROBES, OFFSETS = np.array([[0.5, 0], [0, 1]]), np.array([[2, 1], [0, 1.0]]), [-1.0, 0.0]


def build_toy(
    folder: Path,
    name: str = "toy",
    version: str = "1.0",
    roles: tuple[str, ...] = tuple(ROLES),
    seed: int = 0,
    plain: bool = False,
) -> Toy:
    """Writes the toy bundle and returns its closed form; the seed determines its tables."""
    from likely.bundle import write_manifest

    rng = np.random.default_rng(seed)
    log_q = _log_softmax(rng.normal(size=(*SHAPE, LEVELS)))
    log_theta = _log_softmax(2 * rng.normal(size=(LABELS, *SHAPE, LEVELS)))
    toy = Toy(folder, log_q, log_theta, _consistent(np.exp(log_q[0, 0, 0]), seed))
    folder.mkdir(parents=True)
    known = PLAIN if plain else ROLES
    for role in roles:
        (folder / f"{role}.onnx").write_bytes(_graph(role, toy, *known[role]))
    np.savez(folder / "calibration.npz", **_calibration(toy, rng))
    np.savez(folder / "latent.npz", steps=STEPS, probes=PROBES, offsets=OFFSETS)
    np.savez(folder / "golden.npz", **_golden(toy, rng, roles, known))
    write_manifest(folder, _manifest(name, version, roles, known))
    return toy


def _log_softmax(logits: Doubles) -> Doubles:
    log_p: Doubles = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p


def _consistent(q: Doubles, seed: int) -> Doubles:
    """Random log p(y|level) (levels, labels), whose joint has the marginals q and `PRIORS`.

    The joint is fitted by iterative proportional fitting (Deming and Stephan, 1940).
    """
    joint = np.exp(3 * np.random.default_rng([seed, 1]).normal(size=(LEVELS, LABELS)))
    for _ in range(2000):
        joint *= np.array(PRIORS) / joint.sum(0)
        joint *= (q / joint.sum(1))[:, None]
    log_t: Doubles = np.log(joint / q[:, None])
    return log_t


def _graph(role: str, toy: Toy, inputs: Inputs, outputs: Inputs) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    types = {
        "uint8": TensorProto.UINT8, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT,
    }  # fmt: skip
    nodes: list[Any] = []
    tables: dict[str, Array] = {}

    def table(key: str, values: Array) -> str:
        tables[key] = values
        return key

    def node(op: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def axes(*which: int) -> str:
        return table(f"axes{which}", np.array(which, dtype=np.int64))

    def total(value: str, *which: int, out: str) -> str:
        return node("ReduceSum", value, axes(*which), out=out, keepdims=0)

    def as_float(value: str) -> str:
        return node("Cast", value, out=f"{value}_float", to=TensorProto.FLOAT)

    def one_hot() -> str:
        index = node("Cast", "x", out="index", to=TensorProto.INT64)
        depth = table("depth", np.array(LEVELS, dtype=np.int64))
        off_on = table("off_on", np.array([0, 1], dtype=np.float32))
        return node("OneHot", index, depth, off_on, out="hot", axis=-1)

    if role == "density":
        log_q = table("log_q", toy.log_q.astype(np.float32))
        log_p = total(node("Mul", one_hot(), log_q, out="each"), -1, out="log_p")
        node("Neg", log_p, out="surprise")
        log_px = total(log_p, 1, 2, 3, out="log_px")
        first = node("Unsqueeze", node("Neg", log_px, out="nats"), axes(1), out="first")
        mean = node("ReduceMean", as_float("x"), axes(1, 2, 3), out="mean_level", keepdims=0)
        second = node("Unsqueeze", mean, axes(1), out="second")
        node("Concat", first, second, out="statistics", axis=1)
    elif role == "conditional":
        theta = table("log_theta", toy.log_theta.astype(np.float32))
        each = node("Mul", node("Unsqueeze", one_hot(), axes(1), out="wide"), theta, out="each")
        total(each, 2, 3, 4, 5, out="log_pxy")
    elif role == "discriminate":
        spread = np.zeros((LABELS, *SHAPE, LEVELS))
        spread[:, 0, 0, 0] = toy.log_t.T
        weights = table("log_t", spread.astype(np.float32))
        each = node("Mul", node("Unsqueeze", one_hot(), axes(1), out="wide"), weights, out="each")
        total(each, 2, 3, 4, 5, out="log_pyx")
    elif role == "encode" and "y" not in inputs:
        level = node("Unsqueeze", total(as_float("x"), 1, 2, 3, out="level"), axes(1), out="one")
        node("Concat", level, level, out="mean", axis=1)
    elif role == "decode" and "y" not in inputs:
        whole = node("Sigmoid", total("z", 1, out="whole"), out="share")
        wide = node("Unsqueeze", whole, axes(1, 2, 3), out="wide")
        node("Mul", wide, table("ones", np.ones(SHAPE, np.float32)), out="mean")
    elif role == "encode":
        level = total(as_float("x"), 1, 2, 3, out="level")
        columns = [
            node("Unsqueeze", value, axes(1), out=f"{value}_column")
            for value in (level, as_float("y"))
        ]
        node("Concat", *columns, out="mean", axis=1)
        node("Mul", "mean", table("slope", np.array([-0.1], dtype=np.float32)), out="log_variance")
    else:
        theta = table("log_theta", toy.log_tables.transpose(0, 2, 3, 1, 4).astype(np.float32))
        logits = node("Gather", theta, "y", out="logits")
        if role in TILTED:
            whole = total(TILTED[role], 1, out="tilt")
            tilt = node("Unsqueeze", whole, axes(1, 2, 3, 4), out="tilt_wide")
            slope = table("slope", np.arange(LEVELS, dtype=np.float32))
            logits = node("Add", logits, node("Mul", tilt, slope, out="tilted"), out="sum")
        if role == "decode":
            p = node("Softmax", logits, out="p", axis=-1)
            levels = table("levels", np.linspace(0, 1, LEVELS, dtype=np.float32))
            flat = total(node("Mul", p, levels, out="weighed"), -1, out="flat")
            node("Transpose", flat, out="mean", perm=[0, 3, 1, 2])
            middle = node("Unsqueeze", flat, axes(-1), out="middle")
            away = node("Sub", levels, middle, out="away")
            square = node("Mul", p, node("Mul", away, away, out="squared"), out="spread")
            root = node("Sqrt", total(square, -1, out="variance"), out="root")
            node("Transpose", root, out="deviation", perm=[0, 3, 1, 2])
        logits = node("Add", logits, "gumbel", out="noisy")
        level = node("ArgMax", logits, out="level", axis=-1, keepdims=0)
        node("Cast", node("Transpose", level, out="turned", perm=[0, 3, 1, 2]), out="x", to=2)

    def infos(specs: Inputs) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, types[dtype], list(shape))
            for name, (dtype, shape) in specs.items()
        ]

    constants = [numpy_helper.from_array(values, key) for key, values in tables.items()]
    graph = helper.make_graph(nodes, role, infos(inputs), infos(outputs), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def _calibration(toy: Toy, rng: np.random.Generator) -> dict[str, Any]:
    fit = toy.statistics(toy.draw(rng, 500)).astype(np.float64)
    ranks = _ranks(fit)
    normal = ranks(fit)
    values, vectors = np.linalg.eigh(np.cov(normal.T))
    centre, taken = normal.mean(0)[None], np.zeros(len(fit), np.int64)
    part = Mahalanobis(np.arange(2.0), centre, vectors / np.sqrt(values))
    part_ranks = _ranks(part(normal, taken)[:, None])
    usual = np.array([[0.0, 1.0]])
    learnt = Combination(ranks, (part,), part_ranks, np.ones(1), usual)
    x = toy.draw(rng, CALIBRATION)
    scores = learnt(toy.statistics(x), np.zeros(len(x), np.int64))
    found = label_score(scores, bayes.posterior(toy.log_pxy(x), np.array(PRIORS)))
    y = found.argmin(1)
    return {
        **learnt.stored(),
        "scores": np.sort(scores),
        "confident": np.minimum(1.0, np.arange(1.0, CALIBRATION + 2) / CALIBRATION + 0.02),
        "label_scores": np.concatenate(
            [np.sort(found[y == label, label]) for label in range(LABELS)]
        ),
        "label_counts": np.bincount(y, minlength=LABELS),
    }


def _ranks(values: Doubles) -> Ranks:
    levels = (np.arange(21) + 0.5) / 21
    normals = np.array([NormalDist().inv_cdf(level) for level in levels])
    return Ranks(np.quantile(values, levels, axis=0), normals, values.std(0))


def _golden(
    toy: Toy,
    rng: np.random.Generator,
    roles: tuple[str, ...],
    known: dict[str, tuple[Inputs, Inputs]],
) -> dict[str, Any]:
    n = 5
    feeds: dict[str, Array] = {
        "x": toy.draw(rng, n),
        "y": np.arange(n, dtype=np.int64) % LABELS,
        "eps": rng.normal(size=(n, LATENT)).astype(np.float32),
        "gumbel": rng.gumbel(size=(n, *NOISE[1:])).astype(np.float32),
        "z": np.linspace(-1, 1, n * LATENT, dtype=np.float32).reshape(n, LATENT),
    }
    golden: dict[str, Array] = {}
    for role in roles:
        mine = {name: feeds[name] for name in known[role][0]}
        for name, values in {**mine, **toy.answer(role, mine)}.items():
            golden[f"{role}/{name}"] = values
    return golden


def _manifest(
    name: str,
    version: str,
    roles: tuple[str, ...],
    known: dict[str, tuple[Inputs, Inputs]],
) -> dict[str, Any]:
    def specs(entries: Inputs) -> list[dict[str, Any]]:
        return [{"name": n, "dtype": dtype, "shape": s} for n, (dtype, s) in entries.items()]

    labelled = len(roles) > 1 and known is ROLES
    return {
        "name": name,
        "version": version,
        "description": "Independent pixels with a closed form.",
        "shape": SHAPE,
        "levels": LEVELS,
        "labels": [{"name": f"label-{i}", "prior": p} for i, p in enumerate(PRIORS)]
        if labelled
        else [],
        "graphs": {
            role: {
                "file": f"{role}.onnx",
                "inputs": specs(known[role][0]),
                "outputs": specs(known[role][1]),
                "kind": "exact" if role in {"density", "conditional"} else None,
            }
            for role in roles
        },
        "calibration": {"file": "calibration.npz", "size": CALIBRATION}
        if "density" in roles
        else None,
        "latent": {
            "file": "latent.npz",
            "directions": [
                {"name": DIRECTIONS[0], "kind": "attribute"},
                {"name": DIRECTIONS[1], "kind": "label"},
            ],
        }
        if {"encode", "decode"} <= set(roles)
        else None,
        "golden": "golden.npz",
        "parity_nats": 0.0,
        "data_digest": "0" * 64,
    }


@dataclass
class Live:
    """A running server, its log, and its event loop."""

    server: Server
    loop: asyncio.AbstractEventLoop
    log: io.StringIO = field(default_factory=io.StringIO)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.server.metrics_port}/metrics"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the server's event loop: grpc.aio wants one loop per process."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)


Running = Callable[..., AbstractContextManager[Live]]


@pytest.fixture(scope="session")
def make_toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Toy]:
    """Returns a function that builds a toy bundle in a new folder."""
    pytest.importorskip("onnx")

    def make(name: str = "toy", version: str = "1.0", **more: Any) -> Toy:
        return build_toy(tmp_path_factory.mktemp("bundle") / "toy", name, version, **more)

    return make


@pytest.fixture(scope="session")
def toy(make_toy: Callable[..., Toy]) -> Toy:
    """The toy bundle; shared, so tests must not change it."""
    return make_toy()


@pytest.fixture
def manifest(toy: Toy) -> Manifest:
    """The manifest of the toy bundle."""
    from likely.bundle import Bundle

    return Bundle.open(toy.path).manifest


@pytest.fixture
def settings(toy: Toy) -> Callable[..., Settings]:
    """Returns a function that makes settings for a test: the toy bundle, free ports, one thread."""
    return _settings_of(toy)


def _settings_of(toy: Toy) -> Callable[..., Settings]:
    from likely.settings import Settings

    quiet: dict[str, Any] = {
        "bundles": (toy.path,),
        "port": 0,
        "metrics_port": 0,
        "device": "cpu",
        "threads": 1,
        "images_per_request": 100,
        "images_per_generation": 50,
        "images_per_chunk": 8,
        "drain_seconds": 5,
        "drain_delay": 0,
    }
    return lambda **more: Settings(**{**quiet, **more})


@pytest.fixture(scope="session")
def running(toy: Toy) -> Running:
    """Runs a real server on free ports: `with running(**settings) as live`.

    With `load=False`, its bundles are not loaded. `made` are further arguments of `Server`.
    """
    from likely import logs
    from likely.serving.server import Server

    @contextmanager
    def run(
        *, load: bool = True, made: dict[str, Any] | None = None, **more: Any
    ) -> Iterator[Live]:
        log = io.StringIO()

        async def make() -> Server:
            events = logs.logger("debug", "json", log)
            return Server(_settings_of(toy)(**more), events, **(made or {}))

        async def start(server: Server) -> None:
            await server.start()
            if load:
                await server.load()

        with _looping() as loop:
            live = Live(asyncio.run_coroutine_threadsafe(make(), loop).result(60), loop, log)
            try:
                live.run(start(live.server))
                yield live
            finally:
                live.run(live.server.stop(1))

    return run


@contextmanager
def _looping() -> Iterator[asyncio.AbstractEventLoop]:
    """Runs an event loop in a daemon thread; stops it at the end, also after a failure."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


@pytest.fixture(scope="session")
def live(running: Running) -> Iterator[Live]:
    """A server with the toy bundle; shared, so tests must not stop it."""
    with running() as server:
        yield server
