"""Prometheus metrics of queues and batches; those of requests are defined elsewhere."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SHED = ("deadline", "memory", "queue", "quota", "share")  # reasons for refusing a request for now
FAILED = ("ServerFault", "raised")  # the usual reasons why a run fails through the server's fault
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Traffic:
    """The queue and batch metrics of all models of one server.

    Label values are bounded: models are those served, graphs and reasons those in the code.

    Attributes:
        waiting: gauge of rows in queues, by model and graph.
        running: gauge of batches running in lanes, by model and graph.
        batches: histogram of rows per batch, by model and graph.
        waits: histogram of the seconds that a request's first rows spent in the queue, by model
            and graph.
        shed: counter of requests refused for now (the reasons are in `SHED`), by model and reason.
        dropped: counter of requests whose caller did not wait for the answer, or that can no longer
            be answered in time, by model and stage ("queue" or "run").
        failures: counter of failed runs, once per affected request, by model and reason.
        restarts: counter of queues that failed and were restarted, by model.
        withheld: counter of answers withheld because they were not finite, by model.
        unhealthy: gauge of versions that no longer answer because too many answers were withheld,
            by model.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        into = registry or CollectorRegistry()
        graph = ("model", "graph")
        self.waiting = _gauge(
            "likely_queue_rows", "Rows waiting in the queue, by model and graph.", graph, into
        )
        self.running = _gauge(
            "likely_batches_running", "Batches running now, by model and graph.", graph, into
        )
        self.batches = Histogram(
            "likely_batch_rows",
            "Rows per batch.",
            graph,
            buckets=ROWS,
            registry=into,
        )
        self.waits = Histogram(
            "likely_queue_seconds",
            "Seconds that a request's first rows waited.",
            graph,
            buckets=SECONDS,
            registry=into,
        )
        self.shed = Counter(
            "likely_shed",
            "Requests refused for now, by reason.",
            ("model", "reason"),
            registry=into,
        )
        self.dropped = Counter(
            "likely_dropped",
            "Requests dropped as the caller left or time ran out, by model and stage.",
            ("model", "stage"),
            registry=into,
        )
        self.failures = Counter(
            "likely_run_failures",
            "Failed runs, once per affected request, by model and reason.",
            ("model", "reason"),
            registry=into,
        )
        self.restarts = Counter(
            "likely_queue_restarts",
            "Restarts of a model's queues after an internal error, by model.",
            ("model",),
            registry=into,
        )
        self.withheld = Counter(
            "likely_withheld",
            "Answers withheld because they were not finite, by model.",
            ("model",),
            registry=into,
        )
        self.unhealthy = _gauge(
            "likely_unhealthy_versions",
            "Versions that stopped answering after too many non-finite answers; sum over workers.",
            ("model",),
            into,
        )


def _gauge(name: str, text: str, labels: tuple[str, ...], into: CollectorRegistry) -> Gauge:
    # With several workers, the metric is the sum over the live ones.
    return Gauge(name, text, labels, registry=into, multiprocess_mode="livesum")
