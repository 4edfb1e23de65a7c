"""Going on to another server through ``rpc.Connect``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]
PREFIX = "RPCError: Error caught from RPC call:\n"


@pytest.fixture
def chain(serve: Serve, registry: Registry) -> Iterator[tuple[Any, Any, Any]]:
    """Three servers; only the last one has functions of its own."""
    registry.register("echo", lambda x: x)
    registry.register("make", lambda count: np.arange(count))
    registry.register("fail", lambda text: (_ for _ in ()).throw(ValueError(text)))
    registry.register("thing", lambda: [1])
    registry.register("adder", lambda x: lambda y: x + y)

    async def wait(seconds: float) -> None:
        await asyncio.sleep(seconds)

    registry.register("wait", wait)
    last, middle, first = serve(), serve(registry=Registry()), serve(registry=Registry())
    yield first, middle, last
    eventually(lambda: not (first.sessions or middle.sessions or last.sessions), "the end of all onward sessions")


def through(*servers: Any) -> list[Any]:
    """Constructor arguments that lead through these servers."""
    args: list[Any] = []
    for server in servers:
        args += ["rpc.Connect", server.host, server.port, server.key, False]
    return args


@pytest.mark.parametrize("hops", [1, 2])
def test_everything_works_through_hops(chain: tuple[Any, Any, Any], hops: int) -> None:
    first, middle, last = chain
    args = through(last) if hops == 1 else through(middle, last)
    local = np.random.default_rng(2).random(300_000)
    with rpcnb.connect(first.address, session_constructor_args=args) as session:
        assert session.fn.echo("text") == "text"
        assert session.call("echo", 1 << 40) == 1 << 40
        tensor = session.array(local)
        np.testing.assert_array_equal(tensor.numpy(), local)
        np.testing.assert_array_equal(session.fn.make(50).numpy(), np.arange(50))
        assert session.fn.adder(3)(4) == 7
        part = tensor.view((10,), byte_offset=80)
        np.testing.assert_array_equal(part.numpy(), local[10:20])
        session.upload(b"over there", "file")
        assert session.download("file") == b"over there"
        assert session.cpu().attribute("exist") is True
        session.cpu().sync()
        with pytest.raises(errors.FunctionNotFound):
            session.get_function("nothing")
        (connection,) = last._connections
        table = connection.servant.session.table
        held = len(table)
        del tensor, part
        eventually(lambda: len(table) < held, "the frees at the last server")


@pytest.mark.parametrize("hops", [0, 1, 2])
def test_errors_get_one_prefix_per_hop(chain: tuple[Any, Any, Any], hops: int) -> None:
    first, middle, last = chain
    address = last.address if hops == 0 else first.address
    args = [None, through(last), through(middle, last)][hops]
    with rpcnb.connect(address, session_constructor_args=args) as session:
        with pytest.raises(errors.RemoteError) as caught:
            session.fn.fail("the text")
        assert caught.value.message.count(PREFIX) == hops
        assert caught.value.message.endswith("the text")
        assert session.fn.echo(1) == 1


def test_the_onward_session_ends_with_the_outer_one(chain: tuple[Any, Any, Any]) -> None:
    first, _, last = chain
    session = rpcnb.connect(first.address, session_constructor_args=through(last))
    assert (first.sessions, last.sessions) == (1, 1)
    session.close()
    eventually(lambda: last.sessions == 0, "the end of the onward session", 3)


def test_the_outer_client_learns_that_the_onward_server_is_gone(chain: tuple[Any, Any, Any]) -> None:
    first, _, last = chain
    with rpcnb.connect(first.address, session_constructor_args=through(last)) as session:
        wait = session.get_function("wait")
        timer = threading.Timer(0.1, last.close)
        timer.start()
        with pytest.raises((errors.RemoteError, errors.SessionLost)):
            wait(30.0, timeout=5)
        timer.join()
        with pytest.raises((errors.RemoteError, errors.SessionLost)):
            session.call("echo", 1, timeout=5)


def test_a_hop_to_nowhere_is_a_remote_error(chain: tuple[Any, Any, Any]) -> None:
    first, _, last = chain
    with pytest.raises(errors.RemoteError, match="cannot connect to"):
        rpcnb.connect(first.address, session_constructor_args=["rpc.Connect", "127.0.0.1", 1, "", False])
    with pytest.raises(errors.RemoteError):
        rpcnb.connect(first.address, session_constructor_args=["rpc.Connect", last.host, last.port, "wrong", False])


@pytest.fixture(autouse=True)
def _expected_refusal(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    if all("wrong key or token" in record.getMessage() for record in caplog.get_records("call")):
        caplog.get_records("call").clear()


def test_slow_calls_through_a_hop_delay_nobody_else(chain: tuple[Any, Any, Any]) -> None:
    first, _, last = chain

    async def main() -> None:
        async with (
            await rpcnb.connect_async(first.address, session_constructor_args=through(last)) as one,
            await rpcnb.connect_async(first.address, session_constructor_args=through(last)) as other,
        ):
            slow = asyncio.create_task(one.call("wait", 0.5))
            echo = await other.get_function("echo")
            for number in range(20):
                assert await echo(number) == number
            assert not slow.done()
            await slow

    asyncio.run(main())


def test_closing_while_parked_at_the_last_server_releases_all(chain: tuple[Any, Any, Any]) -> None:
    first, middle, last = chain
    session = rpcnb.connect(first.address, session_constructor_args=through(middle, last))
    with pytest.raises(errors.DeadlineExceeded):
        session.call("wait", 30.0, timeout=0.1)
    session.close()
    eventually(lambda: not (first.sessions or middle.sessions or last.sessions), "the end of all sessions", 3)
