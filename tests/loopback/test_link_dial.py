"""Connecting: errors say the phase and what was seen, and one time limit covers everything."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import eventually
from rawpeer import FakeServer, hello, read_exactly, read_hello

import rpcnb
from rpcnb import errors
from rpcnb.link import aiolink
from rpcnb.link.dial import ClientKey
from rpcnb.runtime.registry import Registry
from rpcnb.transport.address import parse_address
from rpcnb.transport.deadline import Deadline

Serve = Callable[..., Any]


def connect_sync(address: str, **options: Any) -> None:
    rpcnb.connect(address, **options).close()


def connect_awaited(address: str, **options: Any) -> None:
    async def main() -> None:
        await (await rpcnb.connect_async(address, **options)).close()

    asyncio.run(main())


@pytest.fixture(params=[connect_sync, connect_awaited], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Callable[..., None]:
    found: Callable[..., None] = request.param
    return found


def silent(conn: socket.socket) -> None:
    read_exactly(conn, 1 << 20)


def no_init(conn: socket.socket) -> None:
    read_hello(conn)
    conn.sendall(hello("server:"))
    read_exactly(conn, 1 << 20)


def test_nobody_listens(connect: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(errors.ConnectFailed, match=r"refused.*rpcnb serve.*during connect") as caught:
        connect(address)
    assert (caught.value.phase, caught.value.address) == ("connect", address)
    assert isinstance(caught.value, ConnectionError)


def test_no_such_host(connect: Callable[..., None]) -> None:
    with pytest.raises(errors.ConnectFailed) as caught:
        connect("no-such-host.invalid:9090", timeout=8)
    assert caught.value.phase == "resolve"


def test_something_else_listens(connect: Callable[..., None]) -> None:
    with (
        FakeServer(lambda conn: conn.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as fake,
        pytest.raises(errors.NotAnRpcServer, match="SSH") as caught,
    ):
        connect(fake.address)
    assert caught.value.phase == "handshake"


def test_wrong_key_or_token(serve: Serve, connect: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    server = serve(key="board", token="secret")
    for options in ({"key": "other", "token": "secret"}, {"key": "board", "token": "x"}, {"key": "board"}):
        with pytest.raises(errors.KeyMismatch, match="wrong key or token"):
            connect(server.address, **options)
    connect(f"rpc://{server.address}/board", token="secret")
    connect(server.address, key="board", token="secret")
    eventually(lambda: caplog.records, "the line in the log")
    assert len(caplog.records) == 1, "further ones are summed up"
    caplog.clear()


@pytest.mark.parametrize(("script", "phase"), [(silent, "handshake"), (no_init, "init")])
def test_a_server_that_never_answers_is_explained_within_the_time_limit(
    connect: Callable[..., None], script: Callable[[socket.socket], None], phase: str
) -> None:
    with FakeServer(script) as fake:
        start = time.monotonic()
        with pytest.raises(errors.ConnectFailed, match="stock TVM server does so while it serves another") as caught:
            connect(fake.address, timeout=0.3)
        assert 0.25 < time.monotonic() - start < 2
    assert caught.value.phase == phase


def test_one_limit_covers_all_phases(connect: Callable[..., None]) -> None:
    def slow(conn: socket.socket) -> None:
        read_hello(conn)
        for byte in hello("server:"):
            conn.sendall(bytes([byte]))
            time.sleep(0.05)

    with FakeServer(slow) as fake:
        start = time.monotonic()
        with pytest.raises(errors.ConnectFailed):
            connect(fake.address, timeout=0.4)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("address", ["", ":9090", "host:0", "host:99999", "host:x", "http://host:1", "[::1"])
def test_what_is_no_address_is_a_value_error(connect: Callable[..., None], address: str) -> None:
    with pytest.raises(ValueError, match=r"address|expected"):
        connect(address)


def test_names_and_ipv6_are_addresses(serve: Serve, connect: Callable[..., None]) -> None:
    server = serve()
    connect(f"localhost:{server.port}")
    if socket.has_ipv6:
        try:
            six = serve(host="::1")
        except OSError:
            return
        assert six.address.startswith("[::1]:")
        connect(six.address)


def test_an_unknown_session_constructor_is_a_remote_error(serve: Serve, connect: Callable[..., None]) -> None:
    server = serve()
    with pytest.raises(errors.RemoteError, match=r"Cannot find session constructor no\.Such"):
        connect(server.address, session_constructor_args=["no.Such"])
    connect(server.address)
    eventually(lambda: server.sessions == 0, "no session left")


def test_a_failing_session_constructor_is_a_remote_error(
    serve: Serve, registry: Registry, connect: Callable[..., None]
) -> None:
    def fail(*args: object) -> None:
        raise OSError(f"no board for {args}")

    registry.register("my.Session", fail)
    with pytest.raises(errors.RemoteError, match=r"no board for \(1, 'x'\)"):
        connect(serve().address, session_constructor_args=["my.Session", 1, "x"])


def test_cancelling_an_awaited_connect_leaves_nothing() -> None:
    async def main(address: str) -> None:
        task = asyncio.create_task(rpcnb.connect_async(address))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for script in (silent, no_init):
        with FakeServer(script) as fake:
            asyncio.run(main(fake.address))


@pytest.mark.parametrize("step", ["_upgrade", "_shake_hands"])
def test_what_is_cancelled_before_it_has_begun_leaves_nothing(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    ours, theirs = socket.socketpair()
    begun = []

    async def connect(*_: Any) -> socket.socket:
        return ours

    async def cancelled(work: Any, seconds: float | None) -> Any:
        begun.append(work.cr_code.co_name)
        if work.cr_code.co_name != step:
            return await work
        work.close()  # as a task that is cancelled before its first step
        raise asyncio.CancelledError

    monkeypatch.setattr(aiolink, "_connect", connect)
    monkeypatch.setattr(aiolink, "within", cancelled)
    address = parse_address("ws://127.0.0.1:1/ws" if step == "_upgrade" else "127.0.0.1:1")
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(aiolink.dial(address, ClientKey(""), Deadline(10, "connect")))
    assert begun[-1] == step
    assert ours.fileno() == -1
    theirs.close()


def test_extensions_are_recognised_in_the_handshake_only(serve: Serve) -> None:
    server = serve(key="board")
    with rpcnb.connect(server.address, key="board") as session:
        assert session.is_rpcnb
        assert session.server_key == session.key == "board"
    with rpcnb.connect(server.address, key="board", extensions=False) as session:
        assert not session.is_rpcnb
        assert session.call("rpc.test.addone", 1) == 2
        with pytest.raises(errors.RemoteError) as caught:
            session.call("rpc.test.except", "text")
        assert caught.value.remote_type == ""
        assert session.array([1, 2]).numpy().tolist() == [1, 2]


def test_a_name_that_cannot_be_one_is_refused_at_once() -> None:
    with pytest.raises(rpcnb.errors.ConnectFailed, match="not a host name"):
        rpcnb.connect(f"{'a' * 70}.example:9090", timeout=5)


def test_only_real_addresses_are_looked_up_without_a_thread() -> None:
    from rpcnb.link.dial import _is_numeric

    assert [_is_numeric(host) for host in ("127.0.0.1", "::1")] == [True, True]
    assert [_is_numeric(host) for host in ("1.2.3.4.5", "no:host", "board", "")] == [False] * 4
