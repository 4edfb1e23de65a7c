"""Ctrl-C in every phase: control comes back at once, the session survives, the next call is right."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from rawpeer import FakeServer, hello, read_exactly, read_hello, shake_and_init, slowly

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """SIGINT from a timer; what is inside must raise within half a second of it."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
        late = time.monotonic() - sent[0]
        assert late < 0.6, late
    finally:
        timer.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def silent(conn: socket.socket) -> None:
    read_exactly(conn, 1 << 20)


def no_init(conn: socket.socket) -> None:
    read_hello(conn)
    conn.sendall(hello("server:"))
    read_exactly(conn, 1 << 20)


@pytest.mark.parametrize("script", [silent, no_init], ids=["handshake", "init"])
def test_c6_interrupt_while_connecting(script: Callable[[socket.socket], None]) -> None:
    with FakeServer(script) as fake, interrupted_after(0.1):
        rpcnb.connect(fake.address)


def test_c6_interrupt_in_a_call_then_the_next_is_right(serve: Serve, registry: Registry) -> None:
    release = threading.Event()
    registry.register("wait", lambda x: release.wait(10) and x)
    registry.register("echo", lambda x: x)
    with rpcnb.connect(serve().address) as session:
        wait, echo = session.get_function("wait"), session.get_function("echo")
        for number in range(3):
            release.clear()
            with interrupted_after(0.05):
                wait(number)
            assert session.state == "draining"
            release.set()
            assert echo(number + 10) == number + 10
            assert session.state == "ready"


def test_c6_what_an_interrupted_call_owes_is_received_in_the_background(serve: Serve, registry: Registry) -> None:
    registry.register("wait", lambda: slowly(0.3, np.zeros(5)))
    server = serve()
    with rpcnb.connect(server.address, lanes=0) as session:
        wait = session.get_function("wait")
        with interrupted_after(0.05):
            wait()
        assert session.state == "draining"
        eventually(lambda: session.state == "ready", "the late reply", 3)
        (connection,) = server._connections
        table = connection.servant.session.table
        eventually(lambda: len(table) == 1, "the release of the late reply's tensor", 3)


class Slow:
    """A server whose client sees a trickle: 64 KiB of payload each 5 ms, in either direction."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, client: socket.socket) -> None:
        with socket.create_connection(self.target) as server:
            for sock in (client, server):
                sock.settimeout(10)
            back = threading.Thread(target=self.copy, args=(server, client))
            back.start()
            self.copy(client, server)
            back.join()

    target: tuple[str, int]
    pace = 0.002

    def copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 15):
                target.sendall(data)
                if len(data) > 4096:
                    time.sleep(self.pace)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def slow(serve: Serve) -> Iterator[tuple[Slow, str, Any]]:
    server = serve()
    script = Slow()
    script.target = (server.host, server.port)
    with FakeServer(script) as fake:
        yield script, fake.address, server


def test_c6_interrupt_in_an_upload_and_a_download(slow: tuple[Slow, str, Any]) -> None:
    script, address, _ = slow
    local = np.random.default_rng(3).integers(0, 255, 24 << 20, np.uint8)
    with rpcnb.connect(address) as session:
        tensor = session.empty(local.shape, "uint8")
        with interrupted_after(0.15):
            tensor.copyfrom(local)
        assert not tensor.defined
        assert "undefined" in repr(tensor)
        assert session.state in ("draining", "ready")
        script.pace = 0.0
        assert session.call("rpc.test.addone", 1) == 2
        tensor.copyfrom(local)
        assert tensor.defined
        script.pace = 0.002
        out = np.zeros_like(local)
        with interrupted_after(0.15):
            tensor.numpy(out)
        out[:] = 9
        script.pace = 0.0
        assert session.call("rpc.test.addone", 2) == 3
        assert (out == 9).all()
        np.testing.assert_array_equal(tensor.numpy(), local)
        assert session.state == "ready"


def test_c6_interrupt_in_a_file_upload_and_download(slow: tuple[Slow, str, Any]) -> None:
    script, address, server = slow
    blob = os.urandom(24 << 20)
    with rpcnb.connect(address) as session:
        with interrupted_after(0.15):
            session.upload(blob, "file")
        script.pace = 0.0
        assert session.call("rpc.test.addone", 1) == 2
        session.upload(blob, "file")
        script.pace = 0.002
        with interrupted_after(0.15):
            session.download("file")
        script.pace = 0.0
        assert session.call("rpc.test.addone", 2) == 3
        assert bytes(session.download("file")) == blob
    eventually(lambda: server.sessions == 0, "no session left")


def test_c6_interrupt_of_one_thread_leaves_the_others_calls(serve: Serve, registry: Registry) -> None:
    registry.register("slow", lambda x: slowly(0.02, x))
    got: list[Any] = []
    with rpcnb.connect(serve().address) as session:
        slow_one = session.get_function("slow")
        stop = threading.Event()

        def work(base: int) -> None:
            number = base
            while not stop.is_set():
                got.append(slow_one(number) == number)
                number += 1

        threads = [threading.Thread(target=work, args=(number * 1000,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for number in range(3):
            with interrupted_after(0.1):
                while True:
                    assert slow_one(number + 50_000) == number + 50_000
            assert slow_one(7) == 7
        before = len(got)
        eventually(lambda: len(got) > before + 6, "the others' calls")
        stop.set()
        for thread in threads:
            thread.join(10)
    assert all(got)


def test_c6_a_storm_of_interrupts_loses_no_byte(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda x: x)
    stop = threading.Event()
    armed = threading.Event()

    def storm() -> None:
        random = np.random.default_rng(1)
        while not stop.is_set():
            if armed.is_set():
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(float(random.random()) * 0.004)

    with rpcnb.connect(serve().address) as session:
        echo = session.get_function("echo")
        blob = os.urandom(200_000)
        thread = threading.Thread(target=storm)
        thread.start()
        interrupts = 0
        try:
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                try:
                    armed.set()
                    for number in range(50):
                        assert echo(number) == number
                        if number % 5 == 0:
                            assert echo(blob) == blob
                except KeyboardInterrupt:  # noqa: PERF203  # each round may be interrupted
                    interrupts += 1
                finally:
                    while True:
                        try:
                            armed.clear()
                            break
                        except KeyboardInterrupt:
                            interrupts += 1
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            while True:
                try:
                    armed.clear()
                    stop.set()
                    thread.join()
                    time.sleep(0.01)  # a signal that is still on its way
                    break
                except KeyboardInterrupt:
                    interrupts += 1
        assert interrupts
        for number in range(20):
            assert echo(number) == number
        eventually(lambda: session.state == "ready", "the end of draining")


def test_c6_foreign_handlers_are_left_alone(serve: Serve, registry: Registry) -> None:
    registry.register("slow", lambda: slowly(0.2, 5))
    hits: list[int] = []
    old = signal.signal(signal.SIGINT, lambda number, frame: hits.append(number))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    try:
        with rpcnb.connect(serve().address) as session:
            slow_one = session.get_function("slow")
            timer.start()
            assert slow_one() == 5
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)
    assert hits == [signal.SIGINT]


def test_c6_interrupt_while_waiting_for_another_threads_pumping(serve: Serve, registry: Registry) -> None:
    release = threading.Event()
    registry.register("wait", lambda x: release.wait(10) and x)
    with rpcnb.connect(serve().address) as session:
        wait = session.get_function("wait")
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(wait(1)))
        thread.start()
        eventually(lambda: session.state == "busy")
        with interrupted_after(0.1):
            wait(2)
        release.set()
        thread.join(10)
        assert got == [1]
        assert wait(3) == 3
        assert session.state == "ready"


def test_c6_interrupted_allocations_leak_nothing(serve: Serve) -> None:
    server = serve()
    with rpcnb.connect(server.address) as session:
        (connection,) = server._connections
        table = connection.servant.session.table
        for _ in range(3):
            with interrupted_after(0.02):
                while True:
                    session.empty((16,))
        gc.collect()
        assert session.call("rpc.test.addone", 1) == 2
        eventually(lambda: len(table) == 1, "the release of everything but one function")


def test_c6_interrupt_in_a_local_session() -> None:
    rpcnb.register_func("test.local_wait", lambda seconds: time.sleep(seconds), override=True)
    try:
        with rpcnb.LocalSession() as session:
            with interrupted_after(0.1):
                session.call("test.local_wait", 0.8)
            assert session.call("rpc.test.addone", 1) == 2
    finally:
        rpcnb.remove_global_func("test.local_wait")


def test_a_session_of_a_server_that_dies_while_draining_is_lost() -> None:
    cut = threading.Event()

    def script(conn: socket.socket) -> None:
        shake_and_init(conn)
        cut.wait(10)

    with FakeServer(script) as fake:
        session = rpcnb.connect(fake.address)
        with interrupted_after(0.05):
            session.get_function("f")
        assert session.state == "draining"
        cut.set()
        eventually(lambda: session.state == "lost", "the loss, seen in the background", 3)
        with pytest.raises(errors.SessionLost):
            session.get_function("f")
        session.close()


@pytest.mark.parametrize("lanes", [3, 0])
def test_c6_random_interrupts_lose_no_byte_at_either_end(lanes: int) -> None:
    """A short run of what ``tests/soak/interrupts.py`` does 5,000 times, in a process of its own."""
    script = Path(__file__).parents[1] / "soak" / "interrupts.py"
    done = subprocess.run(
        [sys.executable, str(script), "150", str(lanes)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "150 interrupts" in done.stdout
