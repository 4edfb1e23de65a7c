"""Sessions over sockets: many, shared, dropped, cut, killed; nothing leaks and nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from rawpeer import CuttingRelay, FakeServer, read_exactly, shake_and_init, slowly

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


def table_of(server: Any) -> Any:
    """The handle table of the server's only session."""
    (connection,) = (one for one in server._connections if not one.lane)
    return connection.servant.session.table


def test_c1_sequential_sessions_leave_nothing(serve: Serve, registry: Registry) -> None:
    registry.register("list", lambda: [1, 2])
    server = serve()

    def one() -> None:
        with rpcnb.connect(server.address) as session:
            tensor = session.array(np.arange(16))
            assert session.fn.rpc.test.addone(1) == 2
            thing = session.fn.list()
            assert tensor.numpy()[3] == 3
            del thing

    for _ in range(5):
        one()
    eventually(lambda: server.sessions == 0, "no session left")
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    tables = []
    for _ in range(150):
        with rpcnb.connect(server.address) as session:
            tables.append(table_of(server) if len(server._connections) == 1 else None)
            session.array(np.arange(16)).numpy()
        one()
    eventually(lambda: server.sessions == 0 and not server._connections, "no session left")
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "no descriptor left")
    eventually(lambda: threading.active_count() <= threads + 1, "no thread left")
    assert not any(tables)  # an empty table is false; None where two sessions overlapped


def test_c2_concurrent_sessions_from_threads(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)
    server = serve()
    barrier = threading.Barrier(30)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            with rpcnb.connect(server.address) as session:
                barrier.wait(30)
                echo = session.get_function("echo")
                for index in range(20):
                    got = echo(number * 1000 + index)
                    if got != number * 1000 + index:
                        wrong.append(got)
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not wrong
    eventually(lambda: server.sessions == 0, "no session left")


def test_c2_concurrent_awaited_sessions(serve: Serve, registry: Registry) -> None:
    async def later(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    registry.register("later", later)
    registry.register("plain", lambda x: x)
    server = serve()

    async def one(number: int) -> None:
        async with await rpcnb.connect_async(server.address) as session:
            functions = [await session.get_function("later"), await session.get_function("plain")]
            for index in range(20):
                assert await functions[index % 2](number * 1000 + index) == number * 1000 + index

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(60)))

    asyncio.run(main())
    eventually(lambda: server.sessions == 0, "no session left")


@pytest.fixture
def relay(serve: Serve, registry: Registry) -> Iterator[CuttingRelay]:
    registry.register("echo", lambda x: x)
    server = serve()
    made = CuttingRelay((server.host, server.port))
    yield made
    made.close()
    eventually(lambda: server.sessions == 0, "no session left")


def conversation(address: str) -> None:
    with rpcnb.connect(address, timeout=5) as session:
        echo = session.get_function("echo")
        assert echo("text", timeout=5) == "text"
        tensor = session.array(np.arange(20000), timeout=5)
        assert tensor.numpy(timeout=5)[-1] == 19999
        session.upload(bytes(100_000), "file", timeout=5)
        assert len(session.download("file", timeout=5)) == 100_000


@pytest.mark.parametrize("upward", [True, False], ids=["up", "down"])
def test_c3_a_connection_cut_at_any_byte_is_a_typed_error_at_once(
    relay: CuttingRelay, upward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    conversation(relay.address)
    eventually(lambda: relay.down > 0 and relay.up > 0)
    total = relay.up if upward else relay.down
    random = np.random.default_rng(5)
    early = range(0, 400, 9)
    cuts = [*early, *sorted(int(cut) for cut in random.integers(400, total - 40, 30))]
    for cut in cuts:
        relay.up_limit, relay.down_limit = (cut, None) if upward else (None, cut)
        relay.cut_at = 0.0
        with pytest.raises((errors.ConnectFailed, errors.SessionLost, errors.RemoteProtocolError)) as caught:
            conversation(relay.address)
        late = time.monotonic() - relay.cut_at
        assert relay.cut_at == 0.0 or late < 1, (cut, late)
        assert not isinstance(caught.value, errors.DeadlineExceeded)
        assert str(caught.value)
    caplog.clear()


def test_c3_pending_calls_of_all_threads_learn_that_the_session_is_lost(relay: CuttingRelay) -> None:
    relay.down_limit = 1000
    outcomes: list[BaseException] = []
    with rpcnb.connect(relay.address) as session:
        echo = session.get_function("echo")

        def work() -> None:
            try:
                while True:
                    echo("x" * 50, timeout=10)
            except Exception as error:
                outcomes.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(outcomes) == 4
        assert all(isinstance(error, errors.SessionLost) for error in outcomes), outcomes
        assert session.state == "lost"
        assert session.ended_by is not None
        with pytest.raises(errors.SessionLost):
            echo("x")


def test_c3_awaited_calls_learn_that_the_session_is_lost(relay: CuttingRelay) -> None:
    relay.down_limit = 1000

    async def main() -> None:
        async with await rpcnb.connect_async(relay.address) as session:
            echo = await session.get_function("echo")

            async def work() -> None:
                while True:
                    await echo("x" * 50)

            outcomes = await asyncio.wait_for(asyncio.gather(*(work() for _ in range(4)), return_exceptions=True), 10)
            assert all(isinstance(error, errors.SessionLost) for error in outcomes)
            assert session.state == "lost"

    asyncio.run(main())


SERVER_PROGRAM = """
import sys, time, rpcnb
rpcnb.register_func("sleep", time.sleep)
server = rpcnb.Server(port=0, silent=True)
print(server.address, flush=True)
sys.stdin.read()
"""


def test_c3_a_killed_server_is_session_lost_for_what_is_pending_and_old_handles() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER_PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        with rpcnb.connect(child.stdout.readline().strip()) as session:
            sleep = session.get_function("sleep")
            tensor = session.array(np.arange(4))
            timer = threading.Timer(0.1, child.send_signal, (signal.SIGKILL,))
            timer.start()
            start = time.monotonic()
            with pytest.raises(errors.SessionLost):
                sleep(20.0)
            assert time.monotonic() - start < 2
            timer.join()
            for use in (lambda: sleep(0.0), tensor.numpy, lambda: session.get_function("sleep")):
                with pytest.raises(errors.SessionLost):
                    use()
            assert session.state == "lost"
            assert "lost" in repr(session)
    finally:
        child.kill()
        child.communicate()


def test_c8_replies_after_a_deadline_are_dropped_and_the_next_calls_are_right(serve: Serve, registry: Registry) -> None:
    registry.register("slow", lambda x: slowly(0.03, x))
    with rpcnb.connect(serve().address) as session:
        slow = session.get_function("slow")
        for number in range(10):
            with pytest.raises(errors.DeadlineExceeded) as caught:
                slow(number, timeout=0.005)
            assert caught.value.operation == "slow"
            assert slow(number + 100) == number + 100
        for number in range(20):
            with pytest.raises(errors.DeadlineExceeded):
                slow(number, timeout=0.0001)
        assert session.state == "draining"
        assert slow(7) == 7
        assert session.state == "ready"
        session.timeout = 0.005
        with pytest.raises(TimeoutError):
            slow(1)
        session.timeout = None
        assert slow(8) == 8


def test_c8_awaited_timeouts_and_cancellations_leave_the_session_right(serve: Serve, registry: Registry) -> None:
    registry.register("slow", lambda x: slowly(0.03, x))
    server = serve()

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            slow = await session.get_function("slow")
            for number in range(5):
                with pytest.raises(errors.DeadlineExceeded):
                    await slow(number, timeout=0.005)
                task = asyncio.create_task(slow(number))
                await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await slow(number + 100) == number + 100
            tasks = [asyncio.create_task(slow(number)) for number in range(10)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert done[1::2] == [1, 3, 5, 7, 9]
            assert all(isinstance(error, asyncio.CancelledError) for error in done[::2])
            for size in (1 << 20, 16 << 20):
                task = asyncio.create_task(session.array(np.zeros(size, np.uint8)))
                await asyncio.sleep(0.002)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert await slow(5) == 5
            assert session.state == "ready"

    asyncio.run(main())


@pytest.mark.parametrize("awaited", [False, True])
def test_c8_a_copy_out_of_time_does_not_write_the_users_array_any_more(serve: Serve, awaited: bool) -> None:
    server = serve()
    local = np.full(32 << 20, 7, np.uint8)
    with rpcnb.connect(server.address) as session:
        tensor = session.array(local)
        out = np.zeros_like(local)
        try:
            tensor.numpy(out, timeout=0.001)
        except errors.DeadlineExceeded:
            out[:] = 3
            assert session.call("rpc.test.addone", 1) == 2
            assert (out == 3).all()
        try:
            tensor.copyfrom(np.zeros_like(local), timeout=0.0005)
        except errors.DeadlineExceeded:
            assert not tensor.defined or (tensor.numpy() == 7).all()  # or its time was over before it began
        assert session.call("rpc.test.addone", 1) == 2
        tensor.copyfrom(local)
        assert tensor.defined
        assert (tensor.numpy() == 7).all()


def test_an_allocation_out_of_time_leaks_no_handle(serve: Serve, registry: Registry) -> None:
    registry.register("make", lambda: slowly(0.01, np.zeros(3)))
    registry.register("thing", lambda: slowly(0.01, [1]))
    server = serve()
    with rpcnb.connect(server.address) as session:
        make, thing = session.get_function("make"), session.get_function("thing")
        table = table_of(server)
        for function in (make, thing):
            for _ in range(10):
                with pytest.raises(errors.DeadlineExceeded):
                    function(timeout=0.002)
        for _ in range(20):
            with contextlib.suppress(errors.DeadlineExceeded):
                session.empty((4,), timeout=0.00005)
            with contextlib.suppress(errors.DeadlineExceeded):
                session.get_function("make", timeout=0.00005)
        gc.collect()
        session.call("rpc.test.addone", 1)

        def left() -> int:  # besides the control lane's own
            return sum(not getattr(one.thing, "name", "").startswith("rpcnb.") for one in list(table._entries.values()))

        eventually(lambda: left() == 3, "only the three functions' handles left")
        assert make().numpy().shape == (3,)


def test_threads_share_one_session(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)
    server = serve()
    wrong: list[object] = []
    with rpcnb.connect(server.address) as session:
        echo = session.get_function("echo")

        def work(number: int) -> None:
            try:
                for index in range(100):
                    value: Any = number * 1000 + index if index % 3 else f"{number}.{index}"
                    if echo(value) != value:
                        wrong.append(value)
                    if index % 10 == 0:
                        array = np.full(1000 + number, index)
                        if (session.array(array).numpy() != array).any():
                            wrong.append(array)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
        assert not wrong
        assert session.state == "ready"


def test_a_dropped_session_is_closed_at_the_server(serve: Serve) -> None:
    server = serve()
    session: Any = rpcnb.connect(server.address)
    tensor: Any = session.array(np.arange(3))
    eventually(lambda: server.sessions == 1)
    del session
    gc.collect()
    assert tensor.numpy().tolist() == [0, 1, 2]  # a proxy keeps its session
    del tensor
    gc.collect()
    eventually(lambda: server.sessions == 0, "the end of the dropped session", 3)


def test_frees_of_finalizers_reach_the_server_soon(serve: Serve) -> None:
    server = serve()
    with rpcnb.connect(server.address) as session:
        tensors = [session.empty((8,)) for _ in range(50)]
        table = table_of(server)
        assert len(table) == 50
        start = time.monotonic()
        del tensors
        gc.collect()
        eventually(lambda: len(table) == 0, "the frees", 3)
        assert time.monotonic() - start < 2
        assert session.call("rpc.test.addone", 1) == 2


def test_frees_of_finalizers_reach_the_server_of_an_awaited_session_soon(serve: Serve) -> None:
    server = serve()

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            tensors = [await session.empty((8,)) for _ in range(50)]
            table = table_of(server)
            assert len(table) == 50
            tensors.clear()
            gc.collect()
            give_up = time.monotonic() + 3
            while len(table):
                assert time.monotonic() < give_up
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_c10_handles_are_released_once_whatever_happens(serve: Serve) -> None:
    server = serve()
    session = rpcnb.connect(server.address)
    function = session.get_function("rpc.test.addone")
    tensor = session.empty((4,))
    table = table_of(server)
    for _ in range(3):
        function.free()
        tensor.free()
    eventually(lambda: len(table) == 0, "the frees")
    late = session.get_function("rpc.test.addone")
    late_tensor = session.empty((4,))
    session.close()
    session.close()
    late.free()
    late_tensor.free()
    del late, late_tensor
    gc.collect()
    with pytest.raises(errors.SessionClosed):
        session.get_function("rpc.test.addone")
    with pytest.raises(errors.RpcError):
        function(1)
    assert session.state == "closed"


def test_c10_handles_released_by_other_threads_under_load(serve: Serve) -> None:
    server = serve()
    with rpcnb.connect(server.address) as session:
        add = session.get_function("rpc.test.addone")
        table = table_of(server)
        pile: list[Any] = []
        stop = threading.Event()

        def collect() -> None:
            while not stop.is_set():
                while pile:
                    pile.pop()
                stop.wait(0.0005)

        thread = threading.Thread(target=collect)
        thread.start()
        for number in range(300):
            pile.append(session.empty((2,)))
            pile.append(session.get_function("testing.echo"))
            assert add(number) == number + 1
        stop.set()
        thread.join(10)
        pile.clear()
        gc.collect()
        eventually(lambda: len(table) == 1, "the frees", 5)


EXIT_PROGRAM = """
import sys, threading, numpy as np, rpcnb
session = rpcnb.connect(sys.argv[1])
tensor = session.array(np.arange(1000))
function = session.get_function("rpc.test.addone")
cycle = [tensor]
cycle.append(cycle)
{extra}
"""
EXITS = {
    "end": "",
    "sys.exit": "sys.exit(0)",
    "closed": "session.close()",
    "dropped": "del session, tensor, function",
    "draining": "try:\n    session.call('sleep', 0.3, timeout=0.01)\nexcept TimeoutError:\n    pass",
    "in a thread": "threading.Thread(target=session.call, args=('sleep', 0.2)).start()",
    "in a daemon thread": "threading.Thread(target=session.call, args=('sleep', 0.3), daemon=True).start()",
    "own server": "server = rpcnb.Server(port=0, silent=True); other = rpcnb.connect(server.address)\n"
    "other.call('rpc.test.addone', 1)",
    "dropped while the interpreter ends": "class Late:\n    def __init__(self, held): self.held = held\n"
    "    def __del__(self): self.held = None\nlate = Late(rpcnb.connect(sys.argv[1]))",
    "local": "local = rpcnb.LocalSession(); local.call('rpc.test.addone', 1)",
}


@pytest.mark.parametrize("name", EXITS)
def test_c10_an_interpreter_ends_silently(serve: Serve, registry: Registry, name: str) -> None:
    registry.register("sleep", time.sleep)
    server = serve()
    program = textwrap.dedent(EXIT_PROGRAM).format(extra=EXITS[name])
    # A server that its user did not close is worth a ResourceWarning, which Python hides by default.
    strict = [] if name == "own server" else ["-W", "error"]
    done = subprocess.run(
        [sys.executable, *strict, "-c", program, server.address], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    eventually(lambda: server.sessions == 0, "no session left")


def test_a_server_that_goes_silent_leaves_calls_to_their_deadline_and_close_does_not_wait() -> None:
    def script(conn: Any) -> None:
        shake_and_init(conn)
        read_exactly(conn, 1 << 24)

    with FakeServer(script) as fake:
        session = rpcnb.connect(fake.address)
        with pytest.raises(errors.DeadlineExceeded):
            session.get_function("f", timeout=0.1)
        start = time.monotonic()
        session.close()
        assert time.monotonic() - start < 0.5


def test_closing_a_session_ends_the_calls_of_other_threads(serve: Serve, registry: Registry) -> None:
    release = threading.Event()
    registry.register("wait", lambda: release.wait(10))
    server = serve()
    session = rpcnb.connect(server.address)
    wait = session.get_function("wait")
    outcomes: list[BaseException] = []

    def work() -> None:
        try:
            wait()
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(session._link.wire.tickets) == 3)
    session.close()
    for thread in threads:
        thread.join(5)
    release.set()
    assert [type(error) for error in outcomes] == [errors.SessionClosed] * 3


def test_a_session_forked_away_does_not_disturb_its_parent(serve: Serve) -> None:
    program = """
import os, sys, rpcnb
session = rpcnb.connect(sys.argv[1])
assert session.call("rpc.test.addone", 1) == 2
pid = os.fork()
if not pid:
    other = rpcnb.connect(sys.argv[1])
    assert other.call("rpc.test.addone", 2) == 3
    other.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert session.call("rpc.test.addone", 3) == 4
"""
    done = subprocess.run([sys.executable, "-c", program, serve().address], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
