"""Functions on the event loop in which the server was made, accepting without descriptors, interrupted look-ups."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import eventually

import rpcnb
from rpcnb.errors import DeadlockError
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


def test_run_kernel_runs_on_the_loop_in_which_the_server_was_made(registry: Registry) -> None:
    registry.register("where", lambda: threading.current_thread() is threading.main_thread(), run="kernel")
    registry.register("plain", lambda: threading.current_thread() is threading.main_thread())

    async def main() -> list[bool]:
        server = rpcnb.Server(port=0, registry=registry, silent=True)
        try:
            async with await rpcnb.connect_async(server.address) as session:
                return [await session.call(name) for name in ("where", "plain", "where", "plain", "where")]
        finally:
            server.close()

    assert asyncio.run(main()) == [True, False, True, False, True]


WAYS: dict[str, Callable[[rpcnb.Session], object]] = {
    "call": lambda session: session.get_function("where")(),
    "call with a time limit": lambda session: session.get_function("where")(timeout=20),
    "call by name": lambda session: session.call("where"),
    "submitted": lambda session: session.get_function("where").submit().result(),
    "submitted by name": lambda session: session.submit(session.call, "where").result(),
    "map": lambda session: session.get_function("where").map([]) or session.get_function("echo").map([1, 2]),
    "behind one": lambda session: (session.get_function("where").submit(), session.call("plain"))[1],
    "on a tensor in use": lambda session: _use_twice(session, session.empty((4,))),
}


def _use_twice(session: rpcnb.Session, tensor: Any) -> Any:
    session.get_function("echo").submit(tensor)
    return tensor.numpy()


@pytest.mark.parametrize("way", WAYS)
def test_n2_waiting_for_ones_own_loop_is_refused(registry: Registry, way: str) -> None:
    ran: list[int] = []
    registry.register("where", lambda: ran.append(1), run="kernel")
    registry.register("echo", lambda x: x, run="kernel")
    registry.register("plain", lambda: 3)

    async def main() -> None:
        with rpcnb.Server(port=0, registry=registry, silent=True) as server, rpcnb.connect(server.address) as session:
            where, plain = session.get_function("where"), session.get_function("plain")
            start = time.monotonic()
            with pytest.raises(DeadlockError, match="await"):
                WAYS[way](session)
            assert time.monotonic() - start < 5
            for pending in session.pending:  # a submitted one goes on
                pending.cancel()
            held_up = [one.servant for one in server._connections if one.waits_for_kernel(None)]
            eventually(lambda: all(one is not None and one.cancelled for one in held_up), "the cancelling")
            assert await where.submit() is None
            assert await plain.submit() == 3
            assert len(ran) == 1, "what was given up has not run"

    asyncio.run(main())


def test_n2_waiting_for_something_else_is_not_refused(registry: Registry) -> None:
    async def slowly() -> int:
        await asyncio.sleep(0.7)
        return 7

    registry.register("where", lambda: threading.current_thread() is threading.main_thread(), run="kernel")
    registry.register("slowly", slowly)
    registry.register("slow", lambda: time.sleep(0.7))

    async def main() -> None:
        with (
            rpcnb.Server(port=0, registry=registry, silent=True) as server,
            rpcnb.connect(server.address) as session,
            rpcnb.connect(server.address) as other,
        ):
            slowly = session.get_function("slowly")
            where = session.get_function("where").submit()
            assert slowly.submit().result() == 7, "it is on another lane"
            assert other.call("slow") is None
            assert await where

    asyncio.run(main())


def test_run_kernel_without_a_loop_is_a_worker(serve: Serve, registry: Registry) -> None:
    registry.register("where", lambda: threading.current_thread().name, run="kernel")
    with rpcnb.connect(serve().address) as session:
        assert session.call("where") == "rpcnb-worker"


def test_s15_a_server_without_descriptors_waits_and_goes_on() -> None:
    script = """
        import resource, socket, rpcnb, time
        server = rpcnb.Server(port=0, silent=True)
        session = rpcnb.connect(server.address)
        addone = session.get_function("rpc.test.addone")
        soft = len(__import__("os").listdir("/proc/self/fd")) + 12
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        held = []
        try:
            while True:
                held.append(socket.create_connection((server.host, server.port)))
        except OSError:
            pass
        assert addone(1) == 2
        start = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start < 0.3, "it spins"
        for sock in held:
            sock.close()
        give_up = time.monotonic() + 10
        while True:
            try:
                with rpcnb.connect(server.address) as other:
                    assert other.call("rpc.test.addone", 2) == 3
                break
            except (rpcnb.errors.RpcError, OSError):
                assert time.monotonic() < give_up
                time.sleep(0.05)
        session.close()
        server.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("phase", ["resolve", "connect"])
def test_c6_interrupt_while_resolving_and_connecting(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    filling: list[socket.socket] = []
    if phase == "resolve":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: release.wait(20) and [])
        host = "some.host"
    else:
        host = "127.0.0.1"
        for _ in range(4):  # a full backlog lets further connections wait
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            filling.append(sock)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            rpcnb.connect(host, listener.getsockname()[1], timeout=20)
    finally:
        release.set()
        timer.join()
        for sock in (*filling, listener):
            sock.close()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "rpcnb-resolve"])
