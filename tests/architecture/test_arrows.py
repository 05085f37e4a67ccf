"""The drawing of the rooms: what each may import. Arrows point up the table, never down."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ground floor first. A room is a module, or a folder with all that is in it.
SERVICE = {
    "v1": "google grpc",
    "inference": "google grpc",
    "errors": "",
    "machine": "",
    "signals": "",
    "addresses": "errors",
    "fresh": "errors",
    "answers": "numpy",
    "drift": "answers numpy",
    "bayes": "answers errors numpy",
    "outliers": "answers errors numpy",
    "noise": "answers numpy",
    "levels": "answers errors numpy PIL",
    "codec": "answers errors v1 numpy",
    "statuses": "errors v1 grpc google",
    "client": "addresses answers codec errors fresh statuses v1 numpy grpc",
    "__init__": "answers client errors outliers",
    "settings": "answers errors pydantic pydantic_settings tomli_w",
    "logs": "structlog",
    "bundle": "answers errors model_signing numpy pydantic",
    "graphs": "bundle errors machine numpy onnxruntime",
    "tracing": "errors machine opentelemetry",
    "batching": "bundle errors graphs tracing numpy prometheus_client",
    "ranking": "answers batching bundle graphs outliers numpy",
    "trust": "batching errors graphs numpy",
    "generation": "answers batching bundle errors noise numpy",
    "latent": "answers batching bundle errors noise numpy",
    "warmup": "batching bundle errors graphs ranking",
    "engine": (
        "answers batching bayes bundle errors generation graphs latent noise outliers ranking "
        "trust warmup numpy"
    ),
    "telemetry": "answers batching drift engine errors machine numpy prometheus_client",
    "versions": (
        "answers batching bundle engine errors graphs machine settings telemetry structlog"
    ),
    "serving": (
        "addresses answers batching bayes bundle codec engine errors fresh inference latent "
        "machine noise outliers settings statuses telemetry tracing v1 versions "
        "cryptography google grpc grpc_health grpc_reflection jwt numpy pydantic structlog"
    ),
    "processes": (
        "errors graphs logs machine serving settings signals telemetry v1 versions "
        "grpc grpc_health prometheus_client structlog"
    ),
    "jobs": (
        "answers batching bayes bundle client codec engine errors graphs levels machine noise "
        "outliers versions numpy pyarrow ray PIL"
    ),
    "cli": (
        "answers bundle client codec engine errors graphs jobs levels logs machine processes "
        "settings signals versions click grpc numpy PIL rich"
    ),
    "__main__": "cli",
}
EXPORT = {
    "sources": "likely.answers likely.errors numpy PIL sklearn",
    "data": "likely.answers likely.errors sources numpy",
    "limits": "likely.errors",
    "heads": "torch",
    "corruptions": "likely.answers likely.errors numpy scipy",
    "material": "likely.answers",
    "measures": "likely.answers numpy scipy",
    "logistic": "torch",
    "mixture": "heads logistic torch",
    "local": "limits mixture torch",
    "moves": "likely.errors torch",
    "autoregressive": "likely.errors limits mixture moves torch",
    "drawing": "heads mixture torch",
    "pixelcnn": "likely.errors autoregressive limits torch",
    "pixelrnn": "autoregressive torch",
    "raster": "autoregressive drawing torch",
    "winograd": "torch",
    "sampler": "drawing pixelcnn raster winograd torch",
    "rnn_sampler": "drawing pixelrnn raster torch",
    "sketch": "likely.errors heads limits pixelcnn torch",
    "sketch_sampler": "sampler sketch torch",
    "trunks": "torch",
    "cvae": "likely.errors limits logistic moves trunks torch",
    "vae": "cvae logistic torch",
    "autoencoder": "limits moves trunks torch",
    "calibrate": (
        "likely.answers likely.bayes likely.errors likely.outliers measures numpy scipy sklearn"
    ),
    "classifier": "likely.errors calibrate data limits moves numpy torch",
    "families": (
        "likely.errors autoencoder classifier cvae local pixelcnn pixelrnn sketch vae torch"
    ),
    "optimisers": "likely.errors torch",
    "train": "likely.errors data optimisers numpy torch lightning_fabric",
    "statistics": "torch",
    "attributes": "likely.answers numpy",
    "directions": "likely.answers numpy",
    "recipes": (
        "likely.answers likely.bundle likely.errors attributes calibrate corruptions data families "
        "optimisers sources statistics numpy pydantic tomli_w"
    ),
    "roles": (
        "likely.bundle likely.errors autoencoder autoregressive classifier cvae local pixelcnn "
        "pixelrnn rnn_sampler sampler sketch sketch_sampler statistics vae torch"
    ),
    "plan": "likely.bundle likely.errors data recipes roles pydantic torch",
    "runs": (
        "likely.errors likely.machine corruptions data families optimisers plan recipes train torch"
    ),
    "progress": "train rich",
    "cuda_kernels": "",
    "hygiene": "likely.bundle likely.errors cuda_kernels onnx",
    "graphs": "likely.bundle likely.errors likely.graphs hygiene roles numpy onnx torch",
    "passes": (
        "likely.answers likely.bundle likely.graphs likely.machine likely.noise graphs roles numpy "
        "torch"
    ),
    "baselines": "likely.answers data numpy PIL scipy sklearn",
    "judge": "likely.answers numpy torch",
    "costs": "likely.answers likely.bundle likely.graphs graphs passes numpy",
    "report": (
        "likely.answers likely.bundle corruptions material measures "
        "PIL jinja2 markupsafe matplotlib numpy scipy tomli_w"
    ),
    "generated": (
        "likely.answers likely.bundle likely.engine likely.graphs likely.noise calibrate "
        "data judge material measures passes numpy"
    ),
    "composition": (
        "likely.answers likely.bundle likely.engine data generated judge measures numpy"
    ),
    "attribution": "likely.answers likely.graphs passes numpy",
    "evaluate": (
        "likely.answers likely.bayes likely.bundle likely.engine likely.graphs attribution "
        "baselines corruptions costs data generated judge material measures passes report numpy"
    ),
    "features": (
        "likely.answers likely.bundle likely.engine likely.graphs likely.latent attributes data "
        "judge measures numpy sklearn"
    ),
    "compare": (
        "likely.answers likely.bayes likely.bundle likely.engine likely.errors likely.graphs "
        "composition data families features generated graphs judge material measures passes "
        "recipes train numpy sklearn torch"
    ),
    "replacing": "likely.bundle likely.errors",
    "decisions": (
        "likely.answers likely.bayes likely.bundle likely.graphs likely.outliers "
        "calibrate corruptions data graphs passes plan recipes numpy"
    ),
    "build": (
        "likely.bundle likely.errors likely.graphs attributes classifier data decisions "
        "directions graphs material measures passes plan recipes replacing roles runs vae numpy "
        "torch"
    ),
    "__init__": "",
    "cli": (
        "likely.bundle likely.errors likely.signals build compare evaluate features material "
        "progress recipes replacing report runs train click pydantic rich"
    ),
}
BENCH = {
    "__init__": "",
    "clock": "",
    "environment": "likely.machine",
    "memory": "likely.bundle likely.graphs likely.noise",
    "models": (
        "likely.bundle likely_export.autoregressive likely_export.cvae likely_export.pixelcnn "
        "likely_export.roles onnx torch"
    ),
    "exports": "likely.bundle likely.graphs likely_export.graphs models onnx torch",
    "measures": (
        "likely.bundle likely.graphs likely.noise likely.warmup likely_export.graphs "
        "clock exports models numpy"
    ),
    "figures": "likely.bundle likely.versions clock environment exports measures memory models",
    "tables": "rich",
    "pixelrnn": (
        "likely.bundle likely.graphs likely_export.autoregressive likely_export.data "
        "likely_export.families likely_export.graphs likely_export.optimisers "
        "likely_export.pixelcnn likely_export.pixelrnn likely_export.recipes likely_export.roles "
        "likely_export.train clock models numpy torch"
    ),
    "jobs": (
        "likely.answers likely.bayes likely.bundle likely.engine likely.graphs likely.jobs "
        "likely.outliers numpy pyarrow"
    ),
    "serving": (
        "likely.answers likely.bundle likely.codec likely.graphs likely.machine likely.v1 "
        "likely_export.calibrate likely_export.graphs likely_export.pixelcnn likely_export.roles "
        "environment exports grpc numpy rich torch"
    ),
    "__main__": "figures tables rich",
}
# The rooms within a folder, likewise: what each may import of the others.
WITHIN = {
    "likely.bundle": {
        "wire": "",
        "scan": "wire",
        "arrays": "",
        "signing": "",
        "manifest": "",
        "folder": "arrays manifest scan signing",
        "__init__": "folder manifest",
    },
    "likely.client": {
        "credentials": "",
        "channels": "credentials",
        "values": "",
        "catalogue": "values",
        "plans": "catalogue values",
        "rpcs": "catalogue channels",
        "admin": "channels rpcs values",
        "ledger": "plans values",
        "feeds": "ledger plans",
        "blocking": "catalogue channels feeds rpcs plans values",
        "asynchronous": "catalogue channels feeds rpcs plans values",
        "__init__": "admin asynchronous blocking credentials rpcs",
    },
    "likely.batching": {
        "callers": "",
        "fair": "",
        "traffic": "",
        "admission": "callers traffic",
        "gathering": "",
        "headroom": "",
        "batches": "callers fair",
        "portions": "batches",
        "tuning": "batches",
        "width": "batches tuning",
        "batcher": "admission batches callers fair gathering headroom traffic tuning width",
        "lanes": "admission batcher batches callers traffic tuning",
        "__init__": "",
    },
    "likely.telemetry": {
        "histograms": "",
        "monitor": "histograms",
        "metrics": "monitor",
        "__init__": "",
    },
    "likely.versions": {
        "registry": "",
        "loading": "",
        "lifecycle": "loading registry",
        "watch": "lifecycle",
        "__init__": "",
    },
    "likely.serving": {
        "reloading": "",
        "tls": "reloading",
        "access": "reloading",
        "doors": "",
        "merging": "",
        "tallies": "",
        "feeds": "doors merging",
        "guard": "access doors tallies",
        "checks": "",
        "servicers": "checks feeds guard",
        "openinference": "access checks feeds guard servicers",
        "reflecting": "",
        "ports": "tls",
        "admin": "",
        "health": "",
        "server": "access admin guard health openinference ports reflecting servicers",
        "__init__": "",
    },
    "likely.processes": {
        "process": "",
        "worker_metrics": "",
        "worker": "process worker_metrics",
        "fanout": "",
        "supervisor": "fanout process worker worker_metrics",
        "__init__": "",
    },
    "likely.jobs": {
        "requests": "",
        "files": "",
        "steadiness": "",
        "columns": "",
        "sources": "columns files",
        "ledger": "files requests",
        "tables": "requests",
        "shards": "requests tables",
        "backends": "requests steadiness",
        "making": "backends columns files ledger requests shards sources tables",
        "finishing": "ledger making requests tables",
        "running": "finishing ledger making requests",
        "ray_workers": "ledger making running",
        "__init__": "",
    },
    "likely.cli": {
        "show": "",
        "connection": "",
        "pictures": "",
        "serve": "",
        "verify": "",
        "options": "connection",
        "doctor": "options show",
        "admin": "connection options show",
        "health": "connection",
        "job": "connection options show",
        "ask": "connection options pictures show",
        "batch": "job options",
        "redraw": "connection options pictures show",
        "__init__": "",  # opens a command's module when it is asked for
    },
    "likely.serving.openinference": {
        "tensors": "",
        "parameters": "",
        "statistics": "",
        "operations": "tensors",
        "servicer": "operations parameters statistics tensors",
        "__init__": "",
    },
    "likely_export.report": {
        "text": "",
        "pictures": "",
        "charts": "text",
        "subject": "text",
        "frame": "subject",
        "generation": "pictures subject text",
        "headline": "subject text",
        "labels": "charts subject text",
        "maps": "pictures subject",
        "outliers": "charts pictures subject text",
        "family": "frame pictures subject text",
        "card": "outliers subject text",
        "__init__": "card frame generation headline labels maps outliers subject",
    },
}
PACKAGES = {
    "likely": (Path("service/likely"), SERVICE),
    "likely_export": (Path("export/likely_export"), EXPORT),
    "bench": (Path("bench"), BENCH),
}
MODULES = [
    pytest.param(package, path.relative_to(folder), id=str(path))
    for package, (folder, _) in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
]


def room(package: str, dotted: str) -> str:
    """The room that a module, named from within its package, lies in."""
    name = dotted.partition(".")[0]
    assert name in PACKAGES[package][1], f"{package}.{dotted} lies in no room of the drawing"
    return name


def imported(package: str, path: Path) -> Iterator[str]:
    """What a module imports: rooms of its own package bare, others as `likely.room`."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            whole = node.module in PACKAGES
            names = [f"{node.module}.{a.name}" for a in node.names] if whole else [str(node.module)]
        for name in names:
            top, _, rest = name.partition(".")
            if top in PACKAGES:
                target = room(top, rest or "__init__")
                yield target if top == package else f"{top}.{target}"
            elif top not in sys.stdlib_module_names:
                yield top


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_a_module_imports_what_its_room_may(package: str, module: Path) -> None:
    folder, drawing = PACKAGES[package]
    here = room(package, ".".join(module.with_suffix("").parts))
    allowed = {here, *drawing[here].split()}
    stray = set(imported(package, folder / module)) - allowed
    assert not stray, f"{folder / module} imports {', '.join(sorted(stray))}"


ROOMS = [(package, name) for package, (_, drawing) in PACKAGES.items() for name in drawing]


@pytest.mark.parametrize(("package", "name"), ROOMS)
def test_a_room_imports_all_that_it_may(package: str, name: str) -> None:
    folder, drawing = PACKAGES[package]
    paths = [folder / f"{name}.py", *(folder / name).rglob("*.py")]
    found = {known for path in paths if path.is_file() for known in imported(package, path)}
    idle = set(drawing[name].split()) - found
    assert not idle, f"{name} may import {', '.join(sorted(idle))}, and does not"


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package: str) -> None:
    drawing = PACKAGES[package][1]
    for at, (name, allowed) in enumerate(drawing.items()):
        above = set(allowed.split()) & set(list(drawing)[at:])
        assert not above, f"{name} may not know {', '.join(above)}, which stand above it"


def test_the_runtime_is_known_to_its_room_only() -> None:
    folder = PACKAGES["likely"][0]
    found = {
        str(p.relative_to(folder))
        for p in folder.rglob("*.py")
        if "onnxruntime" in imported("likely", p)
    }
    assert found == {"graphs.py"}


def test_two_rooms_know_onnx_and_the_service_knows_nothing_of_training() -> None:
    known = [r for r, allowed in EXPORT.items() if "onnx" in allowed.split()]
    assert known == ["hygiene", "graphs"]
    for training in ("torch", "onnx", "likely_export"):
        assert not [r for r, allowed in SERVICE.items() if training in allowed.split()]


@pytest.mark.parametrize("name", WITHIN)
def test_arrows_within_a_folder_run_one_way(name: str) -> None:
    package, *parts = name.split(".")
    folder, drawing = PACKAGES[package][0].joinpath(*parts), WITHIN[name]
    paths = sorted(folder.rglob("*.py"))
    assert {path.relative_to(folder).parts[0].removesuffix(".py") for path in paths} == set(drawing)
    for at, (room, allowed) in enumerate(drawing.items()):
        known = set(allowed.split())
        assert known <= set(list(drawing)[:at]), f"{room} may not know what stands above it"
        own = (p for p in paths if p.relative_to(folder).parts[0] in (f"{room}.py", room))
        found = {sibling for path in own for sibling in siblings(path, f"{name}.")} - {room}
        assert found == known, f"{room} of {name}"


def siblings(path: Path, prefix: str) -> set[str]:
    """The rooms that a module imports of the folder with that prefix."""
    froms = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    dotted = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return {name.removeprefix(prefix).split(".")[0] for name in dotted if name.startswith(prefix)}
