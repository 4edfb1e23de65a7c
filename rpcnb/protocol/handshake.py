"""The handshake: who speaks which key, before packets begin.

Direct connection: the client sends ``i32 MAGIC, i32 n, bytes[n]`` key text and waits; the server answers
``i32 MAGIC, i32 m, bytes[m]`` with its own key text, or one error word and closes. A key text is
``client:<match key>`` or ``server:<key>``, then options, each preceded by one space: ``-timeout=30``;
rpcnb adds ``-token=...`` (when the user has one) and ``-rpcnb=<major>.<minor>[,feature...]``; features are ``lanes``,
and limits that are not the defaults (``protocol/peerlimits.py``).

Source:
    ServerLoop and RPCConnect, src/runtime/rpc/rpc_socket_impl.cc; python/tvm/rpc/server.py, protocol 0.8.0.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rpcnb.errors import RemoteProtocolError
from rpcnb.protocol.codes import MAGIC, MAGIC_DUPLICATE, MAGIC_MISMATCH

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from rpcnb.protocol.codes import Role

__all__ = ["EXTENSION", "Handshake", "KeyText", "describe_strangers", "hello", "refusal"]

EXTENSION = "1.0"
_INT = struct.Struct("<i")
_MAX_SERVER_KEY = 4096

# What else dials an RPC port; the first bytes of each, and what to say.
_STRANGERS = (
    (b"GET ", "an HTTP request; the RPC port is not a web page"),
    (b"POST", "an HTTP request; the RPC port is not a web page"),
    (b"HEAD", "an HTTP request; the RPC port is not a web page"),
    (b"HTTP", "an HTTP answer; this is a web server's port"),
    (b"\x16\x03", "a TLS hello; this port speaks plain TCP"),
    (b"SSH-", "an SSH banner; dial the RPC port through `ssh -L` instead"),
    (b"\x71\xf2\x02\x00", "the tracker's magic word; this is not a tracker"),
)


def describe_strangers(word: bytes) -> str:
    """Say what kind of peer the first four bytes come from."""
    for start, words in _STRANGERS:
        if word.startswith(start):
            return words
    return f"the first word {int.from_bytes(word, 'little'):#x} instead of {MAGIC:#x}"


@dataclass(frozen=True, slots=True)
class KeyText:
    """A key text taken apart.

    Attributes:
        role: ``client`` or ``server``; empty if the text has no such prefix.
        key: The match key, up to the first white space.
        options: ``-name=value`` words; without ``=`` the value is empty.
        text: The whole text.
    """

    role: str
    key: str
    options: Mapping[str, str] = field(default_factory=dict)
    text: str = field(default="", compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> KeyText:
        """Take a key text apart; anything is accepted, nothing is believed."""
        word, _, rest = text.partition(" ")
        role, colon, key = word.partition(":")
        if not colon or role not in ("client", "server"):
            role, key = "", word
        options = {}
        for option in rest.split():
            name, _, value = option.partition("=")
            options[name] = value
        return cls(role, key, options, text)

    @property
    def timeout(self) -> float | None:
        """Seconds of ``-timeout=``; None if absent, malformed, not finite or not positive."""
        try:
            seconds = float(self.options.get("-timeout", ""))
        except ValueError:
            return None
        return seconds if seconds > 0 and math.isfinite(seconds) else None

    @property
    def features(self) -> frozenset[str] | None:
        """Features of an rpcnb peer of our major version; None for any other peer."""
        version, *features = self.options.get("-rpcnb", "").split(",")
        return frozenset(features) if version.split(".")[0] == EXTENSION.split(".")[0] else None


def hello(key_text: str) -> bytes:
    """Return the bytes with which a side presents its key text."""
    data = key_text.encode()
    return _INT.pack(MAGIC) + _INT.pack(len(data)) + data


def refusal(duplicate: bool = False) -> bytes:
    """Return the word that refuses a peer: no match, or (a proxy's) duplicate."""
    return _INT.pack(MAGIC_DUPLICATE if duplicate else MAGIC_MISMATCH)


class Handshake:
    """Reads the other side's magic word and key text, in any cut.

    ``receive_data`` returns None while more is needed, then the key text or the error word;
    what came behind it is in ``rest``.

    Args:
        max_key: Bytes of a key text that are accepted.
        with_magic: False where the caller has consumed the magic word (``%toinit``).
    """

    def __init__(self, max_key: int = _MAX_SERVER_KEY, *, with_magic: bool = True) -> None:
        self._buffer = bytearray()
        self._max_key = max_key
        self._with_magic = with_magic
        self._parser = self._parse()
        next(self._parser)

    @property
    def rest(self) -> bytes:
        """Bytes that came behind the handshake."""
        return bytes(self._buffer)

    @property
    def started(self) -> bool:
        """Tell whether any byte is waiting to become part of the handshake."""
        return bool(self._buffer)

    def receive_data(self, data: bytes | memoryview) -> str | int | None:
        """Take the next bytes.

        Returns:
            None for more, the peer's key text, or ``MAGIC_MISMATCH`` / ``MAGIC_DUPLICATE``.

        Raises:
            RemoteProtocolError: Not our protocol; the text says what it looks like.
        """
        self._buffer += data
        try:
            next(self._parser)
        except StopIteration as end:
            result: str | int = end.value
            return result
        return None

    def _read(self, nbytes: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < nbytes:
            yield
        data = bytes(self._buffer[:nbytes])
        del self._buffer[:nbytes]
        return data

    def _parse(self) -> Generator[None, None, str | int]:
        yield  # primed by __init__
        if self._with_magic:
            word = yield from self._read(4)
            (magic,) = _INT.unpack(word)
            if magic in (MAGIC_MISMATCH, MAGIC_DUPLICATE):
                return int(magic)
            if magic != MAGIC:
                raise RemoteProtocolError(f"expected an RPC peer, got {describe_strangers(word)}")
        (nbytes,) = _INT.unpack((yield from self._read(4)))
        if not 0 <= nbytes <= self._max_key:
            raise RemoteProtocolError(f"expected a key of 0 to {self._max_key} bytes, got {nbytes}")
        data = yield from self._read(nbytes)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise RemoteProtocolError("expected a key in UTF-8") from None


def key_text(role: Role, key: str, options: Mapping[str, str]) -> str:
    """Compose a key text; a stock peer's has the same bytes when the options are the same."""
    return " ".join([f"{role.name.lower()}:{key}", *(f"{name}={value}" for name, value in options.items())])
