"""Runs graphs side by side: rows in, rows out, at most `max_batch` of them a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from likely.bundle import Graph, Role
from likely.errors import NotAnswered
from likely.graphs import Array, Session

T = TypeVar("T")


class Lanes:
    """The opened graphs of one bundle and the threads that run them.

    Attributes:
        providers: what really runs the graphs, as their sessions report.
    """

    def __init__(
        self, name: str, sessions: Mapping[Role, Session], *, lanes: int, max_batch: int
    ) -> None:
        """Lanes over opened graphs.

        Args:
            name: of the model, for threads and messages.
            sessions: one for each graph of the bundle.
            lanes: runs at once.
            max_batch: rows of one run; longer inputs are divided.
        """
        self.providers = next(iter(sessions.values())).providers
        self._name = name
        self._sessions = sessions
        self._max_batch = max_batch
        self._threads = ThreadPoolExecutor(lanes, thread_name_prefix=f"lane-{name}")

    def __contains__(self, role: Role) -> bool:
        return role in self._sessions

    def graph(self, role: Role) -> Graph:
        """What the manifest says of the graph of that role.

        Raises:
            NotAnswered: the bundle has none.
        """
        return self._session(role).spec

    async def run(
        self, role: Role, feeds: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """The graph's outputs of these names over all rows of the feeds.

        Raises:
            NotAnswered: the bundle has no such graph.
        """
        session = self._session(role)
        n = len(next(iter(feeds.values())))
        if n == 0:
            specs = {spec.name: spec for spec in session.spec.outputs}
            return {
                name: np.empty(specs[name].array_shape(0), dtype=specs[name].dtype)
                for name in outputs
            }

        def run(rows: slice) -> list[Array]:
            part = {name: np.ascontiguousarray(feed[rows]) for name, feed in feeds.items()}
            return session.run(part, outputs)

        columns = zip(*await self.map(run, n), strict=True)
        return {name: np.concatenate(parts) for name, parts in zip(outputs, columns, strict=True)}

    async def map(self, call: Callable[[slice], T], n: int) -> list[T]:
        """What the call gives for consecutive parts of n rows, each in a lane."""
        loop = asyncio.get_running_loop()
        starts = range(0, n, self._max_batch)
        parts = [slice(start, min(start + self._max_batch, n)) for start in starts]
        return await asyncio.gather(
            *(loop.run_in_executor(self._threads, partial(call, part)) for part in parts)
        )

    def run_once(self, role: Role, feeds: Mapping[str, Array], outputs: Sequence[str]) -> Any:
        """One run in the calling thread, undivided."""
        return self._session(role).run(feeds, outputs)

    def close(self) -> None:
        """Lets running graphs end and frees the threads."""
        self._threads.shutdown(wait=True)

    def _session(self, role: Role) -> Session:
        if role not in self._sessions:
            raise NotAnswered(f"model {self._name} has no {role} graph, so it does not answer this")
        return self._sessions[role]
