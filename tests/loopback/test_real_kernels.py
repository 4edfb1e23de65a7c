"""Real Jupyter kernels without a front end: the server in one, output, restarts, magics, no widgets (robustness N)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest
from conftest import eventually
from kernels import Cell, Kernel

import rpcnb

Serve = Callable[..., Any]

LOAD = "%load_ext rpcnb\nimport asyncio, time, rpcnb"
FUNCTIONS = """\
@rpcnb.register_func("my.add")
def add(a, b):
    return a + b

@rpcnb.register_func("my.kernel", run="kernel")
def in_kernel(a):
    import threading
    return a if threading.current_thread() is threading.main_thread() else None

@rpcnb.register_func("my.later")
async def later(a):
    await asyncio.sleep(0.01)
    return a

stops = []

@rpcnb.register_func("my.stop", run="thread")
def stop():
    stops.append(1)
"""


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with Kernel() as made:
        good(made.run(LOAD))
        yield made


@pytest.fixture
def served(kernel: Kernel) -> Iterator[Kernel]:
    good(kernel.run(FUNCTIONS))
    yield kernel
    good(kernel.run("%rpc_serve --stop"))


def good(cell: Cell) -> Cell:
    """Expect a cell to raise nothing and to write nothing to the standard error."""
    assert not cell.error, cell.trace
    assert cell.err == ""
    return cell


def begin(kernel: Kernel, source: str) -> Cell:
    """Start a cell that prints ``begun``, and wait until it has."""
    cell = kernel.start(source)
    cell.wait_until(lambda: "begun" in cell.out, "its beginning")
    return cell


def serve_in(kernel: Kernel, options: str = "") -> tuple[str, str]:
    """Start its server; returns address and token."""
    cell = good(kernel.run(f"server = %rpc_serve {options}\n(server.address, server.token)"))
    address, token = re.findall(r"'([^']+)'", cell.text)
    return address, token


# -- N1, N2: the server in the kernel ------------------------------------------------------------------------------

# Cells that last until `my.stop` is called.
BLOCKED = "print('begun')\nwhile not stops: time.sleep(0.02)"
STATES = {
    "idle": "",
    "await": "print('begun')\nwhile not stops: await asyncio.sleep(0.02)",
    "blocked": BLOCKED,
    "blocked after an await": f"await asyncio.sleep(0)\n{BLOCKED}",
    "computing": "print('begun')\nwhile not stops: sum(range(1000))",
}


@pytest.mark.parametrize("state", STATES)
def test_n1_a_kernels_server_answers(served: Kernel, state: str) -> None:
    address, token = serve_in(served)
    with rpcnb.connect(address, token=token) as session:
        add, later = session.get_function("my.add"), session.get_function("my.later")
        cell = None
        if STATES[state]:
            cell = begin(served, STATES[state])
        times = []
        for number in range(30):
            start = time.perf_counter()
            assert add(number, 1) == number + 1
            times.append(time.perf_counter() - start)
        assert later(5) == 5
        assert session.status()["state"] == "READY"
        # 1 ms idle, 6 ms beside a computing cell; other tests may keep this machine busy
        assert median(times) < 0.1
        session.call("my.stop")
    if cell is not None:
        good(cell.wait())


def test_n1_a_kernels_server_says_that_a_cell_keeps_the_kernel_busy(served: Kernel) -> None:
    address, token = serve_in(served, "--run kernel")
    with rpcnb.connect(address, token=token) as session:
        assert session.call("my.kernel", 3) == 3, "functions run in the kernel's main thread"
        assert session.status()["state"] == "READY"
        cell = begin(served, STATES["await"])
        assert session.call("my.kernel", 4) == 4, "also while a cell awaits"
        assert session.status()["state"] == "READY"
        session.call("my.stop")
        good(cell.wait())
        good(served.run("stops.clear()"))
        cell = begin(served, BLOCKED)
        start = time.monotonic()
        eventually(lambda: session.status()["state"] == "BUSY", "the word BUSY")
        assert time.monotonic() - start < 1
        waits = session.get_function("my.kernel").submit(5)
        with rpcnb.connect(address, token=token) as other:  # the first one's connection keeps the order
            assert other.status()["kernel_busy"] > 0
            other.call("my.stop")
        good(cell.wait())
        assert waits.result(10) == 5
        eventually(lambda: session.status()["state"] == "READY", "the word READY")


def test_n2_a_cell_calls_its_own_kernels_server(served: Kernel) -> None:
    serve_in(served)
    good(served.run("session = rpcnb.connect(server.address)"))
    own = good(served.run("session.call('my.add', 1, 2), session.call('my.later', 4)"))
    assert own.text == "(3, 4)"
    refused = served.run("session.call('my.kernel', 1)")
    assert refused.error == "DeadlockError"
    assert "await" in refused.trace
    assert good(served.run("await session.submit(session.call, 'my.kernel', 7)")).text == "7"
    assert good(served.run("session.call('my.add', 1, 2)")).text == "3"
    good(served.run("session.close()"))
