"""The container files, checked against the project: no engine runs where the tests do."""

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from likely.cli import main
from likely.processes.process import MARGIN
from likely.settings import PREFIX, Settings, load

DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cuda"]
DEFAULTS = load({})
each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile in order: name and the rest."""
    text = re.sub(r"^\s*#.*\n", "", Path(dockerfile).read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def last(dockerfile: str, name: str) -> str:
    """The last instruction of that name."""
    return [rest for found, rest in instructions(dockerfile) if found == name][-1]


def environment(dockerfile: str) -> dict[str, str]:
    """What the image sets."""
    return dict(pair.split("=", 1) for pair in last(dockerfile, "ENV").split())


def compose() -> dict[str, Any]:
    """The services of the compose file."""
    services: dict[str, Any] = yaml.safe_load(Path("docker/compose.yaml").read_text())["services"]
    return services


@each_dockerfile
def test_every_copied_path_exists_and_reaches_the_builder(dockerfile: str) -> None:
    lines = Path(".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copies = [rest.split() for name, rest in instructions(dockerfile) if name == "COPY"]
    sources = {source for words in copies if "--from" not in words[0] for source in words[:-1]}
    assert sources <= kept
    assert all(Path(source).exists() for source in kept)


@each_dockerfile
def test_stages_are_copied_from_only_once_they_are_built(dockerfile: str) -> None:
    built: set[str] = set()
    for name, rest in instructions(dockerfile):
        if name == "FROM":
            built |= set(re.findall(r" AS (\S+)", rest))
        if stage := re.match(r"--from=(\S+)", rest):
            assert stage[1] in built


@each_dockerfile
def test_the_extra_exists_and_the_runtime_is_the_right_one(dockerfile: str) -> None:
    known = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert '"$1[$EXTRAS]"' in last(dockerfile, "RUN")
    name, _, extras = last(dockerfile, "ARG").partition("=")
    runtime, *more = extras.split(",")
    assert (name, runtime) == ("EXTRAS", "cuda" if dockerfile.endswith("cuda") else "cpu")
    assert any("onnxruntime" in line for line in known[runtime])
    assert set(more) <= known.keys()
    # All that the server's settings ask for: no other room of it needs an extra.
    assert set(more) == {"signing", "tracing"}


@each_dockerfile
def test_the_base_runs_a_python_that_the_project_supports(dockerfile: str) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    for name, rest in instructions(dockerfile):
        if name == "FROM":
            version = re.match(r"python:(3\.\d+)-slim", rest)
            assert version
            assert f"Programming Language :: Python :: {version[1]}" in project["classifiers"]


@each_dockerfile
def test_what_the_image_runs_is_a_command_with_these_flags(dockerfile: str) -> None:
    entry = json.loads(last(dockerfile, "ENTRYPOINT"))
    assert entry == ["likely"]
    assert "likely" in tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    health = json.loads(last(dockerfile, "HEALTHCHECK").partition("CMD ")[2])
    for words in ([*entry, *json.loads(last(dockerfile, "CMD"))], health):
        _, command, *given = words
        result = CliRunner().invoke(main, [command, "--help"])
        assert result.exit_code == 0
        assert all(flag in result.output for flag in given if flag.startswith("--"))
    assert health[health.index("--address") + 1] == f"127.0.0.1:{DEFAULTS.port}"


@each_dockerfile
def test_the_environment_is_what_the_settings_read(dockerfile: str, monkeypatch: Any) -> None:
    given = {k: v for k, v in environment(dockerfile).items() if k.startswith(PREFIX)}
    fields = {name.removeprefix(PREFIX).lower() for name in given}
    assert fields <= set(Settings.model_fields)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load({})
    assert (settings.host, settings.metrics_host) == ("0.0.0.0", "0.0.0.0")
    assert settings.device == ("cuda" if dockerfile.endswith("cuda") else "auto")


@each_dockerfile
def test_the_ports_are_the_defaults(dockerfile: str) -> None:
    assert last(dockerfile, "EXPOSE").split() == [str(DEFAULTS.port), str(DEFAULTS.metrics_port)]


@each_dockerfile
def test_nobody_is_root_and_nothing_compiles(dockerfile: str) -> None:
    user, _, group = last(dockerfile, "USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    text = Path(dockerfile).read_text()
    assert not re.search(r"gcc|g\+\+|build-essential|nvcc|-devel\b|apt-get", text)


def test_compose_builds_and_mounts_what_exists() -> None:
    folder = Path("docker")
    for service in compose().values():
        if build := service.get("build"):
            assert (folder / build["context"] / build["dockerfile"]).resolve().is_file()
        for volume in service.get("volumes", ()):
            source, target, mode = volume.split(":")
            assert (folder / source).is_file()
            assert mode == "ro"
            config = Path("docker/prometheus.yml").read_text()
            read = [*service["command"], *yaml.safe_load(config)["rule_files"]]
            assert any(target in word or word == Path(target).name for word in read)


def test_compose_publishes_the_default_port_on_loopback_only() -> None:
    assert compose()["likely"]["ports"] == [f"127.0.0.1:{DEFAULTS.port}:{DEFAULTS.port}"]
    for service in compose().values():
        assert all(fnmatch(port, "127.0.0.1:*:*") for port in service["ports"])


def test_compose_hardens_the_server_and_lets_it_drain() -> None:
    likely = compose()["likely"]
    assert likely["read_only"] is True
    assert likely["tmpfs"] == ["/tmp"]
    assert likely["cap_drop"] == ["ALL"]
    drain = DEFAULTS.drain_delay + DEFAULTS.drain_seconds
    assert int(likely["stop_grace_period"].removesuffix("s")) >= drain + MARGIN


def test_prometheus_scrapes_the_metrics_port_of_the_service() -> None:
    config = yaml.safe_load(Path("docker/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"likely:{DEFAULTS.metrics_port}"]}]
    assert "likely" in compose()
