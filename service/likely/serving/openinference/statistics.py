"""Statistics of the Open Inference Protocol: each model's requests, and the time they took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from likely.inference import inference_pb2

Key = tuple[str, str]


@dataclass(slots=True)
class Span:
    """A number of events, and the nanoseconds that they took in total."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Adds one event that took `ns` nanoseconds."""
        self.count += 1
        self.ns += ns

    def message(self) -> inference_pb2.StatisticDuration:
        """Returns the message of the protocol."""
        return inference_pb2.StatisticDuration(count=self.count, ns=self.ns)


@dataclass(slots=True)
class Statistics:
    """The statistics of one version of a model.

    Attributes:
        success: answered requests.
        fail: failed requests.
        reading: decoding of inputs, of answered requests.
        running: runs of these, including their time in the queue.
        writing: encoding of their outputs.
        pictures: rows of their outputs.
        last_answer_ms: time of the last answer, in milliseconds since the epoch; 0 if there was
            none.
    """

    success: Span = field(default_factory=Span)
    fail: Span = field(default_factory=Span)
    reading: Span = field(default_factory=Span)
    running: Span = field(default_factory=Span)
    writing: Span = field(default_factory=Span)
    pictures: int = 0
    last_answer_ms: int = 0

    def message(self, name: str, version: str) -> inference_pb2.ModelStatistics:
        """Returns the message of the protocol."""
        return inference_pb2.ModelStatistics(
            name=name,
            version=version,
            last_inference=self.last_answer_ms,
            inference_count=self.pictures,
            execution_count=self.success.count,
            inference_stats=inference_pb2.InferStatistics(
                success=self.success.message(),
                fail=self.fail.message(),
                queue=Span(self.success.count).message(),
                compute_input=self.reading.message(),
                compute_infer=self.running.message(),
                compute_output=self.writing.message(),
            ),
        )


class Stopwatch:
    """A stopwatch for the three stages of one request: reading, running, writing."""

    def __init__(self) -> None:
        self._laps = [time.perf_counter_ns()]

    def lap(self) -> None:
        """Notes that a stage has ended."""
        self._laps.append(time.perf_counter_ns())

    def add_success(self, statistics: Statistics, pictures: int) -> None:
        """Adds the request to the statistics, once all three stages have ended."""
        began, read, ran, wrote = self._laps
        statistics.reading.add(read - began)
        statistics.running.add(ran - read)
        statistics.writing.add(wrote - ran)
        statistics.success.add(wrote - began)
        statistics.pictures += pictures
        statistics.last_answer_ms = time.time_ns() // 1_000_000

    def add_failure(self, statistics: Statistics) -> None:
        """Adds a request that ended without an answer."""
        statistics.fail.add(time.perf_counter_ns() - self._laps[0])
