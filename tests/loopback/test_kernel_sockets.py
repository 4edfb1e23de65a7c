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
from collections.abc import Callable
from typing import Any

import pytest
from conftest import eventually

import rpcnb
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
