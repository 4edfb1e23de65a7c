"""The tracker's wire: a magic word each way, then JSON in frames ``i32 n, bytes[n]``.

=============  ==============================================  ================================================
code           request                                         reply
=============  ==============================================  ================================================
PING           ``[1]``                                         ``0``
STOP           ``[2, stop_key]``                               ``0`` and the tracker ends, or ``-1``
PUT            ``[3, key, [port, match_key], host or null]``   ``0``
REQUEST        ``[4, key, user, priority]``                    ``[0, [host, port, match_key]]``, when there is one
UPDATE_INFO    ``[5, {"key": ..., "addr": [host, port]}]``     ``0``
SUMMARY        ``[6]``                                         ``[0, {"queue_info": ..., "server_info": ...}]``
GET_PENDING..  ``[7]``                                         match keys of this connection not handed out
=============  ==============================================  ================================================

What rpcnb adds travels where stock does not look: REQUEST and SUMMARY may end with ``{"rpcnb": "1.0"}``. A tracker
that knows it answers the first with ``[100, {"place": 2, "of": 5}]`` while the client waits, and adds ``"boards"`` to
the summary. A board's info may hold ``"rpcnb"``: its instance, and who uses it. A summary of which something had to be
left out says how much in ``"left_out"``.

Source:
    python/tvm/rpc/tracker.py, client.py and server.py of TVM 0.27.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.summary import is_plain, read_port, read_summary, read_told
from rpcnb.protocol.handshake import EXTENSION

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

__all__ = [
    "GREETING",
    "NOTHING",
    "PLACE",
    "TRACKER_MAGIC",
    "Flow",
    "Frames",
    "PendingKeys",
    "Ping",
    "Put",
    "RequestBoard",
    "Stop",
    "Summary",
    "TrackerCode",
    "TrackerRequest",
    "UpdateInfo",
    "ask_pending_keys",
    "ask_summary",
    "can_be_listed",
    "encode_frame",
    "frame_of",
    "is_word",
    "parse_request",
    "put_board",
    "request_board",
    "tell_info",
]

TRACKER_MAGIC = 0x2F271
PLACE = 100  # rpcnb's: the place in the queue, while a REQUEST waits
_INT = struct.Struct("<i")
GREETING = _INT.pack(TRACKER_MAGIC)
NOTHING = object()  # no whole frame has arrived
# Bytes. A request of more than 64 KiB is none; a megabyte of JSON would take the tracker 0.1 s to look at. A stock
# tracker's summary has no limit.
_REQUEST, _REPLY, _INFO = 64 << 10, 16 << 20, 16384
_KEY = 4096  # letters
_HOST = 255  # letters
_MATCH_KEY = 1000  # bytes as JSON: a board that offers all it may can be told its match keys in one frame
_PLACES = 1 << 31
_OURS = {"rpcnb": EXTENSION}


class TrackerCode(IntEnum):
    """The first item of a request, and what stands for success and failure in replies."""

    FAIL = -1
    SUCCESS = 0
    PING = 1
    STOP = 2
    PUT = 3
    REQUEST = 4
    UPDATE_INFO = 5
    SUMMARY = 6
    GET_PENDING_MATCHKEYS = 7


def encode_frame(value: Any) -> bytes:
    """Return a frame; the same bytes as stock's for the same value."""
    return frame_of(json.dumps(value))


def frame_of(text: str) -> bytes:
    """Return a frame with this JSON."""
    data = text.encode()
    return _INT.pack(len(data)) + data


class Frames:
    """Reads the other side's magic word and frames, in any cut.

    Nothing is reserved for what is only announced.

    Args:
        of_tracker: The other side is a tracker. Stock's passes on what strangers gave it: any length, and numbers that
            are none (which become null).
    """

    def __init__(self, of_tracker: bool = False) -> None:
        self._buffer = bytearray()
        self._limit = _REPLY if of_tracker else _REQUEST
        self._read_constant = _drop_constant if of_tracker else _refuse_constant
        self.greeted = False

    def receive_data(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            RemoteProtocolError: They do not begin with the tracker's magic word.
        """
        self._buffer += data
        if not self.greeted and len(self._buffer) >= len(GREETING):
            word = bytes(self._buffer[: len(GREETING)])
            if word != GREETING:
                seen = int.from_bytes(word, "little")
                raise RemoteProtocolError(f"expected the tracker's magic word {TRACKER_MAGIC:#x}, got {seen:#x}")
            del self._buffer[: len(GREETING)]
            self.greeted = True

    def next_value(self) -> Any:
        """Return the value of the next whole frame, or NOTHING.

        Raises:
            RemoteProtocolError: Its length or its text is not one.
        """
        if not self.greeted or len(self._buffer) < _INT.size:
            return NOTHING
        (nbytes,) = _INT.unpack_from(self._buffer)
        if not 0 < nbytes <= self._limit:
            raise RemoteProtocolError(f"expected a frame of 1 to {self._limit} bytes, got {nbytes}")
        end = _INT.size + nbytes
        if len(self._buffer) < end:
            return NOTHING
        data = bytes(self._buffer[_INT.size : end])
        del self._buffer[:end]
        try:
            return json.loads(data.decode(), parse_constant=self._read_constant)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"expected JSON, got {data[:40]!r} ({error})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _drop_constant(name: str) -> None:
    """Read a number that is none as null."""


# -- requests, as the tracker reads them ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping:
    """Nothing is asked."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the tracker."""

    stop_key: str


@dataclass(frozen=True, slots=True)
class Put:
    """Offer one session of a board; ``host`` None is where the connection comes from."""

    key: str
    port: int
    match_key: str
    host: str | None = None


@dataclass(frozen=True, slots=True)
class RequestBoard:
    """Ask for a board; ``tells_place`` if the client wants to know its place in the queue."""

    key: str
    user: str = ""
    priority: float = 1
    tells_place: bool = False


@dataclass(frozen=True, slots=True)
class UpdateInfo:
    """Say who one is."""

    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """Ask for everything; ``boards`` if the client can read what rpcnb adds."""

    boards: bool = False


@dataclass(frozen=True, slots=True)
class PendingKeys:
    """Ask for one's match keys that nobody has got."""


TrackerRequest: TypeAlias = Ping | Stop | Put | RequestBoard | UpdateInfo | Summary | PendingKeys


def parse_request(value: Any) -> TrackerRequest:
    """Read a request.

    Raises:
        RemoteProtocolError: Not one of the seven, or not of its shape.
    """
    if type(value) is not list or not value or type(value[0]) is not int:
        raise RemoteProtocolError(f"expected a list that begins with a code, got {_show(value)}")
    code, *args = value
    try:
        made: TrackerRequest = _PARSERS[code](*args)
    except (
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ):  # OverflowError: a priority that is no float
        raise RemoteProtocolError(f"expected a request of a known shape, got {_show(value)}") from None
    return made


def _show(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "something deep"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _text(value: Any, limit: int = _KEY) -> str:
    if type(value) is not str or len(value) > limit:
        raise ValueError
    value.encode()  # JSON can hold halves of letters, which cannot be sent or shown
    return value


def _host(value: Any) -> str | None:
    """Read where a board is to be reached; None is where its connection comes from."""
    if value is None or value == "":
        return None
    host = _text(value, _HOST)
    if not is_word(host):
        raise ValueError
    return host


def is_word(text: str) -> bool:
    """Tell whether this can be an address or a match key: a word, without control characters."""
    return text.isprintable() and " " not in text


def can_be_listed(match_key: str) -> bool:
    """Tell whether a tracker takes a board with this match key."""
    return is_word(match_key) and len(json.dumps(match_key)) <= _MATCH_KEY


def _match_key(value: Any) -> str:
    match_key = _text(value)
    if not can_be_listed(match_key):
        raise ValueError
    return match_key


def _put(key: Any, value: Any, host: Any = None, *_: Any) -> Put:
    port, match_key = value
    return Put(_text(key), read_port(port), _match_key(match_key), _host(host))


def _request(key: Any, user: Any, priority: Any, extra: Any = None, *_: Any) -> RequestBoard:
    if type(priority) not in (int, float) or not math.isfinite(priority):
        raise ValueError
    return RequestBoard(_text(key), _text(user or ""), priority, _is_ours(extra))


def _info(info: Any, *_: Any) -> UpdateInfo:
    if type(info) is not dict or len(json.dumps(info)) > _INFO or not is_plain(info):
        raise ValueError
    if "key" in info:
        _text(info["key"])
    if "addr" in info:
        host, port = info["addr"]
        info = {**info, "addr": [_host(host), read_port(port)]}
    if "rpcnb" in info:
        info = {**info, "rpcnb": read_told(info["rpcnb"])}
    return UpdateInfo(info)


def _is_ours(extra: Any) -> bool:
    version = extra.get("rpcnb") if type(extra) is dict else None
    return type(version) is str and version.split(".")[0] == EXTENSION.split(".")[0]


_PARSERS: dict[int, Callable[..., TrackerRequest]] = {
    TrackerCode.PING: lambda *_: Ping(),
    TrackerCode.STOP: lambda stop_key, *_: Stop(_text(stop_key)),
    TrackerCode.PUT: _put,
    TrackerCode.REQUEST: _request,
    TrackerCode.UPDATE_INFO: _info,
    TrackerCode.SUMMARY: lambda extra=None, *_: Summary(_is_ours(extra)),
    TrackerCode.GET_PENDING_MATCHKEYS: lambda *_: PendingKeys(),
}


# -- exchanges, as clients and boards make them: generators that yield what to send (None: only receive) ------------

Flow: TypeAlias = "Generator[Any, Any, Any]"


def request_board(
    key: str, user: str = "", priority: float = 1, told: Callable[[int, int], object] | None = None
) -> Flow:
    """Ask for a board and wait; returns host, port and match key.

    Args:
        key: Kind of board.
        user: Who asks, for others to see.
        priority: The higher, the earlier.
        told: Called with the place in the queue (from 1) and its length; None asks as stock does.
    """
    reply = yield [TrackerCode.REQUEST, key, user, priority, *([_OURS] if told is not None else [])]
    while told is not None and type(reply) is list and reply[:1] == [PLACE]:
        told(*_place(reply))
        reply = yield None
    try:
        code, (host, port, match_key) = reply
        if code != TrackerCode.SUCCESS:
            raise ValueError
        return _text(host), read_port(port), _text(match_key)
    except (TypeError, ValueError):
        raise RemoteProtocolError(
            f"expected [0, [host, port, match key]] from the tracker, got {_show(reply)}"
        ) from None


def _place(reply: list[Any]) -> tuple[int, int]:
    try:
        (_, info) = reply
        place, length = info["place"], info["of"]
        if not all(type(one) is int and 0 <= one < _PLACES for one in (place, length)):
            raise ValueError
    except (TypeError, ValueError, KeyError):
        expected = f'[{PLACE}, {{"place": ..., "of": ...}}]'
        raise RemoteProtocolError(f"expected {expected} from the tracker, got {_show(reply)}") from None
    return place, length


def ask_summary(boards: bool = True) -> Flow:
    """Ask for the summary; with ``boards`` also for what an rpcnb tracker adds."""
    reply = yield [TrackerCode.SUMMARY, *([_OURS] if boards else [])]
    try:
        code, found = reply
        if (
            code != TrackerCode.SUCCESS
            or type(found["queue_info"]) is not dict
            or type(found["server_info"]) is not list
        ):
            raise ValueError
        return read_summary(found)
    except (TypeError, ValueError, KeyError):
        raise RemoteProtocolError(f"expected [0, summary] from the tracker, got {_show(reply)}") from None


def tell_info(info: Mapping[str, Any]) -> Flow:
    """Say who one is."""
    yield from _succeed([TrackerCode.UPDATE_INFO, dict(info)])


def put_board(key: str, port: int, match_key: str, host: str | None = None) -> Flow:
    """Offer one session."""
    yield from _succeed([TrackerCode.PUT, key, [port, match_key], host])


def _succeed(request: list[Any]) -> Flow:
    reply = yield request
    if reply != TrackerCode.SUCCESS:
        raise RemoteProtocolError(f"expected 0 from the tracker, got {_show(reply)}")


def ask_pending_keys() -> Flow:
    """Ask which of one's match keys nobody has got; returns a set."""
    reply = yield [TrackerCode.GET_PENDING_MATCHKEYS]
    if type(reply) is not list or not all(type(one) is str for one in reply):
        raise RemoteProtocolError(f"expected match keys from the tracker, got {_show(reply)}")
    return set(reply)
