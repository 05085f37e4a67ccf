"""Debian's Prometheus and Alertmanager round the server, with the rules that come along."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

RULES = Path("deploy/monitoring/alerts.yaml")
UNPACKED = Path("build/prometheus/usr/bin")  # by scripts/prometheus
SECONDS = 120  # a bound for what hangs


def find_tool(name: str) -> str | None:
    """A program, installed or unpacked for the tests."""
    return shutil.which(name, path=UNPACKED) or shutil.which(name)


def tool(name: str) -> str:
    """That program; without it the test is skipped."""
    path = find_tool(name)
    if path is None:
        pytest.skip(f"{name} is neither installed nor unpacked by scripts/prometheus")
    return path


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    """Runs promtool, which must find no fault."""
    path = tool("promtool")

    def run(*arguments: object, given: str | None = None) -> str:
        done = subprocess.run(
            [path, *map(str, arguments)], input=given, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


class Watch:
    """A Prometheus that scrapes what it is told to, and an Alertmanager that tells of alerts."""

    def __init__(self, folder: Path, prometheus: int) -> None:
        self._folder = folder
        self._api = f"http://127.0.0.1:{prometheus}/api/v1/query?"
        self._alerts: list[dict[str, Any]] = []
        self._news = threading.Condition()

    def heard(self, alerts: list[dict[str, Any]]) -> None:
        """The Alertmanager tells of these."""
        with self._news:
            self._alerts += alerts
            self._news.notify_all()

    @contextmanager
    def of(self, *ports: int | None) -> Iterator[Watch]:
        """While it is entered, the metrics of these ports are scraped."""
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        part, whole = self._folder / "targets.new", self._folder / "targets.json"
        part.write_text(json.dumps(targets))
        part.rename(whole)
        with self._news:
            self._alerts.clear()
        yield self
        whole.write_text("[]")

    def knows(self, metric: str, port: int) -> None:
        """Returns once that metric of that port is stored: what it grows by from now on is seen."""
        query = {"query": f'{metric}{{instance="127.0.0.1:{port}"}}'}
        end = time.monotonic() + SECONDS
        while True:
            with urllib.request.urlopen(self._api + urllib.parse.urlencode(query), timeout=5) as it:
                if json.load(it)["data"]["result"]:
                    return
            assert time.monotonic() < end, f"{metric} of {port} is not scraped"
            time.sleep(0.1)

    def wait_for(
        self,
        name: str,
        status: str,
        during: Callable[[], object] | None = None,
        instance: str | None = None,
    ) -> Any:
        """The first notification of that alert and status; `during` is done while waiting.

        Args:
            name: the alert's.
            status: firing or resolved.
            during: what to do.
            instance: that it is about; None for any, empty for none.
        """
        end = time.monotonic() + SECONDS
        while True:
            with self._news:
                for alert in self._alerts:
                    about = alert["labels"].get("instance", "")
                    meant = instance is None or about == instance
                    if (alert["labels"]["alertname"], alert["status"]) == (name, status) and meant:
                        return alert
                self._news.wait(0.05)
            assert time.monotonic() < end, f"{name} is not {status}; told was {self._alerts}"
            if during:
                during()


def hastened(rules: str) -> str:
    """The rules with seconds for minutes, so that a test need not wait for them."""
    rules = re.sub(r"\[(5|15)m\]", "[8s]", rules)
    return re.sub(r"for: \d+m", "for: 500ms", rules)


@pytest.fixture(scope="package")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """A running Prometheus and Alertmanager; what they tell is heard over a webhook."""
    prometheus, alertmanager = tool("prometheus"), tool("prometheus-alertmanager")
    folder = tmp_path_factory.mktemp("prometheus")
    manager, own = _free_port(), _free_port()
    found = Watch(folder, own)
    with ExitStack() as stack:
        hook = stack.enter_context(_webhook(found))
        (folder / "alertmanager.yml").write_text(json.dumps(_routes(hook)))
        (folder / "prometheus.yml").write_text(json.dumps(_scrapes(manager)))
        (folder / "targets.json").write_text("[]")
        (folder / "alerts.yaml").write_text(hastened(RULES.read_text()))
        stack.enter_context(
            _running(
                folder / "alertmanager.log",
                [
                    alertmanager,
                    f"--config.file={folder}/alertmanager.yml",
                    f"--storage.path={folder}/alertmanager",
                    f"--web.listen-address=127.0.0.1:{manager}",
                    "--cluster.listen-address=",
                ],
                f"http://127.0.0.1:{manager}/-/ready",
            )
        )
        stack.enter_context(
            _running(
                folder / "prometheus.log",
                [
                    prometheus,
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/tsdb",
                    f"--web.listen-address=127.0.0.1:{own}",
                ],
                f"http://127.0.0.1:{own}/-/ready",
            )
        )
        yield found


def _routes(hook: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{hook}"
    return {
        "route": {
            "receiver": "test",
            "group_by": ["..."],
            "group_wait": "10ms",
            "group_interval": "200ms",
            "repeat_interval": "1h",
        },
        "receivers": [{"name": "test", "webhook_configs": [{"url": url, "send_resolved": True}]}],
    }


def _scrapes(manager: int) -> dict[str, Any]:
    return {
        # So long a scrape may take as well: a slow answer is not to make a server seem down.
        "global": {"scrape_interval": "500ms", "evaluation_interval": "250ms"},
        "rule_files": ["alerts.yaml"],
        "alerting": {
            "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{manager}"]}]}]
        },
        "scrape_configs": [
            {"job_name": "likely", "file_sd_configs": [{"files": ["targets.json"]}]}
        ],
    }


@contextmanager
def _webhook(heard: Watch) -> Iterator[int]:
    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            heard.heard(json.loads(body)["alerts"])

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _running(log: Path, command: list[str], ready: str) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        end = time.monotonic() + SECONDS
        while not _answers(ready):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(SECONDS)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
