"""What a tracker knows, without sockets: which boards are free, who waits for which, who has what.

:class:`BoardQueue` is the queue of one key, :class:`Tracking` the whole. Values of a key are handed out in the order
in which they were put; of those who wait, the higher priority goes first, then the earlier request.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from collections import Counter, deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from operator import attrgetter
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
    frame_of,
)
from rpcnb.farm.summary import cut_summary
from rpcnb.runtime.access import Guesses
from rpcnb.transport.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Board", "BoardQueue", "Peer", "Tracking", "Waiter"]

log = logging.getLogger(__name__)

_SILENT = 5.0  # seconds after which a board that asked for its keys every two seconds, and stopped, is unhealthy
_INFO = 16384  # bytes of a connection's info
_PENDING = 1024  # boards, keys, and requests that wait, of one connection
_ASKED = 64  # requests that wait, of one connection: clients use one for each
_SHORT = 256  # requests in a queue in which a place is found at once
_SELDOM = 20  # telling all places takes one part in so many of the time, at most
_AT_ONCE = 250  # places told per sweep, 4 ms; the others the next time
_NAME = 256  # letters of who has a board
_SHOWN = 64  # keys of one connection that are described
_REMEMBERED, _REMEMBER = 4096, 86400.0  # keys that have no board any more, and the seconds for which they are shown
_LAST = 1 << 30  # their rank
# A summary that takes longer to make than that many seconds is kept for twenty times as long as it took: whoever asks
# for it in a loop gets one of a moment ago, and the loop is free for others. If nothing changes, all are for a moment.
_CHEAP, _KEPT, _MOMENT = 0.002, 20.0, 0.1


class Peer(Protocol):
    """A connection to the tracker."""

    host: str

    def send(self, value: Any) -> None:
        """Send a value to it."""

    def send_frame(self, frame: bytes) -> None:
        """Send a frame that has been made already."""


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
    order: tuple[float, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = -self.request.priority, self.number

    def __lt__(self, other: Waiter) -> bool:
        return self.order < other.order


_order = attrgetter("order")


class BoardQueue:
    """The queue of one key: boards that are free, and requests that wait; never both.

    Args:
        key: The key.
        rank: How many keys whoever uses it had before.

    Attributes:
        rank: The least of all who use it.
        offering: Connections that ever put for this key.
        had_board: Somebody did.
    """

    def __init__(self, key: str = "", rank: int = 0) -> None:
        self.rank = rank
        self._name = json.dumps(key)
        self.offering = 0
        self.had_board = False
        self.free: deque[Board] = deque()
        self.waiting: list[Waiter] = []  # a heap

    def describe(self) -> str:
        """Return how it is, as it stands in the JSON of a summary."""
        return f'{self._name}: {{"free": {len(self.free)}, "pending": {len(self.waiting)}}}'

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
    told: str = ""  # the info as JSON, if it is a server's
    pending: dict[str, Board] = field(default_factory=dict)  # by match key: put, and not handed out
    given: dict[str, _Holder] = field(default_factory=dict)  # by key: the latest who got it
    keys: set[str] = field(default_factory=set)  # for which it ever put
    withheld: list[Board] = field(default_factory=list)  # while it is unhealthy
    polls: bool = False  # it has asked for its keys since its last PUT
    heard: float = 0.0
    offered: Counter[str] = field(default_factory=Counter)  # by key: boards that were put, and not handed out
    asked: Counter[str] = field(default_factory=Counter)  # by key: requests that wait


class _Kept(NamedTuple):
    """A summary that has been made."""

    frame: bytes
    since: float
    seconds: float  # that it took
    changes: int  # at that time


def _take_one(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


class Tracking:
    """The whole tracker, without sockets.

    Args:
        clock: Seconds.
        stopped: Called when a peer has presented the stop key.

    Attributes:
        stop_key: What a peer must present to end the tracker.
        refusals: What is logged of strangers.
    """

    def __init__(self, clock: Callable[[], float], stopped: Callable[[], object] = lambda: None) -> None:
        self.stop_key = secrets.token_urlsafe(32)
        self._clock = clock
        self._stopped = stopped
        self._guesses = Guesses(clock)
        self._refused: deque[tuple[float, Peer]] = deque()  # who is told later that his stop key is wrong
        self._queues: dict[str, BoardQueue] = {}
        self._records: dict[Peer, _Record] = {}
        self._remembered: dict[str, float] = {}  # keys that had a board, and since when not; the latest last
        self._count = 0
        self._changes = 0
        self._kept: dict[bool, _Kept] = {}
        self._tell_at = 0.0  # when places are told again
        self.refusals = Refusals(log, clock)

    def arrive(self, peer: Peer) -> None:
        """Note a connection that has shaken hands."""
        self._records[peer] = _Record(heard=self._clock())

    def leave(self, peer: Peer) -> None:
        """Forget a connection: its boards, its requests, its info."""
        record = self._records.pop(peer, None)
        if record is None:
            return
        self._changes += 1
        for key in record.keys | record.asked.keys():
            self._queues[key].leave(peer)
            self._drop_idle(key, key in record.keys)

    def use_of(self, peer: Peer) -> int:
        """Return 2 for a connection that has offered or asks, 1 for one that has only said who it is, else 0."""
        record = self._records.get(peer)
        if record is None:
            return 0
        return 2 if record.keys or record.asked else int(bool(record.info))

    def _drop_idle(self, key: str, offered: bool) -> None:
        """Forget a key for which nobody offers or waits any more: strangers must not fill the memory with them."""
        queue = self._queues[key]
        queue.offering -= offered
        if queue.offering or queue.waiting:
            return
        del self._queues[key]
        if queue.had_board:
            self._remember(key)

    def _remember(self, key: str) -> None:
        """Go on showing a key that had a board, as stock's tracker does; but neither all nor for ever."""
        self._remembered[key] = self._clock()
        if len(self._remembered) > _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def _queue(self, key: str, record: _Record) -> BoardQueue:
        """Return the queue of a key that this connection uses."""
        rank = len(record.keys) + len(record.asked)
        self._remembered.pop(key, None)
        queue = self._queues.setdefault(key, BoardQueue(key, rank))
        queue.rank = min(queue.rank, rank)
        return queue

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
                peer.send_frame(self._summary_frame(request.boards))
            case PendingKeys():
                record.polls = True
                peer.send(list(record.pending))
            case _:
                self._stop(peer, request.stop_key)

    def _put(self, peer: Peer, record: _Record, put: Put) -> None:
        if record.offered.total() >= _PENDING:
            raise RemoteProtocolError(f"expected at most {_PENDING} boards of one connection")
        if len(record.keys) >= _PENDING and put.key not in record.keys:
            self._forget_keys(record)
        self._changes += 1
        board = Board(peer, put.key, peer.host if put.host is None else put.host, put.port, put.match_key)
        queue = self._queue(put.key, record)
        if put.key not in record.keys:
            record.keys.add(put.key)
            queue.offering += 1
            queue.had_board = True
        record.pending[put.match_key] = board
        record.offered[put.key] += 1
        record.given.pop(put.key, None)
        record.polls = False
        self._offer(board)

    def _forget_keys(self, record: _Record) -> None:
        """Forget the keys of which a connection offers nothing now."""
        for key in record.keys - record.offered.keys():
            record.keys.discard(key)
            record.given.pop(key, None)
            self._drop_idle(key, offered=True)

    def _offer(self, board: Board) -> None:
        waiter = self._queues[board.key].put(board)
        if waiter is not None:
            _take_one(self._records[waiter.peer].asked, board.key)
            self._give(board, waiter)

    def _request(self, peer: Peer, record: _Record, request: RequestBoard) -> None:
        if record.asked.total() >= _ASKED:
            raise RemoteProtocolError(f"expected at most {_ASKED} requests that wait of one connection")
        self._count += 1
        self._changes += 1
        waiter = Waiter(peer, request, self._count)
        queue = self._queue(request.key, record)
        board = queue.request(waiter)
        if board is not None:
            self._give(board, waiter)
            return
        record.asked[request.key] += 1
        if request.tells_place and len(queue.waiting) <= _SHORT:  # else with the next sweep
            self._tell_place(waiter, sum(one.order < waiter.order for one in queue.waiting) + 1, len(queue.waiting))

    def _give(self, board: Board, waiter: Waiter) -> None:
        owner = self._records[board.owner]
        owner.pending.pop(board.match_key, None)  # None: the same match key was put twice
        _take_one(owner.offered, board.key)
        owner.given[board.key] = _Holder((waiter.request.user or waiter.peer.host)[:_NAME], self._clock())
        waiter.peer.send([TrackerCode.SUCCESS, [board.host, board.port, board.match_key]])

    def _tell_place(self, waiter: Waiter, place: int, length: int) -> bool:
        """Tell a place if it is another than before; returns whether."""
        if waiter.told == place:
            return False
        waiter.told = place
        waiter.peer.send([PLACE, {"place": place, "of": length}])
        return True

    def _update(self, peer: Peer, record: _Record, info: Any) -> None:
        address = info.get("addr")
        record.info.update(info)
        if len(json.dumps(record.info)) > _INFO:
            raise RemoteProtocolError(f"expected at most {_INFO} bytes of info")
        if address is not None and address[0] is None:
            record.info["addr"] = [peer.host, address[1]]
        self._changes += 1
        record.told = json.dumps(record.info) if str(record.info.get("key", "")).startswith("server") else ""

    def _stop(self, peer: Peer, given: str) -> None:
        if hmac.compare_digest(given.encode(errors="replace"), self.stop_key.encode()):
            peer.send(TrackerCode.SUCCESS)
            self._stopped()
            return
        delay = self._guesses.note(peer.host)
        if delay:
            self._refused.append((self._clock() + delay, peer))
        else:
            peer.send(TrackerCode.FAIL)

    # -- what time brings ----------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Tell who waits of a new place, and take boards that have fallen silent out; call twice a second."""
        begun = self._clock()
        if begun >= self._tell_at:
            self._tell_places()
            self._tell_at = self._clock() + _SELDOM * (self._clock() - begun)
        for peer, record in self._records.items():
            if record.polls and record.pending and not record.withheld and self._is_silent(record):
                self._changes += 1
                for key in record.keys:
                    record.withheld += self._queues[key].take_back(peer)
                text = f"tracker: the board of {peer.host} is silent; it is not handed out until it speaks"
                self.refusals.note(peer.host, text)
        while self._refused and self._refused[0][0] <= begun:
            _, peer = self._refused.popleft()
            if peer in self._records:
                peer.send(TrackerCode.FAIL)
        self._forget_remembered()
        self.refusals.sweep()

    def _forget_remembered(self) -> None:
        for key, since in list(self._remembered.items())[:_AT_ONCE]:
            if self._clock() - since < _REMEMBER:
                break
            del self._remembered[key]
            self._changes += 1

    def _tell_places(self) -> None:
        left = _AT_ONCE
        for queue in self._queues.values():
            if left and any(waiter.request.tells_place for waiter in queue.waiting):
                for place, waiter in enumerate(sorted(queue.waiting, key=_order), 1):
                    if left and waiter.request.tells_place:
                        left -= self._tell_place(waiter, place, len(queue.waiting))

    def _is_silent(self, record: _Record) -> bool:
        return self._clock() - record.heard > _SILENT

    def _recover(self, peer: Peer, record: _Record) -> None:
        """Offer the boards of a peer that speaks again."""
        withheld, record.withheld = record.withheld, []
        self._changes += 1
        for board in withheld:
            self._offer(board)

    # -- reports -------------------------------------------------------------------------------------------------

    def summary(self, *, boards: bool = False) -> dict[str, Any]:
        """Return what stock's summary has; with ``boards`` also the state of each connection that offers some.

        If that is more than fits into a frame, ``left_out`` says of how many what there is besides.
        """
        found: dict[str, Any] = json.loads(self._summary(boards))
        return found

    def _summary_frame(self, boards: bool) -> bytes:
        """Return the summary as a reply, made again as often as that does not keep others waiting."""
        now = self._clock()
        kept = self._kept.get(boards)
        if kept is not None:
            unchanged = kept.changes == self._changes and now - kept.since < _MOMENT
            if unchanged or (kept.seconds > _CHEAP and now - kept.since < kept.seconds * _KEPT):
                return kept.frame
        frame = frame_of(f"[{TrackerCode.SUCCESS:d}, {self._summary(boards)}]")
        self._kept[boards] = _Kept(frame, now, self._clock() - now, self._changes)
        return frame

    def _summary(self, boards: bool) -> str:
        records = self._records.values()
        queues = [(queue.rank, queue.describe()) for queue in self._queues.values()]
        queues += [(_LAST, BoardQueue(key).describe()) for key in self._remembered]
        return cut_summary(
            queues,
            [record.told for record in records if record.told],
            [json.dumps(self._describe(record)) for record in records if record.keys] if boards else None,
        )

    def _describe(self, record: _Record) -> dict[str, Any]:
        holders = [
            {"name": holder.name, "key": key[:_NAME], "since": round(self._clock() - holder.since, 3)}
            for key, holder in list(record.given.items())[-_SHOWN:]
        ]
        extra = record.info.get("rpcnb")
        if type(extra) is not dict:
            extra = None
        taken = "draining" if extra and extra.get("draining") else "busy"
        state = "unhealthy" if record.withheld else "free" if record.pending else taken
        return {
            "key": [key[:_NAME] for key in sorted(record.keys)[:_SHOWN]],
            "addr": record.info.get("addr"),
            "state": state,
            "free": record.offered.total() - len(record.withheld),
            "holders": holders,
            "rpcnb": extra,
        }
