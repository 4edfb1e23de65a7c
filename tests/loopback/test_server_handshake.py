"""Handshakes over sockets: silent, broken, hostile and too many clients do not touch the others."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from conftest import eventually
from rawpeer import (
    HELLO,
    INIT,
    VOID,
    FakeServer,
    RawClient,
    answers,
    hello,
    packet,
    read_exactly,
    read_hello,
    shake_and_init,
)

import rpcnb
from rpcnb import errors
from rpcnb.protocol.codes import MAGIC, Code, Limits
from rpcnb.protocol.messages import CallFunc, CopyFromRemote, InitServer, Syscall
from rpcnb.runtime.registry import Registry
from rpcnb.values import CPU, DType, TensorMeta

Serve = Callable[..., Any]


@contextlib.contextmanager
def many(address: tuple[str, int], count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address, 10)) for _ in range(count)]


def ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def good_call(server: Any) -> float:
    """One good client's whole session; returns its seconds."""
    start = time.monotonic()
    with rpcnb.connect(server.address, token=server.token) as session:
        assert session.get_function("rpc.test.addone")(41) == 42
    return time.monotonic() - start


def expect_warnings(caplog: pytest.LogCaptureFixture, *texts: str) -> None:
    """Wait for one warning per text, in any order, and forget them."""
    eventually(lambda: len(caplog.records) >= len(texts), f"{len(texts)} log lines")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(texts), messages
    for text in texts:
        assert any(text in message for message in messages), (text, messages)
    caplog.clear()


def test_h1_silent_connections_are_closed_in_time_and_disturb_nobody(serve: Serve) -> None:
    server = serve(limits=Limits(handshake_timeout=0.5))
    start = time.monotonic()
    with many((server.host, server.port), 200) as silent:
        slowest = max(good_call(server) for _ in range(10))
        eventually(lambda: all(ended(sock) for sock in silent), "the end of silent connections", 5)
        took = time.monotonic() - start
        good_call(server)
    assert took >= 0.45
    assert slowest < 2
    eventually(lambda: not server._connections, "no connection left")


BAD_KEYS = {
    "not utf-8": hello(b"\xff\xfe"),
    "length -1": struct.pack("<ii", MAGIC, -1),
    "length 2**31-1": struct.pack("<ii", MAGIC, 2**31 - 1),
    "length 4097": struct.pack("<ii", MAGIC, 4097),
}
REFUSED_KEYS = {
    "empty": hello(""),
    "one byte": hello("x"),
    "spaces": hello("     "),
    "nul": hello("client:\0"),
    "no prefix": hello("demo"),
}


@pytest.mark.parametrize("name", [*BAD_KEYS, *REFUSED_KEYS])
def test_h2_bad_keys_do_not_stop_the_listener(serve: Serve, caplog: pytest.LogCaptureFixture, name: str) -> None:
    server = serve()
    with RawClient((server.host, server.port), {**BAD_KEYS, **REFUSED_KEYS}[name]) as client:
        start = time.monotonic()
        if name in REFUSED_KEYS:
            assert struct.unpack("<i", client.receive(4)) == (MAGIC + 2,)
        assert client.is_closed()
        assert time.monotonic() - start < 2
    assert good_call(server) < 2
    expect_warnings(caplog, "wrong key or token" if name in REFUSED_KEYS else "expected a key")


STRANGERS = {
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "an HTTP request"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), "a TLS hello"),
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", "an SSH banner"),
    "tracker": (struct.pack("<i", 0x2F271), "the tracker's magic word"),
    **{
        f"magic wrong in byte {index}": (
            bytes(byte ^ (0x40 if index == at else 0) for at, byte in enumerate(HELLO)),
            "instead of 0xff271",
        )
        for index in range(4)
    },
}


@pytest.mark.parametrize("name", STRANGERS)
def test_h3_strangers_get_one_log_line_and_the_door(serve: Serve, caplog: pytest.LogCaptureFixture, name: str) -> None:
    server = serve()
    data, text = STRANGERS[name]
    with RawClient((server.host, server.port), data) as client:
        assert client.is_closed()
    expect_warnings(caplog, text)
    good_call(server)


def test_h4_clients_of_one_byte_at_a_time_are_cut_and_disturb_nobody(serve: Serve) -> None:
    server = serve(limits=Limits(handshake_timeout=0.6))
    start = time.monotonic()
    with many((server.host, server.port), 64) as slow:
        sent = 0
        while not all(ended(sock) for sock in slow):
            assert time.monotonic() - start < 8
            if sent < len(HELLO) - 1:
                for sock in slow:
                    with contextlib.suppress(OSError):
                        sock.send(HELLO[sent : sent + 1])
                sent += 1
            assert good_call(server) < 2
    assert time.monotonic() - start >= 0.5


@pytest.mark.parametrize("text", ["client:", "client: -rpcnb=1.0 -timeout=30"])
def test_h5_a_handshake_cut_anywhere_is_the_same(serve: Serve, text: str) -> None:
    server = serve()
    data = hello(text) + INIT
    with RawClient((server.host, server.port), data) as whole:
        answer = whole.greeted()
        assert whole.packet() == VOID[8:]
    for cut in range(1, len(data)):
        with RawClient((server.host, server.port)) as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.send(data[:cut])
            client.send(data[cut:])
            assert client.greeted().partition(b" -session=")[0] == answer.partition(b" -session=")[0]
            assert client.packet() == VOID[8:]


def test_h5_a_handshake_and_init_byte_by_byte(serve: Serve) -> None:
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in HELLO + INIT:
            client.send(bytes([byte]))
        client.greeted()
        assert client.packet() == VOID[8:]


def test_h6_another_version_is_an_error_with_both(serve: Serve) -> None:
    server = serve()
    with RawClient((server.host, server.port), HELLO + packet(InitServer(version="0.7.9"))) as client:
        client.greeted()
        reply = client.packet()
    assert b"0.7.9" in reply
    assert b"0.8.0" in reply
    good_call(server)


def test_h6_a_server_of_another_version_is_named() -> None:
    def script(conn: socket.socket) -> None:
        from rpcnb.protocol.messages import Raised

        read_hello(conn)
        conn.sendall(hello("server:"))
        read_exactly(conn, 20)
        conn.sendall(
            packet(Raised("Client protocol version mismatch with the server  server protocol=0.9.0, client=0.8.0"))
        )

    with FakeServer(script) as fake, pytest.raises(errors.VersionMismatch, match=r"0\.8\.0.*0\.9\.0") as caught:
        rpcnb.connect(fake.address)
    assert caught.value.phase == "init"


@pytest.mark.parametrize(("word", "kind"), [(MAGIC + 1, errors.DuplicateKey), (MAGIC + 2, errors.KeyMismatch)])
def test_h7_words_of_refusal_are_typed(word: int, kind: type[Exception]) -> None:
    with (
        FakeServer(answers(struct.pack("<i", word))) as fake,
        pytest.raises(kind),
    ):
        rpcnb.connect(fake.address, key="board")


GARBAGE: dict[str, Callable[[socket.socket], object]] = {
    "before": lambda conn: conn.sendall(b"\x00" * 64),
    "http": lambda conn: conn.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "2 gib key": answers(struct.pack("<ii", MAGIC, 2**31 - 1) + bytes(1000)),
    "negative key": answers(struct.pack("<ii", MAGIC, -5)),
    "closes": lambda conn: read_hello(conn),
    "closes inside": answers(struct.pack("<i", MAGIC)),
    "talks on": answers(hello("server:") + b"more"),
    "bad utf-8": answers(hello(b"\xff\xff")),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_h8_a_server_that_sends_garbage_is_a_typed_error_at_once(name: str) -> None:
    before = psutil.Process().memory_info().rss
    with FakeServer(GARBAGE[name]) as fake:
        start = time.monotonic()
        with pytest.raises(errors.NotAnRpcServer) as caught:
            rpcnb.connect(fake.address)
        assert time.monotonic() - start < 2
    assert caught.value.phase == "handshake"
    assert fake.address in str(caught.value)
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_h8_a_huge_packet_instead_of_inits_reply_is_typed_and_takes_no_memory() -> None:
    def script(conn: socket.socket) -> None:
        read_hello(conn)
        conn.sendall(hello("server:") + struct.pack("<Q", 1 << 62) + struct.pack("<i", Code.RETURN))
        read_exactly(conn, 1 << 20)

    def later(conn: socket.socket) -> None:
        read_hello(conn)
        conn.sendall(hello("server:"))
        read_exactly(conn, 20)
        conn.sendall(struct.pack("<Qi", 1 << 62, Code.RETURN) + bytes(64))

    before = psutil.Process().memory_info().rss
    for speech in (script, later):
        with FakeServer(speech) as fake, pytest.raises(errors.RpcError):
            rpcnb.connect(fake.address, timeout=5)
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.parametrize(
    "message",
    [
        CallFunc(1),
        Syscall(Code.GET_GLOBAL_FUNC, ("rpc.test.addone",)),
        Syscall(Code.DEV_STREAM_SYNC, (CPU, None)),
        CopyFromRemote(TensorMeta(0, CPU, (4,), DType(1, 8)), 4),
    ],
    ids=lambda message: type(message).__name__,
)
def test_h9_requests_before_init_are_refused_and_the_server_lives(serve: Serve, message: Any) -> None:
    server = serve()
    with RawClient((server.host, server.port), HELLO + packet(message)) as client:
        client.greeted()
        reply = client.packet()
        assert struct.unpack("<i", reply[:4]) == (Code.EXCEPTION,)
        assert b"InitRemoteSession" in reply
        client.send(INIT)
        assert client.packet() == VOID[8:]
    good_call(server)


def test_h9_init_twice_is_refused_and_the_session_lives(serve: Serve) -> None:
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        client.send(INIT)
        assert b"already been initialized" in client.packet()
        client.send(packet(Syscall(Code.GET_GLOBAL_FUNC, ("rpc.test.addone",))))
        assert struct.unpack("<i", client.packet()[:4]) == (Code.RETURN,)
    good_call(server)


def test_h10_of_too_many_half_open_connections_the_oldest_go(serve: Serve) -> None:
    server = serve()
    with many((server.host, server.port), 300) as half_open:
        eventually(lambda: sum(ended(sock) for sock in half_open) >= 44, "the end of the oldest")
        good_call(server)
        gone = [ended(sock) for sock in half_open]
        assert sum(gone) <= 46
        assert all(gone[:44])
        assert not any(gone[46:])
        assert len(server._half_open) <= 256
    eventually(lambda: not server._half_open, "no half-open connection left")


def test_h10_one_address_may_hold_so_many_half_open(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(limits=Limits(exempt_loopback=False, half_open_per_address=8))
    with many((server.host, server.port), 12) as half_open:
        eventually(lambda: sum(ended(sock) for sock in half_open) == 4, "the end of those too many")
        assert [ended(sock) for sock in half_open] == [False] * 8 + [True] * 4
    expect_warnings(caplog, "too many unfinished handshakes")  # the others are summed up
    eventually(lambda: not server._half_open, "no half-open connection left")
    good_call(server)


def test_a_client_that_resets_inside_the_handshake_is_forgotten(serve: Serve) -> None:
    server = serve()
    for cut in (0, 3, 8, 12):
        sock = socket.create_connection((server.host, server.port))
        sock.send(HELLO[:cut])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    eventually(lambda: not server._connections and not server._half_open, "no connection left")
    good_call(server)


def test_many_clients_come_and_go_without_a_trace(serve: Serve, registry: Registry) -> None:
    server = serve()
    fake = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        good_call(server)
    eventually(lambda: not server._connections and server.sessions == 0, "no session left")
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= fake, "no descriptor left")


def test_init_answered_then_silence_is_not_a_hang() -> None:
    def script(conn: socket.socket) -> None:
        shake_and_init(conn)
        read_exactly(conn, 1 << 20)

    with FakeServer(script) as fake, rpcnb.connect(fake.address) as session:
        with pytest.raises(errors.DeadlineExceeded):
            session.get_function("x", timeout=0.2)
        assert session.state == "draining"
