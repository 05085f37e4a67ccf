"""Whose rows are next: clients take turns, a few rows each, whatever each has waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(slots=True, eq=False)
class Waiting:
    """Rows of one request that wait.

    Attributes:
        client: whose they are.
        rows: how many rows the request has.
        row_bytes: of each row.
        taken: how many of them wait no more; they are taken in order.
    """

    client: str
    rows: int
    row_bytes: int
    taken: int = 0

    @property
    def left(self) -> int:
        """How many rows wait."""
        return self.rows - self.taken


W = TypeVar("W", bound=Waiting)


class Turns(Generic[W]):
    """A queue that is fair between clients and first come, first served for each of them.

    A batch's room is divided evenly among the clients that wait; what they leave
    over goes round again, and the next batch goes on where this one stopped. As rows
    are divisible, that is deficit round robin (Shreedhar and Varghese, 1995) without
    deficits: two clients that both always wait differ by less than a batch.

    Attributes:
        rows: how many wait.
        nbytes: of these.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.nbytes = 0
        self._lines: dict[str, deque[W]] = {}  # in the order of their turns
        self._held: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, member: W) -> None:
        """Lets a member wait behind its client's others."""
        line = self._lines.get(member.client)
        if line is None:
            line = self._lines[member.client] = deque()
        line.append(member)
        self._count(member, member.left)

    def remove(self, member: W) -> None:
        """Takes back what waits of a member, if anything does."""
        line = self._lines.get(member.client)
        if not line or not member.left or member not in line:
            return
        line.remove(member)
        if not line:
            del self._lines[member.client]
        self._count(member, -member.left)

    def take(self, most: int) -> list[tuple[W, int, int]]:
        """At most so many rows to run together: members, each with its first row and past its last.

        A member is there once at most, with rows that follow each other.
        """
        spans: dict[W, tuple[int, int]] = {}
        while most and self._lines:
            share = max(1, most // len(self._lines))
            for client in list(self._lines)[:most]:
                most -= self._turn(client, min(share, most), spans)
                if not most:
                    break
        return [(member, *span) for member, span in spans.items()]

    def held(self, client: str) -> int:
        """How many rows of that client wait."""
        return self._held.get(client, 0)

    def above(self, most: int) -> Iterator[W]:
        """The latest member of the client with most rows waiting, and so on without it.

        It ends where nobody would have more than so many rows; all of them still wait.
        """
        held, passed = dict(self._held), dict.fromkeys(self._held, 0)
        while held:
            client = max(held, key=held.__getitem__)
            if held[client] <= most:
                return
            passed[client] += 1
            member = self._lines[client][-passed[client]]
            held[client] -= member.left
            yield member

    def first(self) -> W:
        """The member whose turn is next; there must be one."""
        return next(iter(self._lines.values()))[0]

    def clear(self) -> list[W]:
        """All members that waited; none waits any more."""
        members = [member for line in self._lines.values() for member in line]
        self.rows = self.nbytes = 0
        self._lines.clear()
        self._held.clear()
        return members

    def _turn(self, client: str, room: int, spans: dict[W, tuple[int, int]]) -> int:
        """Takes up to `room` rows of a client, who is last in line from then on."""
        line, before = self._lines.pop(client), room
        while room and line:
            member = line[0]
            n = min(room, member.left)
            first, _ = spans.get(member, (member.taken, 0))
            member.taken += n
            spans[member] = (first, member.taken)
            self._count(member, -n)
            room -= n
            if not member.left:
                line.popleft()
        if line:
            self._lines[client] = line
        return before - room

    def _count(self, member: W, rows: int) -> None:
        self.rows += rows
        self.nbytes += rows * member.row_bytes
        held = self._held.get(member.client, 0) + rows
        if held:
            self._held[member.client] = held
        else:
            self._held.pop(member.client, None)
