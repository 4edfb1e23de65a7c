"""What a tracker knows, without sockets: which boards are free, who waits for which, who has what.

:class:`BoardQueue` is the queue of one key, :class:`Tracking` the whole. Values of a key are handed out in the order
in which they were put; of those who wait, the higher priority goes first, then the earlier request.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.messages import (
    PLACE,
    PendingKeys,
    Ping,
    Put,
    RequestBoard,
    Summary,
    TrackerCode,
    TrackerRequest,
    UpdateInfo,
)
from rpcnb.runtime.access import Gate

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Board", "BoardQueue", "Peer", "Tracking", "Waiter"]

log = logging.getLogger(__name__)

_SILENT = 5.0  # seconds after which a board that asked for its keys every two seconds, and stopped, is unhealthy
_INFO = 16384  # bytes of a connection's info
_PENDING = 1024  # values, and requests that wait, of one connection


class Peer(Protocol):
    """A connection to the tracker."""

    host: str

    def send(self, value: Any) -> None:
        """Send a value to it."""


class Board(NamedTuple):
    """One session that a connection offers."""

    owner: Peer
    key: str
    host: str
    port: int
    match_key: str


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits."""

    peer: Peer
    request: RequestBoard
    number: int
    told: int = 0  # the place last told

    def __lt__(self, other: Waiter) -> bool:
        return (-self.request.priority, self.number) < (-other.request.priority, other.number)


class BoardQueue:
    """The queue of one key: boards that are free, and requests that wait; never both."""

    def __init__(self) -> None:
        self.free: deque[Board] = deque()
        self.waiting: list[Waiter] = []  # a heap

    def put(self, board: Board) -> Waiter | None:
        """Offer a board; returns who gets it, or None: it is free."""
        if self.waiting:
            return heappop(self.waiting)
        self.free.append(board)
        return None

    def request(self, waiter: Waiter) -> Board | None:
        """Ask for a board; returns it, or None: the request waits."""
        if self.free:
            return self.free.popleft()
        heappush(self.waiting, waiter)
        return None

    def leave(self, peer: Peer) -> None:
        """Forget everything of a peer."""
        self.free = deque(board for board in self.free if board.owner is not peer)
        kept = [waiter for waiter in self.waiting if waiter.peer is not peer]
        if len(kept) != len(self.waiting):
            heapify(kept)
            self.waiting = kept

    def take_back(self, peer: Peer) -> list[Board]:
        """Take the boards of a peer out of the queue; returns them."""
        taken = [board for board in self.free if board.owner is peer]
        self.free = deque(board for board in self.free if board.owner is not peer)
        return taken


@dataclass(slots=True)
class _Holder:
    """Who got a board, and since when."""

    name: str
    since: float


@dataclass(slots=True)
class _Record:
    """What is known of one connection."""

    info: dict[str, Any] = field(default_factory=dict)
    pending: dict[str, Board] = field(default_factory=dict)  # by match key: put, and not handed out
    given: dict[str, _Holder] = field(default_factory=dict)  # by key: the latest who got it
    keys: set[str] = field(default_factory=set)  # for which it ever put
    withheld: list[Board] = field(default_factory=list)  # while it is unhealthy
    polls: bool = False  # it has asked for its keys since its last PUT
    heard: float = 0.0
    waiting: int = 0


class Tracking:
    """The whole tracker, without sockets.

    Args:
        clock: Seconds.
        stopped: Called when a peer has presented the stop key.

    Attributes:
        stop_key: What a peer must present to end the tracker.
    """

    def __init__(self, clock: Callable[[], float], stopped: Callable[[], object] = lambda: None) -> None:
        self.stop_key = secrets.token_urlsafe(32)
        self._clock = clock
        self._stopped = stopped
        self._gate = Gate("", self.stop_key, clock)
        self._queues: dict[str, BoardQueue] = {}
        self._records: dict[Peer, _Record] = {}
        self._count = 0

    def arrive(self, peer: Peer) -> None:
        """Note a connection that has shaken hands."""
        self._records[peer] = _Record(heard=self._clock())

    def leave(self, peer: Peer) -> None:
        """Forget a connection: its boards, its requests, its info."""
        record = self._records.pop(peer, None)
        if record is None:
            return
        for queue in list(self._queues.values()):
            queue.leave(peer)
        self._drop_idle()

    def _drop_idle(self) -> None:
        """Forget keys for which nobody offers or waits: strangers must not fill the memory with them."""
        kept = {key for record in self._records.values() for key in record.keys}
        for key in [key for key, queue in self._queues.items() if not queue.waiting and key not in kept]:
            del self._queues[key]

    def handle(self, peer: Peer, request: TrackerRequest) -> None:
        """Perform a request; replies go to the peers.

        Raises:
            RemoteProtocolError: It asks for more than one connection may.
        """
        record = self._records[peer]
        record.heard = self._clock()
        if record.withheld:
            self._recover(peer, record)
        match request:
            case Ping():
                peer.send(TrackerCode.SUCCESS)
            case Put():
                self._put(peer, record, request)
                peer.send(TrackerCode.SUCCESS)
            case RequestBoard():
                self._request(peer, record, request)
            case UpdateInfo():
                self._update(peer, record, request.info)
                peer.send(TrackerCode.SUCCESS)
            case Summary():
                peer.send([TrackerCode.SUCCESS, self.summary(boards=request.boards)])
            case PendingKeys():
                record.polls = True
                peer.send(list(record.pending))
            case _:
                self._stop(peer, request.stop_key)

    def _put(self, peer: Peer, record: _Record, put: Put) -> None:
        if len(record.pending) >= _PENDING:
            raise RemoteProtocolError(f"expected at most {_PENDING} boards of one connection")
        board = Board(peer, put.key, peer.host if put.host is None else put.host, put.port, put.match_key)
        record.pending[put.match_key] = board
        record.keys.add(put.key)
        record.given.pop(put.key, None)
        record.polls = False
        self._offer(board)

    def _offer(self, board: Board) -> None:
        waiter = self._queues.setdefault(board.key, BoardQueue()).put(board)
        if waiter is not None:
            self._records[waiter.peer].waiting -= 1
            self._give(board, waiter)

    def _request(self, peer: Peer, record: _Record, request: RequestBoard) -> None:
        if record.waiting >= _PENDING:
            raise RemoteProtocolError(f"expected at most {_PENDING} requests that wait of one connection")
        self._count += 1
        waiter = Waiter(peer, request, self._count)
        queue = self._queues.setdefault(request.key, BoardQueue())
        board = queue.request(waiter)
        if board is not None:
            self._give(board, waiter)
            return
        record.waiting += 1
        if request.tells_place:
            self._tell_place(waiter, sum(one < waiter for one in queue.waiting) + 1, len(queue.waiting))

    def _give(self, board: Board, waiter: Waiter) -> None:
        owner = self._records[board.owner]
        owner.pending.pop(board.match_key, None)  # None: the same match key was put twice
        owner.given[board.key] = _Holder(waiter.request.user or waiter.peer.host, self._clock())
        waiter.peer.send([TrackerCode.SUCCESS, [board.host, board.port, board.match_key]])

    def _tell_place(self, waiter: Waiter, place: int, length: int) -> None:
        if waiter.told != place:
            waiter.told = place
            waiter.peer.send([PLACE, {"place": place, "of": length}])

    def _update(self, peer: Peer, record: _Record, info: Any) -> None:
        address = info.get("addr")
        record.info.update(info)
        if len(json.dumps(record.info)) > _INFO:
            raise RemoteProtocolError(f"expected at most {_INFO} bytes of info")
        if address is not None and address[0] is None:
            record.info["addr"] = [peer.host, address[1]]

    def _stop(self, peer: Peer, given: str) -> None:
        if not self._gate.throttles(peer.host) and hmac.compare_digest(
            given.encode(errors="replace"), self.stop_key.encode()
        ):
            peer.send(TrackerCode.SUCCESS)
            self._stopped()
            return
        self._gate.note_failure(peer.host)
        peer.send(TrackerCode.FAIL)

    # -- what time brings ----------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Tell who waits of a new place, and take boards that have fallen silent out; call twice a second."""
        for queue in self._queues.values():
            if any(waiter.request.tells_place for waiter in queue.waiting):
                for place, waiter in enumerate(sorted(queue.waiting), 1):
                    if waiter.request.tells_place:
                        self._tell_place(waiter, place, len(queue.waiting))
        for peer, record in self._records.items():
            if record.polls and record.pending and not record.withheld and self._is_silent(record):
                for key in record.keys:
                    record.withheld += self._queues[key].take_back(peer)
                log.warning("tracker: the board of %s is silent; it is not handed out until it speaks", peer.host)

    def _is_silent(self, record: _Record) -> bool:
        return self._clock() - record.heard > _SILENT

    def _recover(self, peer: Peer, record: _Record) -> None:
        """Offer the boards of a peer that speaks again."""
        withheld, record.withheld = record.withheld, []
        for board in withheld:
            self._offer(board)

    # -- reports -------------------------------------------------------------------------------------------------

    def summary(self, *, boards: bool = False) -> dict[str, Any]:
        """Return what stock's summary has; with ``boards`` also the state of each connection that offers some."""
        info: dict[str, Any] = {
            "queue_info": {
                key: {"free": len(queue.free), "pending": len(queue.waiting)} for key, queue in self._queues.items()
            },
            "server_info": [
                record.info for record in self._records.values() if str(record.info.get("key", "")).startswith("server")
            ],
        }
        if boards:
            info["boards"] = [self._describe(record) for record in self._records.values() if record.keys]
        return info

    def _describe(self, record: _Record) -> dict[str, Any]:
        holders = [
            {"name": holder.name, "key": key, "since": round(self._clock() - holder.since, 3)}
            for key, holder in record.given.items()
        ]
        extra = record.info.get("rpcnb")
        state = "unhealthy" if record.withheld else "free" if record.pending else "busy"
        return {
            "key": sorted(record.keys),
            "addr": record.info.get("addr"),
            "state": state,
            "free": len(record.pending) - len(record.withheld),
            "holders": holders,
            "rpcnb": extra if type(extra) is dict else None,
        }
