"""Peers made of plain sockets: a client that says what it likes, a scripted server, a relay that cuts."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rpcnb.protocol.codes import MAGIC
from rpcnb.protocol.messages import InitServer, Message, Return, encode_packet

HELLO = struct.pack("<ii", MAGIC, 7) + b"client:"
SERVER_HELLO = struct.pack("<ii", MAGIC, 7) + b"server:"
INIT = b"".join(encode_packet(InitServer()))
VOID = b"".join(encode_packet(Return()))


def slowly(seconds: float, value: Any = None) -> Any:
    """Return ``value`` after a while."""
    time.sleep(seconds)
    return value


def packet(message: Message) -> bytes:
    """The bytes of a message."""
    return b"".join(bytes(part) for part in encode_packet(message))


def hello(text: str | bytes) -> bytes:
    """A handshake with this key text."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<ii", MAGIC, len(data)) + data


class RawClient:
    """A client of bytes."""

    def __init__(self, address: tuple[str, int], greeting: bytes = b"") -> None:
        self.sock = socket.create_connection(address, 10)
        self.sock.settimeout(10)
        if greeting:
            self.send(greeting)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise EOFError(f"the server closed after {data!r}")
            data += more
        return data

    def greeted(self) -> bytes:
        """Read the server's answer to the handshake."""
        _, length = struct.unpack("<ii", self.receive(8))
        return self.receive(length)

    def start(self, text: str = "client:") -> RawClient:
        """Shake hands and initialise."""
        self.send(hello(text) + INIT)
        self.greeted()
        assert self.packet() == VOID[8:]
        return self

    def packet(self) -> bytes:
        """Read one packet's body."""
        (length,) = struct.unpack("<Q", self.receive(8))
        return self.receive(length)

    def is_closed(self) -> bool:
        """Tell whether the server closes; waits for it."""
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeServer:
    """Accepts connections; a script speaks to each, in a thread of its own, then it is closed."""

    def __init__(self, script: Callable[[socket.socket], object]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._conns: list[socket.socket] = []
        self.accepted = 0
        self.done = threading.Event()
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        self.port: int = port
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            if self.done.is_set():
                conn.close()
                return
            self.accepted += 1
            conn.settimeout(10)
            self._conns.append(conn)
            thread = threading.Thread(target=self._speak, args=(conn,))
            self._threads.append(thread)
            thread.start()

    def _speak(self, conn: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._script(conn)
        with contextlib.suppress(OSError):
            conn.shutdown(socket.SHUT_RDWR)
        conn.close()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        self._accepting.join(5)
        self._listener.close()
        for conn in self._conns:
            with contextlib.suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


def read_hello(conn: socket.socket) -> bytes:
    """Read a client's handshake."""
    head = read_exactly(conn, 8)
    return read_exactly(conn, struct.unpack("<ii", head)[1])


def answers(data: bytes) -> Callable[[socket.socket], None]:
    """A script that reads the client's handshake and answers with these bytes."""

    def script(conn: socket.socket) -> None:
        read_hello(conn)
        conn.sendall(data)

    return script


def read_exactly(conn: socket.socket, count: int) -> bytes:
    """Read so many bytes."""
    data = b""
    while len(data) < count:
        more = conn.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def read_packet(conn: socket.socket) -> bytes:
    """Read one packet's body."""
    return read_exactly(conn, struct.unpack("<Q", read_exactly(conn, 8))[0])


def shake_and_init(conn: socket.socket) -> None:
    """Behave until a client's session stands."""
    read_hello(conn)
    conn.sendall(SERVER_HELLO)
    read_packet(conn)
    conn.sendall(VOID)


class CuttingRelay:
    """Forwards one connection at a time to a server and cuts it after so many bytes of one direction."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self.up_limit: int | None = None  # bytes from the client that pass
        self.down_limit: int | None = None
        self.up = 0
        self.down = 0
        self.cut_at = 0.0
        self._server = FakeServer(self._relay)
        self.address = self._server.address

    def _relay(self, client: socket.socket) -> None:
        self.up = self.down = 0
        with socket.create_connection(self._target, 10) as server:
            back = threading.Thread(target=self._copy, args=(server, client, False))
            back.start()
            self._copy(client, server, True)
            back.join(10)

    def _copy(self, source: socket.socket, target: socket.socket, upward: bool) -> None:
        passed = 0
        limit = self.up_limit if upward else self.down_limit
        with contextlib.suppress(OSError):
            while limit is None or passed < limit:
                data = source.recv(65536 if limit is None else min(65536, limit - passed))
                if not data:
                    break
                target.sendall(data)
                passed += len(data)
                if upward:
                    self.up = passed
                else:
                    self.down = passed
        self.cut_at = time.monotonic()
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.__exit__(None, None, None)
