"""A fair queue: clients take turns, a few rows each, however much each has queued."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(slots=True, eq=False)
class Waiting:
    """The rows of one request in a queue.

    Attributes:
        client: the client that sent the request.
        rows: number of rows of the request.
        row_bytes: bytes per row.
        taken: number of rows already taken from the queue; rows are taken in order.
    """

    client: str
    rows: int
    row_bytes: int
    taken: int = 0

    @property
    def rows_left(self) -> int:
        """Number of rows that still wait."""
        return self.rows - self.taken


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    """A queue that is fair between clients, and first come, first served within each client.

    The room in a batch is divided evenly among the waiting clients. What they leave
    unused is offered to them again, and the next batch continues with the client after
    the last one served. Because requests can be divided by rows, this is deficit round
    robin (Shreedhar and Varghese, 1995) without deficits: two clients that always have
    rows queued differ by less than a batch.

    Attributes:
        rows: number of waiting rows.
        nbytes: bytes of these rows.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.nbytes = 0
        self._lines: dict[str, deque[W]] = {}  # by client, in the order of their turns
        self._rows_by_client: dict[str, int] = {}

    def add(self, member: W) -> None:
        """Appends a member to its client's line."""
        line = self._lines.get(member.client)
        if line is None:
            line = self._lines[member.client] = deque()
        line.append(member)
        self._count(member, member.rows_left)

    def remove(self, member: W) -> None:
        """Removes the waiting rows of a member, if it has any."""
        line = self._lines.get(member.client)
        if not line or not member.rows_left or member not in line:
            return
        line.remove(member)
        if not line:
            del self._lines[member.client]
        self._count(member, -member.rows_left)

    def take(self, most: int) -> list[tuple[W, int, int]]:
        """Takes at most `most` rows to run together: members, with their rows [start, stop).

        A member occurs at most once, and its rows are consecutive.
        """
        spans: dict[W, tuple[int, int]] = {}
        while most and self._lines:
            share = max(1, most // len(self._lines))
            for client in list(self._lines)[:most]:
                most -= self._turn(client, min(share, most), spans)
                if not most:
                    break
        return [(member, *span) for member, span in spans.items()]

    @property
    def clients(self) -> Collection[str]:
        """The clients that have waiting rows."""
        return self._rows_by_client.keys()

    def client_rows(self, client: str) -> int:
        """Number of waiting rows of a client."""
        return self._rows_by_client.get(client, 0)

    def rows_before(self, client: str, rows: int) -> int:
        """Number of waiting rows that have their turns before a newcomer's last row has.

        These are all rows of the newcomer's client, and of each other client at most as many as
        its client then has.

        Args:
            client: the newcomer's client.
            rows: the newcomer's rows, which are not queued yet.
        """
        held = self.client_rows(client)
        others = (n for other, n in self._rows_by_client.items() if other != client)
        return held + sum(min(n, held + rows) for n in others)

    def iter_eviction_order(self, max_rows: int) -> Iterator[W]:
        """Yields the latest member of the client with most waiting rows, again and again.

        Each time, the members already yielded are left out of the count. The iterator ends once no
        client has more than `max_rows` rows left. It removes nothing from the queue.
        """
        held, passed = dict(self._rows_by_client), dict.fromkeys(self._rows_by_client, 0)
        while held:
            client = max(held, key=held.__getitem__)
            if held[client] <= max_rows:
                return
            passed[client] += 1
            member = self._lines[client][-passed[client]]
            held[client] -= member.rows_left
            yield member

    def first(self) -> W:
        """The member whose turn is next; the queue must not be empty."""
        return next(iter(self._lines.values()))[0]

    def clear(self) -> list[W]:
        """Empties the queue and returns all members that waited."""
        members = [member for line in self._lines.values() for member in line]
        self.rows = self.nbytes = 0
        self._lines.clear()
        self._rows_by_client.clear()
        return members

    def _turn(self, client: str, room: int, spans: dict[W, tuple[int, int]]) -> int:
        """Takes up to `room` rows of a client and moves it to the end of the line.

        Returns the number of rows taken, and adds them to `spans`.
        """
        line, before = self._lines.pop(client), room
        while room and line:
            member = line[0]
            n = min(room, member.rows_left)
            first, _ = spans.get(member, (member.taken, 0))
            member.taken += n
            spans[member] = (first, member.taken)
            self._count(member, -n)
            room -= n
            if not member.rows_left:
                line.popleft()
        if line:
            self._lines[client] = line
        return before - room

    def _count(self, member: W, rows: int) -> None:
        self.rows += rows
        self.nbytes += rows * member.row_bytes
        held = self._rows_by_client.get(member.client, 0) + rows
        if held:
            self._rows_by_client[member.client] = held
        else:
            self._rows_by_client.pop(member.client, None)
