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
    "addresses": "",
    "fresh": "errors structlog",
    "tls": "errors fresh cryptography grpc structlog",
    "answers": "numpy",
    "drift": "answers numpy",
    "bayes": "answers errors numpy",
    "outliers": "answers errors numpy",
    "noise": "answers numpy",
    "levels": "answers errors numpy PIL",
    "codec": "answers errors v1 numpy",
    "statuses": "errors v1 grpc google",
    "plans": "answers codec errors v1 numpy",
    "channels": "addresses errors grpc",
    "client": "answers channels codec errors plans statuses v1 numpy grpc",
    "__init__": "answers client errors outliers",
    "settings": "answers errors pydantic pydantic_settings tomli_w",
    "access": "addresses errors fresh settings jwt pydantic structlog",
    "logs": "structlog",
    "wire": "",
    "scan": "errors wire",
    "arrays": "errors numpy",
    "signing": "errors model_signing",
    "bundle": "arrays errors scan signing numpy pydantic",
    "graphs": "bundle errors machine numpy onnxruntime",
    "tracing": "errors machine opentelemetry",
    "callers": "tracing",
    "turns": "",
    "traffic": "prometheus_client",
    "admission": "errors",
    "gathering": "",
    "batches": "bundle callers errors graphs tracing turns numpy",
    "tuning": "batches graphs numpy",
    "batcher": "admission batches callers errors gathering traffic tuning turns numpy",
    "lanes": "admission batcher batches bundle callers errors graphs traffic tuning",
    "ranking": "bundle graphs outliers numpy",
    "trust": "errors graphs traffic numpy",
    "generation": "answers bundle errors lanes noise numpy",
    "engine": (
        "admission answers batches bayes bundle errors generation graphs lanes noise outliers "
        "ranking traffic trust tuning numpy"
    ),
    "registry": "answers bundle engine errors",
    "checks": "answers bayes bundle codec errors noise outliers v1 numpy",
    "histograms": "answers numpy prometheus_client",
    "monitor": "answers drift engine histograms numpy prometheus_client",
    "metrics": "answers engine errors machine monitor traffic prometheus_client",
    "doors": "errors",
    "merging": "v1",
    "tallies": "answers inference v1 numpy",
    "feeds": "answers callers doors errors merging",
    "interceptors": (
        "access callers doors errors metrics registry statuses tallies tracing v1 grpc structlog"
    ),
    "servicers": (
        "admission answers callers checks codec engine feeds interceptors registry v1 grpc"
    ),
    "openinference": (
        "access answers bundle callers engine errors feeds inference interceptors machine registry "
        "servicers v1 numpy grpc"
    ),
    "reflecting": "google grpc grpc_reflection",
    "loading": "admission bundle engine errors graphs machine settings traffic",
    "lifecycle": "bundle engine errors loading metrics registry structlog",
    "watch": "bundle errors lifecycle structlog",
    "admin": "errors lifecycle registry v1 grpc",
    "ports": "errors settings tls grpc structlog",
    "server": (
        "access admin admission errors inference interceptors lifecycle loading metrics "
        "openinference ports reflecting registry servicers settings tracing v1 watch grpc "
        "grpc_health structlog"
    ),
    "process": "graphs logs server settings structlog",
    "jobs": (
        "admission answers bayes bundle channels client engine errors graphs levels loading "
        "machine noise outliers plans registry numpy pyarrow ray PIL"
    ),
    "together": "prometheus_client",
    "worker": "errors logs process server settings together",
    "fanout": "errors v1 grpc",
    "supervisor": (
        "access errors fanout graphs interceptors logs machine metrics ports process registry "
        "settings together v1 worker grpc structlog"
    ),
    "cli": (
        "answers channels client errors jobs levels machine plans settings supervisor loading "
        "bundle engine graphs click grpc numpy onnxruntime PIL rich"
    ),
    "__main__": "cli",
}
EXPORT = {
    "data": "likely.answers likely.errors numpy PIL sklearn",
    "heads": "torch",
    "corruptions": "likely.answers numpy scipy",
    "material": "likely.answers",
    "measures": "likely.answers numpy scipy sklearn",
    "logistic": "torch",
    "mixture": "heads logistic torch",
    "local": "mixture torch",
    "pixelcnn": "mixture torch",
    "sampler": "heads mixture pixelcnn torch",
    "moves": "likely.errors torch",
    "cvae": "likely.errors logistic moves torch",
    "families": "likely.errors cvae local pixelcnn torch",
    "optimisers": "likely.errors torch",
    "train": "likely.errors data optimisers numpy torch lightning_fabric",
    "statistics": "torch",
    "calibrate": "likely.answers likely.bayes likely.outliers numpy scipy sklearn",
    "recipes": (
        "likely.answers likely.bundle likely.errors calibrate corruptions data families "
        "statistics optimisers numpy pydantic tomli_w"
    ),
    "runs": "likely.errors families recipes train torch",
    "progress": "train rich",
    "roles": "likely.bundle likely.errors cvae local pixelcnn sampler statistics numpy torch",
    "cuda_kernels": "",
    "hygiene": "likely.bundle likely.errors cuda_kernels onnx",
    "graphs": "likely.bundle likely.errors likely.graphs hygiene roles numpy onnx torch",
    "baselines": "likely.answers data numpy PIL scipy sklearn",
    "judge": "likely.answers numpy torch",
    "costs": "likely.answers likely.bundle likely.graphs likely.noise graphs numpy",
    "report": (
        "likely.answers likely.bundle corruptions material measures "
        "PIL jinja2 markupsafe matplotlib numpy scipy tomli_w"
    ),
    "generated": (
        "likely.answers likely.bundle likely.engine likely.graphs likely.noise data judge "
        "material measures numpy"
    ),
    "evaluate": (
        "likely.answers likely.bundle likely.engine likely.graphs likely.noise baselines "
        "corruptions costs data generated judge material measures report numpy"
    ),
    "build": (
        "likely.answers likely.bayes likely.bundle likely.errors likely.graphs likely.noise "
        "likely.outliers calibrate corruptions data graphs recipes roles runs numpy torch"
    ),
    "__init__": "",
    "cli": (
        "likely.bundle likely.errors likely.signing build data evaluate families progress "
        "recipes runs train click rich"
    ),
}
BENCH = {
    "__init__": "",
    "clock": "",
    "environment": "likely.machine",
    "memory": "likely.bundle likely.graphs likely.noise",
    "models": (
        "likely.bundle likely_export.cvae likely_export.pixelcnn likely_export.roles onnx torch"
    ),
    "exports": (
        "likely.bundle likely.graphs likely_export.cvae likely_export.graphs likely_export.heads "
        "likely_export.hygiene likely_export.logistic likely_export.mixture likely_export.pixelcnn "
        "likely_export.roles likely_export.sampler __init__ models onnx torch"
    ),
    "measures": (
        "likely.bundle likely.graphs likely.noise likely_export.graphs "
        "__init__ clock exports models numpy"
    ),
    "figures": (
        "likely.bundle likely.loading __init__ clock environment exports measures memory models"
    ),
    "tables": "rich",
    "jobs": (
        "likely.answers likely.bayes likely.bundle likely.engine likely.graphs likely.jobs "
        "likely.outliers numpy pyarrow"
    ),
    "serving": (
        "likely.answers likely.bundle likely.codec likely.graphs likely.machine likely.v1 "
        "likely.wire likely_export.calibrate likely_export.graphs likely_export.heads "
        "likely_export.pixelcnn likely_export.roles likely_export.statistics "
        "environment grpc numpy onnx rich torch"
    ),
    "__main__": "__init__ figures tables rich",
}
# The rooms within one folder, likewise: what each may import of the others.
JOBS = {
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


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package: str) -> None:
    drawing = PACKAGES[package][1]
    for at, (name, allowed) in enumerate(drawing.items()):
        above = set(allowed.split()) & set(list(drawing)[at:])
        assert not above, f"{name} may not know {', '.join(above)}, which stand above it"


def test_the_runtime_is_known_to_its_room_and_to_the_doctor_only() -> None:
    folder = PACKAGES["likely"][0]
    found = {
        str(p.relative_to(folder))
        for p in folder.rglob("*.py")
        if "onnxruntime" in imported("likely", p)
    }
    assert found == {"graphs.py", "cli/doctor.py"}


def test_two_rooms_know_onnx_and_the_service_knows_nothing_of_training() -> None:
    known = [r for r, allowed in EXPORT.items() if "onnx" in allowed.split()]
    assert known == ["hygiene", "graphs"]
    for training in ("torch", "onnx", "likely_export"):
        assert not [r for r, allowed in SERVICE.items() if training in allowed.split()]


def test_arrows_within_the_jobs_run_one_way() -> None:
    folder = PACKAGES["likely"][0] / "jobs"
    assert {path.stem for path in folder.glob("*.py")} == set(JOBS)
    for at, (name, allowed) in enumerate(JOBS.items()):
        tree = ast.parse((folder / f"{name}.py").read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found = {
            dotted.split(".")[2]
            for node in froms
            for dotted in (f"{node.module}.{alias.name}" for alias in node.names)
            if dotted.startswith("likely.jobs.")
        }
        assert found <= set(allowed.split()), f"{name} imports {found}"
        assert set(allowed.split()) <= set(list(JOBS)[:at])
