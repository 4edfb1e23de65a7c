"""Forked children: they use connections of their own or are told, and leave everything of the parent's alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # that is what is tested (3.12+)


def in_child(work: Callable[[], object]) -> Any:
    """Return what ``work`` returns, or the name of what it raises, in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = json.dumps(work())
        except BaseException as error:
            said = json.dumps([type(error).__name__, str(error)])
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        found = json.loads(file.read())
    assert os.waitpid(child, 0)[1] == 0
    return found


@pytest.fixture
def registry() -> Registry:
    found = Registry()
    found.register("echo", lambda x: x)

    async def later(x: Any, seconds: float = 0.0) -> Any:
        await asyncio.sleep(seconds)
        return x

    found.register("later", later)
    return found


def test_a_child_calls_over_a_connection_of_its_own(serve: Serve, registry: Registry) -> None:
    server = serve(registry=registry)
    with rpcnb.connect(server.address) as session:
        echo = session.get_function("echo")
        assert in_child(lambda: [echo(1), session.call("echo", 2), session.fn.echo(3), echo.submit(4).result(5)]) == [
            *range(1, 5)
        ]
        assert in_child(lambda: [echo.map([1, 2]), session.submit(echo.map, [3]).result(5)]) == [[1, 2], [3]]
        assert in_child(lambda: [session.get_function("later")(5), session.array([6.0]).numpy().tolist()]) == [5, [6.0]]
        eventually(lambda: server.sessions == 1, "the end of the children's sessions")
        assert echo(7) == 7


def test_what_is_the_parents_is_refused_in_a_child(serve: Serve, registry: Registry) -> None:
    server = serve(registry=registry)
    with rpcnb.connect(server.address) as session:
        tensor, module = session.array(np.ones(3)), session.system_lib()
        pending = session.get_function("later").submit(1, 60.0)
        for use in (tensor.numpy, lambda: tensor.copyfrom(np.zeros(3)), lambda: module.get_function("f")):
            name, text = in_child(use)
            assert name == "StaleHandle"
            assert "before this process was forked; get it anew" in text
        eventually(lambda: pending.state == "running")
        name, text = in_child(lambda: pending.result(5))
        assert (name, "goes on in the parent" in text) == ("ForkedSession", True)
        assert pending.state == "running"
        assert pending.cancel()
        assert tensor.numpy().tolist() == [1, 1, 1]


def test_a_session_with_this_process_is_refused_in_a_child() -> None:
    with rpcnb.LocalSession() as session:
        name, text = in_child(lambda: session.list_functions(timeout=5))
        assert name == "ForkedSession"
        assert "open a session in the child (rpcnb.connect)" in text
        assert session.list_functions()


def test_an_awaited_session_is_refused_in_a_child(serve: Serve, registry: Registry) -> None:
    server = serve(registry=registry)

    async def use() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            echo = await session.get_function("echo")

            def work() -> Any:
                try:
                    session._link.send(None)
                except errors.ForkedSession:
                    return "ForkedSession"
                return "sent"

            assert in_child(work) == "ForkedSession"
            assert await echo(1) == 1

    asyncio.run(use())


@pytest.mark.parametrize("end", ["close", "exit", "del"])
def test_the_end_of_a_child_leaves_the_parents_session_alone(serve: Serve, registry: Registry, end: str) -> None:
    server = serve(registry=registry)
    code = f"""
import os, sys, rpcnb
session = rpcnb.connect({server.address!r})
echo, tensor = session.get_function("echo"), session.array([1.0, 2.0])
child = os.fork()
if not child:
    if {end!r} == "close":
        session.close()
        os._exit(0)
    if {end!r} == "del":
        del session, echo, tensor
    sys.exit(0)  # with everything that runs at an exit
assert os.waitpid(child, 0)[1] == 0
assert echo(1) == 1 and tensor.numpy().tolist() == [1, 2]
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_that_hold_locks_at_a_fork_do_not_hang_the_child(serve: Serve, registry: Registry) -> None:
    server = serve(registry=registry)
    with rpcnb.connect(server.address) as session:
        echo, stop = session.get_function("echo"), threading.Event()

        def work() -> None:
            while not stop.is_set():
                assert [one.result() for one in [echo.submit(i) for i in range(20)]] == [*range(20)]

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            assert [in_child(lambda: echo(7, timeout=10)) for _ in range(10)] == [7] * 10
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_children_that_functions_fork_leave_the_server_alone(tmp_path: Path) -> None:
    ready, functions = tmp_path / "ready.json", tmp_path / "functions.py"
    functions.write_text(
        """
import multiprocessing, os, signal, sys, time
import rpcnb

@rpcnb.register_func("killed")
def killed():
    reader, writer = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: (os.write(writer, b"."), time.sleep(20)))
    child.start()
    os.read(reader, 1)  # CPython forgets a signal that comes before a child has begun, where it has a handler
    child.terminate()
    child.join()
    return child.exitcode

@rpcnb.register_func("exits")
def exits(code):
    child = os.fork()
    if not child:
        sys.exit(code)  # comes out of the function, in a copy of this server
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

@rpcnb.register_func("returns")
def returns():
    child = os.fork()
    if not child:
        return "from the child"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

@rpcnb.register_func("waits")
async def waits():
    child = os.fork()
    if not child:
        return "from the child"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    )
    command = [sys.executable, "-W", "ignore", "-m", "rpcnb", "serve", "--no-token", "--port", "0", "--silent"]
    server = subprocess.Popen([*command, "--load", str(functions), "--ready-file", str(ready)])
    try:
        eventually(ready.exists, "the server", 30)
        address = f"127.0.0.1:{json.loads(ready.read_text())['port']}"
        with rpcnb.connect(address) as session, rpcnb.connect(address) as other:
            assert session.call("killed", timeout=20) == -signal.SIGTERM
            assert session.call("exits", 3, timeout=20) == 3
            assert session.call("returns", timeout=20) == 0
            assert session.call("waits", timeout=20) == 0
            assert other.call("rpc.test.addone", 1, timeout=20) == 2
        with rpcnb.connect(address) as third:
            assert third.call("rpc.test.addone", 2) == 3
    finally:
        server.terminate()
        assert server.wait(10) == 0
