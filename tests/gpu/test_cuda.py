"""What only a card can show. Run where there is one: `make test` skips these elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from likely import graphs, noise
from likely.bundle import Bundle, Role
from likely.graphs import CUDA, Device, Session

pytestmark = pytest.mark.gpu
Array = npt.NDArray[Any]

BUNDLES = [*Path("service/likely/bundles").iterdir(), *sorted(Path("bundles").iterdir())]
GRAPHS = [(folder, role) for folder in BUNDLES for role in Bundle.open(folder).manifest.graphs]
EVERY = pytest.mark.parametrize(("folder", "role"), GRAPHS)
DRAWN = (Role.GENERATE, Role.SAMPLE)


@pytest.fixture(scope="module", autouse=True)
def cuda() -> Device:
    """The first card; skips where there is none."""
    ort = pytest.importorskip("onnxruntime", reason="no ONNX Runtime is installed")
    if CUDA not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime was built without CUDA: install 'likely[gpu]'")
    if not graphs.cuda_devices():
        pytest.skip("the NVIDIA driver reports no card")
    return Device("cuda")


def opened(folder: Path, role: Role, device: Device) -> Session:
    bundle = Bundle.open(folder)
    return Session(bundle.graph(role), bundle.manifest.graphs[role], device)


def feeds(folder: Path, role: Role, n: int) -> dict[str, Array]:
    manifest = Bundle.open(folder).manifest
    given: dict[str, Array] = {}
    for spec in manifest.graphs[role].inputs:
        shape = spec.array_shape(n)
        if spec.name == "gumbel":
            given["gumbel"] = noise.gumbel(3, range(n), shape[1:])
        elif spec.name == "eps":
            given["eps"] = noise.normal(3, range(n), shape[1:])
        else:
            below = manifest.levels if spec.name == "x" else len(manifest.labels)
            rng = np.random.default_rng(n)
            given[spec.name] = rng.integers(0, below, shape).astype(spec.dtype)
    return given


def outputs(session: Session) -> list[str]:
    return [spec.name for spec in session.spec.outputs]


@EVERY
def test_cuda_asked_for_is_cuda(folder: Path, role: Role, cuda: Device) -> None:
    assert opened(folder, role, cuda).providers[0] == CUDA
    assert opened(folder, role, Device("auto")).providers[0] == CUDA


@EVERY
@pytest.mark.parametrize("n", [1, 3, 16, 33])
def test_a_card_answers_as_the_cpu(folder: Path, role: Role, n: int, cuda: Device) -> None:
    on_card, on_cpu = opened(folder, role, cuda), opened(folder, role, Device("cpu"))
    given, names = feeds(folder, role, n), outputs(on_cpu)
    answers = zip(names, on_card.run(given, names), on_cpu.run(given, names), strict=True)
    for name, got, expected in answers:
        assert got.shape == expected.shape and got.dtype == expected.dtype
        if role in DRAWN:
            # Levels that tie within rounding may fall either way, and take their picture along.
            changed = np.any((got != expected).reshape(n, -1), 1)
            assert changed.sum() <= 0.05 * n + 1, f"{changed.sum()} of {n} pictures differ"
        else:
            assert np.allclose(got, expected, rtol=1e-4, atol=1e-3), name


@EVERY
def test_no_node_falls_back_to_the_cpu(
    folder: Path, role: Role, cuda: Device, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime as ort

    ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 0
    path = str(Bundle.open(folder).graph(role))
    session = ort.InferenceSession(path, options, providers=[CUDA, graphs.CPU])
    assert session.get_providers()[0] == CUDA
    output = "".join(capfd.readouterr())
    assert "CUDA kernel not found in registries for Op type" not in output
    # Shapes are computed on the processor by choice, and copied once a run; in a Scan, each step.
    copied = set(re.findall(r"Add Memcpy(?:From|To)Host (?:after|before) (\S+)", output))
    assert not copied & inside_scans(path), copied


def inside_scans(path: str) -> set[str]:
    """The names of what is computed within a graph's Scans."""
    onnx = pytest.importorskip("onnx")
    from likely_export.hygiene import subgraphs

    whole = onnx.load(path, load_external_data=False).graph
    inner = [graph for graph in subgraphs(whole) if graph is not whole]
    return {name for graph in inner for node in graph.node for name in node.output}


@pytest.mark.parametrize("name", ["grey", "rows_nibbles", "colour_rows", "mixture"])
def test_one_pass_reproduces_what_a_card_draws(name: str, cuda: Device, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import autoregressive

    from likely_export import graphs as exporting
    from likely_export import roles

    model, config = autoregressive.model(name), autoregressive.CONFIGS[name]
    path = tmp_path / "sample.onnx"
    exported = exporting.export(roles.sample(model), path, config.levels, config.labels)
    gumbel, y = autoregressive.gumbel(config, 64), autoregressive.labels(config, 64)
    given = {"gumbel": gumbel.numpy()} | ({} if y is None else {"y": y.numpy()})
    (x,) = Session(path, exported.graph, cuda).run(given, ["x"])
    drawn = torch.from_numpy(x)
    with torch.no_grad():
        noisy = model.log_probs(drawn, y) + gumbel.flatten(3, 4)
    taken = noisy.gather(-1, model.head.to_digits(drawn)[..., None])[..., 0]
    # Another digit may be better by rounding alone.
    assert (noisy.amax(-1) - taken).max() < 1e-3
    assert len(torch.unique(drawn)) > 1


@pytest.mark.parametrize("folder", BUNDLES)
def test_draws_repeat_and_depend_on_earlier_noise_alone(folder: Path, cuda: Device) -> None:
    session = opened(folder, Role.SAMPLE, cuda)
    given = feeds(folder, Role.SAMPLE, 16)
    (x,) = session.run(given, ["x"])
    assert np.array_equal(session.run(given, ["x"])[0], x)
    assert x.max() < Bundle.open(folder).manifest.levels and len(np.unique(x)) > 1
    half = x.shape[2] // 2
    later = given["gumbel"].copy()
    later[:, half:] = noise.gumbel(4, range(16), later.shape[1:])[:, half:]
    (other,) = session.run({**given, "gumbel": later}, ["x"])
    assert np.array_equal(other[:, :, :half], x[:, :, :half])
    assert not np.array_equal(other, x)


@pytest.mark.parametrize("folder", BUNDLES)
def test_a_limit_of_memory_is_kept(folder: Path) -> None:
    limited = Device("cuda", memory=512 << 20)
    session = opened(folder, Role.DENSITY, limited)
    options = session._session.get_provider_options()[CUDA]
    assert int(options["gpu_mem_limit"]) == 512 << 20
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    session.run(feeds(folder, Role.DENSITY, 16), outputs(session))
