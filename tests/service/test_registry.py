"""Models are found by name and version, and by nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from likely.bundle import Bundle, Manifest, Role
from likely.engine import Engine
from likely.errors import BundleError, InvalidInput, ModelNotFound, Unavailable
from likely.graphs import Device
from likely.settings import Settings
from likely.versions.registry import Registry, describe, version_sort_key

if TYPE_CHECKING:
    from tests.conftest import Toy


def engine(name: str, version: str) -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(name=name, version=version))


@pytest.fixture
def registry() -> Registry:
    filled = Registry()
    served = [("b", "1.10"), ("b", "1.9"), ("a", "1"), ("b", "1.10-rc1")]
    filled.fill([engine(name, version) for name, version in served])
    return filled


def test_an_empty_version_is_the_newest(registry: Registry) -> None:
    assert registry.find("b").manifest.version == "1.10"
    assert registry.find("b", "1.9").manifest.version == "1.9"


def test_or_the_oldest_where_that_is_the_policy() -> None:
    registry = Registry("oldest")
    registry.fill([engine("b", "2"), engine("b", "10")])
    assert registry.find("b").manifest.version == "2"


def test_engines_are_sorted(registry: Registry) -> None:
    listed = [(e.manifest.name, e.manifest.version) for e in registry.engines()]
    assert listed == [("a", "1"), ("b", "1.9"), ("b", "1.10-rc1"), ("b", "1.10")]


def test_versions_age_as_people_read_them() -> None:
    ordered = ["1.0-alpha", "1.0-rc1", "1.0-rc2", "1.0", "1.0.1", "1.2", "1.10", "2", "2026-01-31"]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert sorted(shuffled, key=version_sort_key) == ordered


def test_the_labels_of_a_version_go_with_it(registry: Registry) -> None:
    registry.set_label("b", "stable", "1.9")
    registry.set_label("b", "canary", "1.9")
    registry.remove("b", "1.9")
    assert registry.default("b") == "1.10"
    with pytest.raises(ModelNotFound, match="b@canary"):
        registry.find("b", "canary")
    registry.add(engine("b", "1.9"))
    assert registry.labels("b", "1.9") == ()


def test_what_is_not_served_is_listed_against(registry: Registry) -> None:
    with pytest.raises(ModelNotFound, match=r"no model c; served are a@1, b@1.9") as caught:
        registry.find("c")
    assert caught.value.resource == "c"
    with pytest.raises(ModelNotFound, match=r"no b@7; served") as caught:
        registry.find("b", "7")
    assert caught.value.resource == "b@7"


@pytest.mark.parametrize(
    "name", ["", " ", "../x", "a/b", "a\0", "A", "a\n", ".a", "a" * 65, "x" * 10_000, "ä"]
)
def test_what_can_be_no_name_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidInput, match="is no name") as caught:
        registry.find(name)
    assert caught.value.field == "model_name"
    assert len(str(caught.value)) < 400
    if name:
        with pytest.raises(InvalidInput) as caught:
            registry.find("a", name)
        assert caught.value.field == "model_version"


def test_two_bundles_of_one_name_and_version_are_refused() -> None:
    with pytest.raises(BundleError, match="two bundles hold a@1"):
        Registry().fill([engine("a", "1"), engine("a", "1")])


def test_nothing_is_found_before_it_is_loaded() -> None:
    with pytest.raises(Unavailable, match="still being loaded"):
        Registry().find("a")
    assert not Registry().has_model("a")


def test_requests_find_nothing_before_all_is_there(registry: Registry) -> None:
    for ask in (lambda: registry.lease("a"), registry.served):
        with pytest.raises(Unavailable, match="still being loaded"):
            ask()
    registry.open()
    assert registry.lease("a").engine is registry.find("a")
    assert registry.served() == registry.engines()


def test_a_model_is_described(
    toy: Toy, manifest: Manifest, settings: Callable[..., Settings]
) -> None:
    opened = Engine.load(Bundle.open(toy.path), device=Device("cpu"), threads=1, max_batch=4)
    info = describe(opened, settings().limits, 0.05)
    calibration, conditional = manifest.calibrated, manifest.graphs[Role.CONDITIONAL]
    bound = conditional.model_copy(update={"kind": "iwae", "importance_samples": 64})
    opened.manifest = manifest.model_copy(
        update={
            "calibration": calibration.model_copy(update={"temperature": 2.5}),
            "graphs": {**manifest.graphs, Role.CONDITIONAL: bound},
        }
    )
    other = describe(opened, settings().limits, 0.05, ["canary"])
    opened.close()
    assert (info.posterior_temperature, other.posterior_temperature) == (1.0, 2.5)
    assert (info.importance_samples, other.importance_samples) == (0, 64)
    assert (info.version_labels, other.version_labels) == ((), ("canary",))
    assert other.conditional_kind == "iwae"
    assert info.shape == manifest.shape
    assert info.methods == tuple(sorted(info.methods))
    assert len(info.methods) == 8
    assert info.density_kind == info.conditional_kind == "exact"
    assert info.latent_dimensions == 2
    assert info.finest_alpha == pytest.approx(1 / 200)
    assert info.execution_providers == ("CPUExecutionProvider",)
