"""What Prometheus is told of queues and batches, beside the requests they come from."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SHED = ("deadline", "memory", "queue", "quota", "share")  # why requests are refused for now
FAILED = ("ServerFault", "raised")  # why runs fail by the server's fault, of the usual reasons
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Traffic:
    """Counters of all models of one server.

    Labels are bounded: models are those served, graphs and reasons those of the code.

    Attributes:
        waiting: rows in queues, by model and graph.
        running: batches in lanes, by model and graph.
        batches: rows of each batch, by model and graph.
        waits: seconds in the queue of each request's first rows, by model and graph.
        shed: requests refused for want of room, memory or quota, by model and reason.
        dropped: requests whose caller was gone before the answer, by model and stage.
        failures: runs that failed, by model and reason.
        restarts: times that a queue broke and was begun anew, by model.
        withheld: answers that were not finite and stayed here, by model.
        unhealthy: versions that answer no more because too many were withheld, by model.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        into = registry or CollectorRegistry()
        graph = ("model", "graph")
        self.waiting = _gauge("likely_queue_rows", "Rows that wait.", graph, into)
        self.running = _gauge("likely_batches_running", "Batches in lanes.", graph, into)
        self.batches = Histogram(
            "likely_batch_rows", "Rows of a batch.", graph, buckets=ROWS, registry=into
        )
        self.waits = Histogram(
            "likely_queue_seconds",
            "Time that a request's first rows waited.",
            graph,
            buckets=SECONDS,
            registry=into,
        )
        self.shed = Counter(
            "likely_shed", "Requests refused under load.", ("model", "reason"), registry=into
        )
        self.dropped = Counter(
            "likely_dropped",
            "Requests whose caller did not wait for the answer.",
            ("model", "stage"),
            registry=into,
        )
        self.failures = Counter(
            "likely_run_failures", "Runs that failed.", ("model", "reason"), registry=into
        )
        self.restarts = Counter(
            "likely_queue_restarts",
            "Queues that broke and were begun anew.",
            ("model",),
            registry=into,
        )
        self.withheld = Counter(
            "likely_withheld", "Answers withheld as not finite.", ("model",), registry=into
        )
        self.unhealthy = _gauge(
            "likely_unhealthy_versions",
            "Versions that answer no more, too many of their answers being withheld; by worker.",
            ("model",),
            into,
        )


def _gauge(name: str, text: str, labels: tuple[str, ...], into: CollectorRegistry) -> Gauge:
    # Of several workers, what counts is the sum over those that live.
    return Gauge(name, text, labels, registry=into, multiprocess_mode="livesum")
