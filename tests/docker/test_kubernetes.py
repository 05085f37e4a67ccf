"""The manifests of the server, checked against its settings: no cluster is where the tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from likely.processes.process import MARGIN
from likely.settings import PREFIX, Settings, load


@pytest.fixture
def objects() -> dict[str, Any]:
    """The manifests by kind."""
    found = yaml.safe_load_all(Path("deploy/kubernetes/server.yaml").read_text())
    return {each["kind"]: each for each in found}


@pytest.fixture
def pod(objects: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    found: dict[str, Any] = only
    return found


@pytest.fixture
def settings(container: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the server in the pod runs with."""
    for variable in container["env"]:
        assert variable["name"].removeprefix(PREFIX).lower() in Settings.model_fields
        monkeypatch.setenv(variable["name"], _value(variable, container))
    return load({})


def _value(variable: dict[str, Any], container: dict[str, Any]) -> str:
    """A variable's value, perhaps one of the container's resources."""
    if "value" in variable:
        return str(variable["value"])
    kind, resource = variable["valueFrom"]["resourceFieldRef"]["resource"].split(".")
    return str(container["resources"][kind][resource])


def test_the_pod_lets_a_drain_end(pod: dict[str, Any], settings: Settings) -> None:
    drain = settings.drain_delay + settings.drain_seconds
    assert pod["terminationGracePeriodSeconds"] >= drain + MARGIN


def test_a_replica_that_drains_is_left_out_before_it_refuses(
    container: dict[str, Any], settings: Settings
) -> None:
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < settings.drain_delay
    assert probe["failureThreshold"] > 1 and probe["timeoutSeconds"] > 1  # a pause is no end


def test_a_server_uses_the_cores_that_it_asks_for(
    container: dict[str, Any], settings: Settings
) -> None:
    assert settings.threads == int(container["resources"]["requests"]["cpu"])


def test_ports_are_those_of_the_server(
    container: dict[str, Any], objects: dict[str, Any], settings: Settings
) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
    assert container["readinessProbe"]["grpc"]["port"] == settings.port
    assert container["livenessProbe"]["httpGet"]["port"] in ports
    service = objects["Service"]["spec"]
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports
    assert service["clusterIP"] == "None"


def test_all_are_of_one_app(objects: dict[str, Any]) -> None:
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_folders_that_are_read_and_written_are_mounted(
    pod: dict[str, Any], container: dict[str, Any], settings: Settings
) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts.values())
    assert str(settings.watch) in mounts
    assert container["securityContext"]["readOnlyRootFilesystem"] and "/tmp" in mounts
    assert pod["enableServiceLinks"] is False  # LIKELY_* variables are settings
