"""Fixtures for all tests: nothing may leak, and nothing unexpected may be logged."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_core.utils import ensure_event_loop

import rpcnb
from rpcnb.runtime.registry import Registry
from rpcnb.runtime.tasks import _background_loop

# Threads of the process itself, not of a test: one I/O thread, one loop for sessions without a server, TVM's pool.
LASTING_THREADS = ("rpcnb-io", "rpcnb-tasks", "rpcnb-parallel", "pytest_timeout", "rpcnb-progress")


@pytest.fixture(scope="session", autouse=True)
def _lasting_things(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make what lasts as long as the process before any test is watched for leaks."""
    _background_loop()
    ensure_event_loop()  # on which jupyter_client's blocking methods run
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with SIG_IGN
    os.environ["RPCNB_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime") / "rpcnb")
    os.environ["RPCNB_CONFIG_DIR"] = str(tmp_path_factory.mktemp("config") / "rpcnb")


def eventually(condition: Callable[[], object], what: str = "the condition", seconds: float = 10.0) -> None:
    """Wait for a condition; fail naming it."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not come about within {seconds} s"
        time.sleep(0.002)


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.name.startswith(LASTING_THREADS)}


def _sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test its threads, sockets and child processes are gone; browser tests share theirs."""
    if request.node.get_closest_marker("browser"):
        yield
        return
    threads, sockets = _threads(), _sockets()
    children = set(psutil.Process().children())
    yield
    if not (_threads() - threads) and not (_sockets() - sockets):
        return
    gc.collect()
    eventually(lambda: not (_threads() - threads), "the end of the test's threads", 5)
    eventually(lambda: not (_sockets() - sockets), "the end of the test's sockets", 5)
    assert not set(psutil.Process().children()) - children


@pytest.fixture(autouse=True)
def _quiet_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No warning or error in the log, unless the test has looked at it with ``caplog.clear()``."""
    caplog.set_level(logging.WARNING)
    yield
    unexpected = [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
    assert not unexpected, [record.getMessage() for record in unexpected]


@pytest.fixture
def registry() -> Registry:
    """A registry of its own for the test's functions."""
    return Registry()


@pytest.fixture
def serve(registry: Registry) -> Iterator[Callable[..., Any]]:
    """Start servers on free loopback ports; they are closed after the test."""
    servers: list[Any] = []

    def start(**options: Any) -> Any:
        options = {"port": 0, "registry": registry, "silent": True, **options}
        server = rpcnb.Server(**options)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def shell() -> Iterator[Any]:
    """A real IPython shell with the magics, without a front end."""
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.clear_instance()  # a bare one, perhaps, of earlier tests' remote cells
    made = InteractiveShell.instance()
    made.run_line_magic("load_ext", "rpcnb")
    yield made
    made.run_line_magic("unload_ext", "rpcnb")
    if made.history_manager is not None:
        made.history_manager.end_session()
    InteractiveShell.clear_instance()


@pytest.fixture
def vectors() -> Path:
    """The folder of bytes recorded from stock TVM."""
    return Path(__file__).parent / "vectors"
