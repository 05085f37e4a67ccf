"""Rules, dashboard and documentation speak of the metrics that there are, and of all of them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from likely.processes.worker_metrics import WorkerMetrics
from likely.v1.scoring_pb2 import ClassifyRequest, ScoreRequest
from tests.faults.alive import calling, drawing, on_toy
from tests.monitoring.conftest import RULES

if TYPE_CHECKING:
    from tests.conftest import Running

DOCS = Path("docs/monitoring.md")
DASHBOARD = Path("deploy/monitoring/dashboard.json")
NAME = re.compile(r"\b(?:likely|process)_[a-z0-9_]+")
SUFFIXES = ("_bucket", "_count", "_sum")


@pytest.fixture(scope="module")
def page(running: Running) -> Iterator[str]:
    """What a scrape gives, after some requests."""
    with running() as live, calling(live.address) as caller:
        for request in (on_toy(ScoreRequest), on_toy(ClassifyRequest), drawing(label=1)):
            caller.ask(request)
        with urllib.request.urlopen(live.metrics_url, timeout=30) as answer:
            yield answer.read().decode()


@pytest.fixture(scope="module")
def families(
    page: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of every metric, those of a supervisor included."""
    metrics = list(text_string_to_metric_families(page))
    metrics += WorkerMetrics(tmp_path_factory.mktemp("workers"), 2).registry.collect()
    found: dict[str, tuple[str, set[str]]] = {}
    for family in metrics:
        if family.name.endswith("_created"):  # when a series began: the format's own
            continue
        name = family.name + "_total" * (family.type == "counter")
        labels = {key for sample in family.samples for key in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    return found


def table() -> dict[str, tuple[str, set[str]]]:
    """The documented metrics: type and labels."""
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \|([^|]*)\|", DOCS.read_text(), flags=re.M)
    return {
        name: (kind, {label for label in labels.strip().split(", ") if label})
        for name, kind, labels in rows
        if NAME.fullmatch(name)
    }


def metric(name: str) -> str:
    """A series' metric."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def expressions() -> list[str]:
    """What the dashboard's panels and the rules ask for."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    return [*asked, *(rule["expr"] for rule in rules)]


def test_what_is_documented_exists_and_what_exists_is_documented(
    families: dict[str, tuple[str, set[str]]],
) -> None:
    documented = table()
    assert documented.keys() == families.keys()
    for name, (kind, labels) in documented.items():
        found, given = families[name]
        assert found == kind, name
        # A counter with labels has none before its first event.
        assert given in (labels, set()), name
    seen = {name for name, (_, given) in families.items() if given}
    assert len(seen) > 15


def test_the_page_has_no_fault(page: str, promtool: Callable[..., str]) -> None:
    lines = [line for line in page.splitlines(keepends=True) if "_created" not in line]
    promtool("check", "metrics", given="".join(lines))


def test_rules_hold_what_they_promise(promtool: Callable[..., str]) -> None:
    promtool("check", "rules", RULES)
    promtool("test", "rules", RULES.with_name("alerts_test.yaml"))


def test_the_configuration_beside_them_is_right(
    promtool: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "prometheus.yml").write_text(Path("docker/prometheus.yml").read_text())
    (tmp_path / "alerts.yaml").write_text(RULES.read_text())
    assert "1 rule files" in promtool("check", "config", tmp_path / "prometheus.yml")


def test_every_alert_is_tested_and_explained() -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    named = [rule["alert"] for rule in rules]
    tests = yaml.safe_load(RULES.with_name("alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for fires in (True, False):
        tested = {case["alertname"] for case in cases if bool(case.get("exp_alerts")) is fires}
        assert tested == set(named)
    assert re.findall(r"^\*\*(\w+)\*\*:", DOCS.read_text(), flags=re.M) == named
    assert all(rule["labels"]["severity"] in ("critical", "warning") for rule in rules)


def test_panels_and_rules_ask_for_what_there_is(
    families: dict[str, tuple[str, set[str]]],
) -> None:
    asked = {metric(name) for text in expressions() for name in NAME.findall(text)}
    assert asked - families.keys() == set()
    shown = json.loads(DASHBOARD.read_text())
    panels = [t["expr"] for panel in shown["panels"] for t in panel.get("targets", ())]
    of_ours = {name for name in families if name.startswith("likely_")}
    assert of_ours - {metric(name) for text in panels for name in NAME.findall(text)} == set()


def test_the_dashboard_is_whole(promtool: Callable[..., str], tmp_path: Path) -> None:
    shown: dict[str, Any] = json.loads(DASHBOARD.read_text())
    panels = shown["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & mine, panel["title"]
        cells |= mine
    variables = {variable["name"] for variable in shown["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(panels)))
    assert used <= variables
    # As rules, the panels' expressions are parsed by Prometheus itself.
    plain = [text.replace("$__rate_interval", "5m") for text in expressions()]
    rules = [{"record": f"panel:{i}", "expr": text} for i, text in enumerate(plain)]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", path)
