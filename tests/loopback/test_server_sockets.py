"""The server over sockets: who runs where, parking, limits, the end of everything."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from rawpeer import INIT, VOID, RawClient, packet
from tornado.ioloop import IOLoop

import rpcnb
from rpcnb import errors
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import CallFunc, Shutdown, Syscall
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


def test_functions_run_where_they_were_told(serve: Serve, registry: Registry) -> None:
    def where() -> str:
        return threading.current_thread().name

    async def where_async() -> str:
        return threading.current_thread().name

    registry.register("plain", where)
    registry.register("loop", where, run="loop")
    registry.register("coroutine", where_async)
    registry.register("callback", lambda done: done(where()), callback=True)
    server = serve()
    with rpcnb.connect(server.address) as session:
        for _ in range(3):
            assert session.call("plain").startswith("rpcnb-worker")
            assert session.call("loop") == "rpcnb-server"
            assert session.call("coroutine") == "rpcnb-server"
            assert session.call("callback") == "rpcnb-server"
    with rpcnb.connect(serve(run="loop").address) as session:
        assert session.call("plain") == "rpcnb-server"


def test_a_slow_function_delays_nobody_else(serve: Serve, registry: Registry) -> None:
    release = threading.Event()
    registry.register("slow", lambda: release.wait(20))
    registry.register("quick", lambda x: x)
    server = serve()
    with rpcnb.connect(server.address) as one, rpcnb.connect(server.address) as other:
        thread = threading.Thread(target=one.get_function("slow"))
        thread.start()
        eventually(lambda: one.state == "busy")
        quick = other.get_function("quick")
        slowest = 0.0
        for number in range(50):
            start = time.monotonic()
            assert quick(number) == number
            slowest = max(slowest, time.monotonic() - start)
        with rpcnb.connect(server.address) as third:
            assert third.array(np.arange(10)).numpy()[9] == 9
        assert slowest < 1
        release.set()
        thread.join(10)


def test_async_functions_of_many_sessions_run_at_once(serve: Serve, registry: Registry) -> None:
    waiting = 0
    everybody = asyncio.Event()

    async def meet() -> int:
        nonlocal waiting
        waiting += 1
        if waiting == 8:
            everybody.set()
        await everybody.wait()  # only if all eight are in here
        return waiting

    registry.register("meet", meet)
    server = serve()

    async def one() -> int:
        async with await rpcnb.connect_async(server.address) as session:
            result: int = await session.call("meet", timeout=10)
            return result

    async def main() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(8)))

    assert asyncio.run(main()) == [8] * 8


@pytest.mark.parametrize("goodbye", ["shutdown", "close", "reset", "half close"])
def test_the_end_of_the_stream_while_parked_cancels_and_releases(
    serve: Serve, registry: Registry, goodbye: str
) -> None:
    events: list[str] = []

    async def wait() -> None:
        events.append("started")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    registry.register("wait", wait)
    server = serve()
    client = RawClient((server.host, server.port))
    client.start()
    (connection,) = server._connections
    table = connection.servant.session.table
    client.send(packet(Syscall(Code.GET_GLOBAL_FUNC, ("wait",))))
    handle = int.from_bytes(client.packet()[12:], "little")
    client.send(packet(CallFunc(handle)))
    eventually(lambda: events == ["started"])
    start = time.monotonic()
    if goodbye == "shutdown":
        client.send(packet(Shutdown()))
    elif goodbye == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    elif goodbye == "half close":
        client.sock.shutdown(socket.SHUT_WR)
    if goodbye != "half close":
        client.close()
    eventually(lambda: events == ["started", "cancelled"], "the cancellation", 5)
    eventually(lambda: server.sessions == 0 and not server._connections, "the end of the session", 5)
    assert time.monotonic() - start < 2
    assert len(table) == 0
    client.close()


def test_callback_functions_see_that_nobody_waits(serve: Serve, registry: Registry) -> None:
    kept: list[Any] = []
    registry.register("keep", lambda done: kept.append(done), callback=True)
    server = serve()
    session = rpcnb.connect(server.address)
    with pytest.raises(errors.DeadlineExceeded):
        session.call("keep", timeout=0.05)
    eventually(lambda: kept)
    assert not kept[0].cancelled
    session.close()
    eventually(lambda: kept[0].cancelled, "done.cancelled", 2)
    kept[0](5)
    kept[0].error("late")
    eventually(lambda: server.sessions == 0, "the end of the session")


def test_callback_functions_answer_once_from_any_thread(serve: Serve, registry: Registry) -> None:
    def start(done: Any, x: int) -> None:
        def finish() -> None:
            done(x)
            done(x + 1)
            done.error("never")

        threading.Thread(target=finish).start()

    def fail(done: Any) -> None:
        done.error(KeyError("mine"))
        done(1)

    registry.register("start", start, callback=True)
    registry.register("fail", fail, callback=True)
    with rpcnb.connect(serve().address) as session:
        for number in range(50):
            assert session.call("start", number) == number
        with pytest.raises(errors.RemoteError, match="mine") as caught:
            session.call("fail")
        assert caught.value.remote_type == "KeyError"


@pytest.mark.parametrize("busy", ["idle", "parked", "running"])
def test_the_session_time_limit_says_so_at_a_packet_boundary(serve: Serve, registry: Registry, busy: str) -> None:
    async def parked() -> None:
        await asyncio.sleep(60)

    release = threading.Event()
    registry.register("parked", parked)
    registry.register("running", lambda: release.wait(10))
    server = serve()
    with rpcnb.connect(server.address, session_timeout=0.3) as session:
        assert session.call("rpc.test.addone", 1) == 2
        start = time.monotonic()
        if busy == "idle":
            eventually(lambda: server.sessions == 0, "the end of the session", 3)
            with pytest.raises(errors.SessionTimeout, match=r"0\.3s session has expired"):
                session.call("rpc.test.addone", 1)
        else:
            with pytest.raises(errors.SessionTimeout):
                session.call(busy)
        assert time.monotonic() - start < 3
        assert session.timed_out
        release.set()
    eventually(lambda: server.sessions == 0, "the end of the session", 3)


def test_the_session_time_limit_in_the_midst_of_big_replies_is_clean(serve: Serve, registry: Registry) -> None:
    registry.register("blob", lambda: bytes(8 << 20))
    with rpcnb.connect(serve().address, session_timeout=0.4) as session:
        blob = session.get_function("blob")

        def for_ever() -> None:
            while True:
                assert len(blob()) == 8 << 20

        with pytest.raises(errors.SessionTimeout):
            for_ever()


def test_sessions_beyond_their_number_are_refused(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(max_sessions=2)
    refused = pytest.raises(errors.RemoteError, match=r"server is full: max_sessions=2 are open; try again later")
    with rpcnb.connect(server.address), rpcnb.connect(server.address), refused:
        rpcnb.connect(server.address)
    eventually(lambda: server.sessions == 0)
    rpcnb.connect(server.address).close()
    assert "max_sessions=2 are open" in caplog.text
    caplog.clear()


def test_close_is_idempotent_and_does_not_wait_for_a_running_function(serve: Serve, registry: Registry) -> None:
    release = threading.Event()
    registry.register("running", lambda: release.wait(20))
    server = serve()
    with rpcnb.connect(server.address) as session:
        outcomes: list[BaseException] = []

        def call() -> None:
            try:
                session.call("running")
            except Exception as error:
                outcomes.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        eventually(lambda: session.state == "busy")
        eventually(lambda: next(iter(server._connections)).servant.running, "the call")
        start = time.monotonic()
        server.close()
        assert time.monotonic() - start < 5
        server.close()
        server.terminate()
        assert server.closed
        assert "closed" in repr(server)
        thread.join(5)
        assert isinstance(outcomes[0], errors.SessionLost)
        release.set()


def test_close_ends_parked_and_idle_sessions(serve: Serve, registry: Registry) -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    registry.register("wait", wait)
    server = serve()
    with rpcnb.connect(server.address) as idle, rpcnb.connect(server.address) as parked:
        with pytest.raises(errors.DeadlineExceeded):
            parked.call("wait", timeout=0.05)
        server.close()
        assert cancelled.wait(2)
        for session in (idle, parked):
            with pytest.raises(errors.SessionLost):
                session.call("wait", timeout=5)
    with pytest.raises(errors.ConnectFailed):
        rpcnb.connect(server.address)


def test_a_server_lives_on_a_loop_that_is_there(registry: Registry) -> None:
    registry.register("plain", lambda x: x)

    async def where() -> str:
        return threading.current_thread().name

    registry.register("where", where)

    async def main() -> None:
        with rpcnb.Server(port=0, silent=True, registry=registry, loop=IOLoop.current()) as server:
            async with await rpcnb.connect_async(server.address) as session:
                assert await session.call("plain", 5) == 5
                assert await session.call("where") == threading.current_thread().name
                assert (await (await session.array(np.arange(5))).numpy()).tolist() == [0, 1, 2, 3, 4]

                def from_a_thread() -> int:
                    with rpcnb.connect(server.address) as other:
                        result: int = other.call("plain", 6)
                        return result

                assert await asyncio.to_thread(from_a_thread) == 6
        await asyncio.sleep(0)

    asyncio.run(main())


@pytest.fixture(scope="session")
def _lasting_loop() -> None:
    """The process's loop for coroutines of servers without one lasts, with its sockets."""
    from rpcnb.runtime.tasks import _background_loop

    _background_loop()


@pytest.mark.usefixtures("_lasting_loop")
def test_serve_blocking_serves_one_session_in_the_callers_thread(registry: Registry) -> None:
    from rpcnb.runtime.environment import Environment

    async def later(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    registry.register("echo", lambda x: x)
    registry.register("later", later)
    registry.register("thread", lambda: threading.current_thread().name)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = threading.Thread(
            target=rpcnb.serve_blocking, args=(theirs, Environment(registry=registry)), name="blocking"
        )
        server.start()
        client = RawClient.__new__(RawClient)
        client.sock = ours
        ours.settimeout(10)
        client.send(INIT)
        assert client.packet() == VOID[8:]
        for name, args, result in (("echo", (5,), 5), ("later", (6,), 6)):
            client.send(packet(Syscall(Code.GET_GLOBAL_FUNC, (name,))))
            handle = int.from_bytes(client.packet()[12:], "little")
            client.send(packet(CallFunc(handle, args)) * 3)
            for _ in range(3):
                assert client.packet()[-8:] == result.to_bytes(8, "little")
        client.send(packet(Syscall(Code.GET_GLOBAL_FUNC, ("thread",))))
        client.send(packet(CallFunc(int.from_bytes(client.packet()[12:], "little"))))
        assert b"blocking" in client.packet()
        client.send(packet(Shutdown()))
        server.join(5)
        assert not server.is_alive()


def test_serve_blocking_ends_with_the_stream_and_refuses_a_cut_packet(registry: Registry) -> None:
    for data, raised in ((INIT, []), (INIT + INIT[:9], [errors.RemoteProtocolError])):
        outcomes: list[type] = []
        ours, theirs = socket.socketpair()

        def run(sock: socket.socket = theirs, outcomes: list[type] = outcomes) -> None:
            try:
                rpcnb.serve_blocking(sock)
            except Exception as error:
                outcomes.append(type(error))

        with ours, theirs:
            server = threading.Thread(target=run)
            server.start()
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
            server.join(5)
            assert not server.is_alive()
        assert outcomes == raised


def test_hooks_are_called_for_every_session(serve: Serve, registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    registry.register("tvm.rpc.server.start", lambda: calls.append("start"))
    registry.register("tvm.rpc.server.shutdown", lambda: calls.append("shutdown"))
    server = serve()
    for _ in range(2):
        rpcnb.connect(server.address).close()
        eventually(lambda: server.sessions == 0)
    eventually(lambda: calls == ["start", "shutdown"] * 2)
    registry.register("tvm.rpc.server.start", lambda: 1 / 0, override=True)
    with rpcnb.connect(server.address) as session:
        assert session.call("rpc.test.addone", 1) == 2
    assert "hook tvm.rpc.server.start failed" in caplog.text
    caplog.clear()


def test_the_next_port_of_the_range_is_taken(serve: Serve) -> None:
    first = serve()
    second = serve(port=first.port, port_end=first.port + 20)
    assert first.port < second.port < first.port + 20
    with pytest.raises(OSError, match="no free port"):
        serve(port=first.port, port_end=first.port + 1)


def test_errors_carry_type_and_traceback(serve: Serve, registry: Registry) -> None:
    class BoardError(Exception):
        pass

    def inner() -> None:
        raise BoardError("overheated \u2014 100 \u00b0C")

    async def later() -> None:
        inner()

    registry.register("plain", lambda: inner())
    registry.register("later", later)
    with rpcnb.connect(serve().address) as session:
        for name in ("plain", "later"):
            with pytest.raises(errors.RemoteError) as caught:
                session.call(name)
            error = caught.value
            assert error.remote_type == "BoardError"
            assert error.message == "overheated \u2014 100 \u00b0C"
            assert "in inner" in error.remote_traceback
            assert "rpcnb/runtime/" not in error.remote_traceback
            assert str(error).startswith("BoardError: overheated")
        with pytest.raises(errors.RemoteError):
            session.call("plain", "too", "many")


@pytest.mark.parametrize(
    "text", ["", "a", "seven77", "eight888", "nul\0inside", "\0", "\u00e4\u2603\U0001f600", "x" * 70_000, "\0" * 70_000]
)
def test_text_comes_back_as_it_went(serve: Serve, registry: Registry, text: str) -> None:
    registry.register("echo", lambda x: x)
    with rpcnb.connect(serve().address) as session:
        assert session.fn.echo(text) == text
        assert session.fn.echo(text.encode()) == text.encode()


@pytest.mark.parametrize("value", [None, True, False, 0, -1, 2**63 - 1, -(2**63), 0.5, float("inf"), b"", b"\0"])
def test_scalars_come_back_as_they_went(serve: Serve, registry: Registry, value: object) -> None:
    registry.register("echo", lambda x: x)
    with rpcnb.connect(serve().address) as session:
        got = session.fn.echo(value)
        assert got == value
        assert type(got) is type(value)


def test_what_cannot_travel_is_refused_before_sending(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda *args: args[0])
    registry.register("big", lambda: 1 << 70)
    registry.register("surrogate", lambda: "\ud800")
    with rpcnb.connect(serve().address) as session:
        echo = session.get_function("echo")
        for value in (object(), [1], {}, 1 << 64, "\ud800", lambda: 1, 1j):
            with pytest.raises(errors.ArgumentError) as caught:
                echo(1, value)
            assert caught.value.index == 1
            assert session.state == "ready"
        for name in ("big", "surrogate"):
            with pytest.raises(errors.RemoteError) as remote:
                session.call(name)
            assert remote.value.remote_type == "ResultError"
        assert echo(5) == 5


def test_names_are_listed_and_close_ones_suggested(serve: Serve, registry: Registry) -> None:
    for name in ("demo.add", "demo.mul", "other"):
        registry.register(name, lambda *args: len(args))
    with rpcnb.connect(serve().address) as session:
        names = session.list_functions()
        assert {"demo.add", "demo.mul", "other", "rpc.test.addone"} <= set(names)
        assert names == sorted(names)
        assert session.fn.demo.add(1, 2) == 2
        assert {"add", "mul"} <= set(dir(session.fn.demo))
        with pytest.raises(errors.FunctionNotFound, match=r"did you mean 'demo\.add'") as caught:
            session.get_function("demo.ad")
        assert isinstance(caught.value, AttributeError)
        with pytest.raises(errors.FunctionNotFound):
            session.fn.demo.nothing()
        with pytest.raises(AttributeError):
            _ = session.fn.__wrapped__

    async def main(address: str) -> None:
        async with await rpcnb.connect_async(address) as session:
            assert await session.list_functions() == names
            assert await session.fn.demo.add(1, 2) == 2
            with pytest.raises(errors.FunctionNotFound, match=r"did you mean 'demo\.add'"):
                await session.get_function("demo.ad")

    asyncio.run(main(serve().address))


def test_functions_and_modules_are_results_and_arguments(serve: Serve, registry: Registry) -> None:
    registry.register("adder", lambda x: lambda y: x + y)
    registry.register("apply", lambda function, x: function(x))
    registry.register("module", lambda: rpcnb.Module({"double": lambda x: 2 * x, "main": lambda: "main"}))
    with rpcnb.connect(serve().address) as session:
        add5 = session.fn.adder(5)
        assert add5(2) == 7
        assert session.fn.apply(add5, 10) == 15
        module, child = session.fn.module(), session.fn.module()
        assert module["double"](4) == 8
        assert module() == "main"
        module.import_module(child)
        with pytest.raises(errors.FunctionNotFound):
            module.get_function("nothing")
        assert module.time_evaluator("double", session.cpu(), number=3, repeat=2)(4).results
        assert len(session.time_evaluator("apply", session.cpu(), number=2)(add5, 1).results) == 1


def test_a_local_session_is_a_session() -> None:
    rpcnb.register_func("test.local_add", lambda a, b: a + b, override=True)
    try:
        with rpcnb.LocalSession() as session:
            assert session.fn.test.local_add(1, 2) == 3
            np.testing.assert_array_equal(session.array(np.arange(10)).numpy(), np.arange(10))
            session.upload(b"x", "f")
            assert session.download("f") == b"x"
            with pytest.raises(errors.RemoteError):
                session.call("rpc.test.except", "text")
            with pytest.raises(errors.FunctionNotFound):
                session.get_function("test.local_ad")
            rpcnb.register_func("test.local_sleep", time.sleep, override=True)
            with pytest.raises(errors.DeadlineExceeded):
                session.call("test.local_sleep", 0.1, timeout=0.02)
            assert session.fn.test.local_add(3, 4) == 7
        assert session.state == "closed"
        with pytest.raises(errors.SessionClosed):
            session.fn.test.local_add(1, 2)
    finally:
        rpcnb.remove_global_func("test.local_add")
        rpcnb.remove_global_func("test.local_sleep")


def test_subclasses_of_the_serving_session_serve(serve: Serve, registry: Registry) -> None:
    def later(method: Callable[..., object], *args: Any) -> None:
        threading.Timer(0.01, method, args).start()

    class SlowDevice(LocalServingSession):
        is_async = True

        def async_call(self, handle: int, args: Any, done: Any) -> None:
            later(super().async_call, handle, args, done)

        def async_copy_to(self, data: Any, meta: Any, nbytes: int, done: Any) -> None:
            later(super().async_copy_to, data, meta, nbytes, done)

        def async_copy_from(self, meta: Any, into: Any, nbytes: int, done: Any) -> None:
            later(super().async_copy_from, meta, into, nbytes, done)

        def async_stream_wait(self, device: Any, stream: int, done: Any) -> None:
            later(super().async_stream_wait, device, stream, done)

    registry.register("echo", lambda x: x)
    server = serve(session=SlowDevice)
    local = np.arange(100_000)
    with rpcnb.connect(server.address) as session:
        assert session.fn.echo(3) == 3
        tensor = session.array(local)
        np.testing.assert_array_equal(tensor.numpy(), local)
        session.cpu().sync()
        with pytest.raises(errors.RemoteError):
            session.call("rpc.test.except", "x")


@pytest.mark.parametrize("run", ["thread", "loop"])
@pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit])
def test_whatever_a_function_raises_is_its_own_failure(
    serve: Any, registry: Any, run: Any, kind: type[BaseException]
) -> None:
    def fail() -> None:
        raise kind("mine")

    registry.register("server.fail_oddly", fail, run=run)
    with rpcnb.connect(serve().address) as session:
        function = session.get_function("server.fail_oddly")
        for _ in range(2):
            with pytest.raises(rpcnb.errors.RemoteError, match="mine"):
                function(timeout=5)


def test_a_coroutine_that_raises_an_interrupt_leaves_the_loop_running(serve: Any, registry: Any) -> None:
    async def fail() -> None:
        raise KeyboardInterrupt

    registry.register("server.fail_oddly", fail)
    with rpcnb.connect(serve().address) as session:
        for _ in range(2):
            with pytest.raises(rpcnb.errors.RemoteError, match="KeyboardInterrupt"):
                session.call("server.fail_oddly", timeout=5)


def test_a_session_keeps_to_one_thread_where_tvms_runtime_keeps_state_by_thread(
    serve: Serve, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpcnb.server.connection.keeps_state_by_thread", lambda: True)
    registry.register("thread", threading.get_ident)
    server = serve()
    with rpcnb.connect(server.address) as one, rpcnb.connect(server.address) as other:
        seen: dict[str, set[int]] = {"one": set(), "other": set()}
        for _ in range(5):
            for name, session in (("one", one), ("other", other)):
                seen[name].add(session.call("thread"))
                session.array(np.zeros(16)).numpy()
            time.sleep(0.01)  # more than the time for which a worker waits for the next call
        assert [len(threads) for threads in seen.values()] == [1, 1]
        assert not seen["one"] & seen["other"]
    eventually(lambda: not any(thread.name.startswith("rpcnb-session") for thread in threading.enumerate()))
