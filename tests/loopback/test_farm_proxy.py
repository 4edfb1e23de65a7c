"""The proxy over real sockets: pairs, back-pressure, ends, time limits, a tracker that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from rawpeer import hello

import rpcnb
from rpcnb.farm import proxy as proxy_module
from rpcnb.farm import registration
from rpcnb.farm.messages import GREETING
from rpcnb.runtime.registry import Registry
from rpcnb.transport.runfiles import find_token, publish

MISMATCH = struct.pack("<i", 0xFF273)


@pytest.fixture
def proxy() -> Iterator[rpcnb.Proxy]:
    with rpcnb.Proxy(port=0, web_port=0, silent=True) as proxy:
        yield proxy


@pytest.fixture
def board(registry: Registry, serve: Callable[..., Any], proxy: rpcnb.Proxy) -> Iterator[Callable[..., Any]]:
    """Start servers that wait at the proxy; they end before it."""
    registry.register("add", lambda a, b: a + b)
    registry.register("later", _later)
    servers = []

    def start(*, web: bool = False, waits: bool = True, **options: Any) -> Any:
        host = f"ws://127.0.0.1:{proxy.web_port}" if web else "127.0.0.1"
        server = serve(**{"host": host, "port": proxy.port, "key": "x", "is_proxy": True, **options})
        servers.append(server)
        if waits:
            eventually(lambda: server.registered and proxy.waiting, "the server's wait")
        return server

    yield start
    for server in servers:
        server.close()


async def _later(value: Any) -> Any:
    await asyncio.sleep(0.02)
    return value


def dial(proxy: rpcnb.Proxy, data: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", proxy.port), 10)
    sock.sendall(data)
    return sock


def reads(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            break
        data += more
    return data


def joined(proxy: rpcnb.Proxy, key: str = "k") -> tuple[socket.socket, socket.socket]:
    server = dial(proxy, hello(f"server:{key}"))
    eventually(lambda: proxy.waiting, "the server's wait")
    client = dial(proxy, hello(f"client:{key}"))
    assert reads(client, len(hello(f"server:{key}"))) == hello(f"server:{key}")
    assert reads(server, len(hello(f"client:{key}"))) == hello(f"client:{key}")
    return client, server


@pytest.mark.parametrize("web_client", [False, True], ids=["tcp-client", "ws-client"])
@pytest.mark.parametrize("web_server", [False, True], ids=["tcp-server", "ws-server"])
def test_every_mix_of_transports_carries_a_session(
    proxy: rpcnb.Proxy, board: Callable[..., Any], web_client: bool, web_server: bool
) -> None:
    board(web=web_server)
    url = f"ws://127.0.0.1:{proxy.web_port}/ws" if web_client else f"127.0.0.1:{proxy.port}"
    for _ in range(3):
        with rpcnb.connect(url, key="x") as session:
            assert session.is_rpcnb
            assert session.call("add", 1, 2) == 3
            later = session.get_function("later")
            assert [one.result() for one in [later.submit(one) for one in range(5)]] == list(range(5))
            array = np.random.default_rng(1).random(1_000_000)
            assert (session.array(array).numpy() == array).all()


def test_the_awaited_twin_goes_through_a_proxy(proxy: rpcnb.Proxy, board: Callable[..., Any]) -> None:
    board()

    async def story() -> None:
        async with await rpcnb.connect_async("127.0.0.1", proxy.port, "x") as session:
            assert await session.call("add", 1, 2) == 3

    asyncio.run(story())


@pytest.mark.parametrize(("given", "enters"), [(None, False), ("wrong", False), ("right", True)])
@pytest.mark.parametrize("web", [False, True], ids=["tcp", "ws"])
def test_s5_a_token_is_asked_for_behind_a_proxy_too(
    proxy: rpcnb.Proxy,
    board: Callable[..., Any],
    web: bool,
    given: str | None,
    enters: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    board(web=web, token="right")
    if enters:
        with rpcnb.connect("127.0.0.1", proxy.port, "x", token=given) as session:
            assert session.call("add", 1, 1) == 2
    else:
        with pytest.raises(rpcnb.KeyMismatch, match="wrong key or token"):
            rpcnb.connect("127.0.0.1", proxy.port, "x", token=given)
        eventually(lambda: "wrong key or token" in caplog.text, "the line in the log")
        assert "right" not in caplog.text
        caplog.clear()


def test_a_hundred_pairs_at_once(proxy: rpcnb.Proxy) -> None:
    pairs = [joined(proxy, f"k{number}") for number in range(100)]
    assert proxy.pairs == 100
    for number, (client, server) in enumerate(pairs):
        client.sendall(b"up%d" % number)
        server.sendall(b"down%d" % number)
    for number, (client, server) in enumerate(pairs):
        assert reads(server, len(b"up%d" % number)) == b"up%d" % number
        assert reads(client, len(b"down%d" % number)) == b"down%d" % number
    for client, server in pairs:
        client.close()
        assert reads(server, 1) == b""
        server.close()
    eventually(lambda: proxy.pairs == 0, "their end")


def test_a_slow_reader_holds_the_sender_back_and_gets_everything(proxy: rpcnb.Proxy) -> None:
    client, server = joined(proxy)
    data = np.random.default_rng(2).bytes(64 << 20)
    sent = threading.Event()

    def send() -> None:
        client.sendall(data)
        sent.set()
        client.close()

    thread = threading.Thread(target=send)
    thread.start()
    before = -1
    while before != proxy.forwarded:  # until nothing moves any more
        before = proxy.forwarded
        sent.wait(0.2)
    assert proxy.forwarded < 40 << 20, "kept by the kernel, and one buffer"
    assert not sent.is_set()
    other = joined(proxy, "other")
    other[0].sendall(b"hello")
    assert reads(other[1], 5) == b"hello"
    received = bytearray()
    while more := server.recv(1 << 20):
        received += more
    assert received == data, "what was pending was flushed before the end"
    thread.join()
    server.close()
    for sock in other:
        sock.close()


@pytest.mark.parametrize("state", ["silent", "half a key", "waiting", "paired"])
def test_t8_a_peer_may_go_in_each_state(proxy: rpcnb.Proxy, state: str) -> None:
    if state == "paired":
        client, server = joined(proxy)
        client.close()
        assert reads(server, 1) == b""
        server.close()
    else:
        sock = dial(proxy, {"silent": b"", "half a key": hello("server:k")[:10]}.get(state, hello("server:k")))
        if state == "waiting":
            eventually(lambda: proxy.waiting == 1, "its wait")
        sock.close()
    eventually(lambda: not proxy._sides, "the end of everything")
    client, server = joined(proxy)
    client.close()
    server.close()


BAD = {
    "another protocol": (b"GET / HTTP/1.1\r\n\r\n", "HTTP request"),
    "a key without a role": (hello("k"), "expected a key text"),
    "a key that is too long": (struct.pack("<ii", 0xFF271, 1 << 30), "expected a key of"),
    "more than the key": (hello("client:k") + b"early", "expected nothing behind the key"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_peers_lose_their_own_connection_alone(
    proxy: rpcnb.Proxy, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = joined(proxy)
    data, text = BAD[name]
    with dial(proxy, data) as bad, contextlib.suppress(ConnectionError):
        assert reads(bad, 1) == b""
    (record,) = caplog.records
    assert text in record.getMessage()
    caplog.clear()
    client.sendall(b"still")
    assert reads(server, 5) == b"still"
    client.close()
    server.close()


def test_nothing_may_be_sent_while_one_waits(proxy: rpcnb.Proxy, caplog: pytest.LogCaptureFixture) -> None:
    with dial(proxy, hello("client:k")) as sock:
        eventually(lambda: proxy.waiting == 1, "its wait")
        sock.sendall(b"early")
        with contextlib.suppress(ConnectionError):
            assert reads(sock, 1) == b""
    eventually(lambda: proxy.waiting == 0, "its end")
    caplog.clear()


def test_t8_both_waits_end_at_their_times() -> None:
    with rpcnb.Proxy(port=0, timeout_client=0.3, timeout_server=0.6, silent=True) as proxy:
        for role, seconds in (("client", 0.3), ("server", 0.6)):
            start = time.monotonic()
            with dial(proxy, hello(f"{role}:k")) as sock:
                assert reads(sock, 4) == MISMATCH
                assert reads(sock, 1) == b""
            assert seconds <= time.monotonic() - start < seconds + 1


def test_a_peer_that_never_presents_a_key_is_ended(proxy: rpcnb.Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "_HANDSHAKE", 0.1)
    with dial(proxy) as sock:
        assert reads(sock, 1) == b""


def test_too_many_peers_are_refused(
    proxy: rpcnb.Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy_module, "_PEERS", 1)
    with dial(proxy, hello("server:k")):
        eventually(lambda: proxy.waiting == 1, "the first's wait")
        with dial(proxy) as sock:
            assert reads(sock, 1) == b""
    caplog.clear()


def test_the_server_comes_back_when_the_proxy_was_started_again(
    registry: Registry, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    proxy = rpcnb.Proxy(port=0, silent=True)
    server = serve(host="127.0.0.1", port=proxy.port, key="x", is_proxy=True)
    eventually(lambda: server.registered, "its wait")
    proxy.close()
    eventually(lambda: "not waiting at the proxy" in caplog.text, "the word about it")
    with rpcnb.Proxy(port=proxy.port, port_end=proxy.port + 1, silent=True) as again:
        eventually(lambda: again.waiting == 1, "its return")
        with rpcnb.connect("127.0.0.1", again.port, "x") as session:
            assert session.call("rpc.test.addone", 1) == 2
        server.close()
    caplog.clear()


def test_a_second_server_of_the_same_key_says_so(
    proxy: rpcnb.Proxy, board: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    first = board()
    second = board(waits=False)
    eventually(lambda: "already waiting there" in caplog.text, "the word about it")
    first.close()
    eventually(lambda: proxy.waiting == 1 and second.registered, "the second's turn")
    caplog.clear()


def test_a_proxy_that_lets_no_server_wait_is_not_dialled_without_a_pause(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with rpcnb.Proxy(port=0, timeout_server=0, silent=True) as proxy:
        dialled: list[float] = []

        def admit(*args: Any) -> None:
            dialled.append(time.monotonic())
            proxy._admit(*args)

        proxy._acceptor._admit = admit
        server = serve(host="127.0.0.1", port=proxy.port, key="x", is_proxy=True)
        eventually(lambda: len(dialled) >= 4, "some tries")
        assert dialled[3] - dialled[0] > 0.3
        assert "does not let servers wait" in caplog.text
        server.close()
    caplog.clear()


def test_a_token_is_found_for_ones_own_key_behind_a_proxy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCNB_RUNTIME_DIR", str(tmp_path / "run"))
    entry = {"host": "127.0.0.1", "port": 4711, "pid": os.getpid(), "token": "mine"}
    publish(4711, {**entry, "key": "mine", "proxy": "127.0.0.1:4711"})
    assert find_token("127.0.0.1", 4711, "mine") == "mine"
    assert find_token("127.0.0.1", 4711, "another's") is None
    assert find_token("127.0.0.1", 4711) is None
    assert find_token("127.0.0.1", 4712, "mine") is None


# -- with a tracker ------------------------------------------------------------------------------------------------


def test_a_tracker_hands_out_who_waits_at_a_proxy(
    registry: Registry, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    registry.register("add", lambda a, b: a + b)
    with (
        rpcnb.Tracker(port=0, silent=True) as tracker,
        rpcnb.Proxy(port=0, tracker_addr=tracker.address_pair, silent=True) as proxy,
    ):
        servers = [serve(host="127.0.0.1", port=proxy.port, key="x", is_proxy=True) for _ in range(2)]
        session = rpcnb.connect_tracker(tracker.address)
        eventually(lambda: session.summary()["queue_info"].get("x", {}).get("free") == 2, "both servers")
        (info,) = session.summary()["server_info"]
        assert info["key"] == "server:proxy[x]"
        for _ in range(3):
            with session.request("x") as one, session.request("x") as two:
                assert one.call("add", 1, 2) == two.call("add", 2, 1) == 3
        with pytest.raises(rpcnb.KeyMismatch):
            rpcnb.connect("127.0.0.1", proxy.port, "x")
        for server in servers:
            server.close()
        eventually(lambda: proxy.waiting == 0, "their end")
    caplog.clear()


def test_t8_a_tracker_that_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registration, "_CONNECT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as hole:  # accepts, and never answers
        with rpcnb.Proxy(port=0, tracker_addr=hole.getsockname()[:2], silent=True) as proxy:
            eventually(lambda: "not in the list" in caplog.text, "the word about it")
            with dial(proxy, hello("server:k")), dial(proxy, hello("client:k")) as client:
                assert reads(client, 4) == MISMATCH, "answered at once"
        with hole.accept()[0] as heard:
            assert GREETING in heard.recv(10)
    caplog.clear()


def test_keys_of_strangers_do_not_take_a_proxy_out_of_the_list(
    registry: Registry, serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    registry.register("add", lambda a, b: a + b)
    with (
        rpcnb.Tracker(port=0, silent=True) as tracker,
        rpcnb.Proxy(port=0, tracker_addr=tracker.address_pair, silent=True) as proxy,
    ):
        board = serve(host="127.0.0.1", port=proxy.port, key="x", is_proxy=True)
        eventually(lambda: board.registered and proxy.waiting, "the server's wait")
        with dial(proxy, hello(f"server:{'k' * 2000}")) as refused:
            assert reads(refused, 1) == b""
        with contextlib.ExitStack() as stack:
            for number in range(20):
                stack.enter_context(dial(proxy, hello(f"server:{number}{'k' * 800}")))
            eventually(lambda: proxy.waiting == 21, "their wait")
            eventually(lambda: len(tracker.tracking.summary()["queue_info"]) == 21, "their place in the list")
            assert proxy._registration is not None
            assert proxy._registration.connected

            def says_that_there_are_more() -> bool:
                (info,) = tracker.tracking.summary()["server_info"]
                return bool(info["key"].endswith("...]"))

            eventually(says_that_there_are_more, "its own word")
            with rpcnb.connect(f"tracker://{tracker.address}/x") as session:
                assert session.call("add", 1, 2) == 3
        board.close()
    assert [record.getMessage().split(": ", 2)[2] for record in caplog.records] == [
        f"expected a key that a tracker lists, got {'k' * 40!r}"
    ]
    caplog.clear()


def test_of_too_many_that_shake_hands_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "_HALF_OPEN", 2)
    with rpcnb.Proxy(port=0, silent=True) as proxy, dial(proxy) as first, dial(proxy) as second, dial(proxy) as third:
        assert reads(first, 1) == b""
        for sock, role in ((second, "server"), (third, "client")):
            sock.sendall(hello(f"{role}:k"))
        assert reads(third, len(hello("server:k"))) == hello("server:k")


def test_one_address_may_shake_so_many_hands_at_once(
    proxy: rpcnb.Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy._half_open, "_exempt_loopback", False)
    monkeypatch.setattr(proxy._half_open, "_per_address", 1)
    with dial(proxy), dial(proxy) as second:
        assert reads(second, 1) == b""
    assert [record.getMessage() for record in caplog.records] == [
        "proxy: refused 127.0.0.1: too many unfinished handshakes"
    ]
    caplog.clear()
