"""A relay that does to a connection what networks do: at byte k of one direction it cuts, freezes, delays or drips."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from rawpeer import FakeServer

__all__ = ["DOWN", "HARMLESS", "LOSSES", "UP", "ChaosRelay", "Plan", "plans"]

UP, DOWN = "up", "down"
LOSSES = ("reset", "close", "half-close")
HARMLESS = ("delay", "drip")
_DELAY = 0.02  # seconds
_DRIPS = 400  # bytes that come one by one
_TICK = 0.02  # seconds after which a relay sees that it should end


class Plan(NamedTuple):
    """What happens to one connection.

    Attributes:
        kind: One of LOSSES or HARMLESS, or ``freeze``: nothing passes any more, and nothing is closed.
        way: UP (from the client) or DOWN.
        at: Bytes of that direction that pass before.
        connection: Which of the relay's connections, from 0; the others are left alone.
    """

    kind: str
    way: str
    at: int
    connection: int = 0


def plans(
    kinds: tuple[str, ...], seen: Counter[tuple[int, str]], every: int, sampled: int, seed: int
) -> Iterator[Plan]:
    """Yield a plan for each of the first bytes, and for some of those behind them; kinds take turns.

    Args:
        kinds: Of plans.
        seen: What each direction of each connection carries when it is left alone.
        every: Bytes from the start of each that have a plan each.
        sampled: Plans behind those, per direction.
        seed: Of the choice.
    """
    rng = random.Random(seed)
    for (connection, way), total in sorted(seen.items()):
        places = [
            *range(min(every, total)),
            *(rng.randrange(every, total) for _ in range(sampled if total > every else 0)),
        ]
        for place in places:
            yield Plan(kinds[(place + seed) % len(kinds)], way, place, connection)


class _Side:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket, plan: Plan | None) -> None:
        self.source = source
        self.target = target
        self.plan = plan
        self.passed = 0
        self.drips = 0
        self.reads = True


class ChaosRelay:
    """Forwards connections to a server, according to a plan.

    Attributes:
        plan: For the connections that come; None leaves them alone.
        seen: Bytes that have passed, by connection and direction.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.plan: Plan | None = None
        self.seen: Counter[tuple[int, str]] = Counter()
        self._target = target
        self._count = 0
        self._ended = threading.Event()
        self._server = FakeServer(self._relay)
        self.address = self._server.address
        self.port = self._server.port

    def begin(self, plan: Plan | None) -> None:
        """Count connections from 0 again, under another plan; those of before are closed."""
        self._ended.set()
        self._ended = threading.Event()
        self.plan = plan
        self.seen = Counter()
        self._count = 0

    def _relay(self, client: socket.socket) -> None:
        number, self._count = self._count, self._count + 1
        ended, seen = self._ended, self.seen
        plan = self.plan if self.plan is not None and self.plan.connection == number else None
        with socket.create_connection(self._target, 10) as server:
            sides = {
                way: _Side(source, target, plan if plan is not None and plan.way == way else None)
                for way, source, target in ((UP, client, server), (DOWN, server, client))
            }
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not ended.is_set():
                reading = [side.source for side in sides.values() if side.reads]
                for source in select.select(reading, [], [], _TICK)[0] if reading else ():
                    way = UP if source is client else DOWN
                    if not self._move(sides[way]):
                        return
                    seen[number, way] = sides[way].passed
                if not reading:
                    ended.wait(_TICK)

    def _move(self, side: _Side) -> bool:
        """Receive and pass on; returns False once the connection is over."""
        plan = side.plan
        left = None if plan is None else plan.at - side.passed
        if side.drips:
            side.drips -= 1
            left = 1
        elif plan is not None and left == 0:
            side.plan = None
            return self._strike(plan, side)
        data = side.source.recv(65536 if left is None else min(65536, left))
        if not data:
            return False
        side.target.sendall(data)
        side.passed += len(data)
        return True

    def _strike(self, plan: Plan, side: _Side) -> bool:
        """Do what the plan says, with the next byte waiting; returns False once the connection is over."""
        if plan.kind == "delay":
            time.sleep(_DELAY)
        elif plan.kind == "drip":
            side.drips = _DRIPS
        elif plan.kind == "freeze":
            side.reads = False
        elif plan.kind == "half-close":
            side.reads = False
            side.target.shutdown(socket.SHUT_WR)
        elif plan.kind == "reset":
            for sock in (side.source, side.target):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            return False
        else:
            return False
        return True

    def __enter__(self) -> ChaosRelay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._server.__exit__(kind, value, trace)
