"""What the other side takes of text and bytes, so that what is larger is refused by its sender, as one call's error.

A receiver can only end the conversation: the reply is on the way. So a side whose limits are not the defaults says so
among the features of its key option, ``-rpcnb=1.0,text=33554432,bytes=2147483648``; older peers ignore that. Whoever
says nothing has the defaults, a client that is told nothing of extensions included; only a stock client's bytes are not
bounded: it may be reading a file of any size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rpcnb.errors import LimitExceeded
from rpcnb.protocol.codes import Limits
from rpcnb.protocol.messages import Raised, Return, printable
from rpcnb.values import plain

if TYPE_CHECKING:
    from rpcnb.protocol.messages import Reply

__all__ = ["PeerLimits", "extension", "text_size"]

_UNBOUNDED = 1 << 63
_BESIDE = 1 << 17  # bytes of a packet that a text leaves for what travels with it: a traceback, heads
_TRACEBACK = 1 << 16
_ORDINARY = frozenset({int, float, bool, type(None)})
_RAISE = "raise it with connect(..., limits=rpcnb.Limits({name}=...))"


def _texts(limits: Limits) -> int:
    """Return the bytes that a text may have: it counts to its packet, too."""
    return min(limits.text, max(limits.call - _BESIDE, limits.call // 2))


def extension(version: str, limits: Limits, *features: str) -> str:
    """Return the value of a side's ``-rpcnb`` option, with the limits that are not the defaults."""
    usual = Limits()
    told = ((name, of(limits)) for name, of in _TOLD.items() if of(limits) != of(usual))
    return ",".join((version, *features, *(f"{name}={value}" for name, value in told)))


_TOLD: dict[str, Any] = {"text": _texts, "bytes": lambda limits: limits.bytes_argument}


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """What a peer takes.

    Attributes:
        text: Bytes of one text.
        bytes: Bytes of one bytes value.
    """

    text: int = _texts(Limits())
    bytes: int = Limits().bytes_argument

    @classmethod
    def told_by(cls, features: frozenset[str] | None) -> PeerLimits:
        """Read a peer's features; None is a stock peer's."""
        if features is None:
            return cls(bytes=_UNBOUNDED)
        found: dict[str, int] = {}
        for feature in features:
            name, _, value = feature.partition("=")
            if name in _TOLD and value.isascii() and value.isdecimal() and len(value) < 20:
                found[name] = int(value)
        return cls(**found)

    def in_records(self) -> PeerLimits:
        """Return what one record of a started call's outcome may hold: all of it is one bytes value."""
        return replace(self, text=min(self.text, self.bytes // 4))

    def fit(self, reply: Reply) -> Reply:
        """Return a reply that the peer can read: an error's texts are cut.

        Raises:
            LimitExceeded: A result is too large; nothing was sent.
        """
        kind = type(reply)
        if kind is Return:
            if not _ORDINARY.issuperset(map(type, reply.values)):  # type: ignore[union-attr]  # a Return
                for value in reply.values:  # type: ignore[union-attr]  # likewise
                    self._check(plain(value))
        elif kind is Raised:
            return self._cut(reply)  # type: ignore[arg-type]  # a Raised
        return reply

    def _check(self, value: Any) -> None:
        if isinstance(value, str):
            self.check_bytes(text_size(value, self.text), "text", "text", self.text)
        elif isinstance(value, (bytes, bytearray, memoryview)):
            self.check_bytes(memoryview(value).nbytes, "bytes", "bytes_argument", self.bytes)

    @staticmethod
    def check_bytes(nbytes: int, what: str, name: str, limit: int) -> None:
        """Raise LimitExceeded if so many bytes of a result are too many."""
        if nbytes > limit:
            raise LimitExceeded(
                f"the {what} result of {nbytes} bytes exceeds the client's {name}={limit}; {_RAISE.format(name=name)}"
            )

    def _cut(self, raised: Raised) -> Raised:
        limit = self.text
        trace = min(limit // 2, _TRACEBACK)
        texts = (raised.text, raised.type_name, raised.traceback)
        if all(len(text) * 6 <= trace for text in texts):  # the longest form of a character that cannot be printed
            return raised
        return Raised(*(_cut(text, most) for text, most in zip(texts, (limit, trace, trace), strict=True)))


def text_size(text: str, most: int) -> int:
    """Return the bytes of a text as it travels; its characters where that cannot be more than ``most``."""
    return len(text) if len(text) * 4 <= most else len(text.encode("utf-8", "surrogatepass"))


def _cut(text: str, most: int) -> str:
    data = printable(text).encode()
    if len(data) <= most:
        return text
    note = (
        f"... (cut: this text has {len(data)} bytes, the client's text={most}; {_RAISE.format(name='text')})".encode()
    )
    return (data[: max(0, most - len(note))].decode("utf-8", "ignore") + note.decode()).encode()[:most].decode()
