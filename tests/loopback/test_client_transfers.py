"""Transfers: bytes counted, progress, cancel, over a link that is slow enough to see them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import events
from rpcnb.client.transfers import Transfer
from rpcnb.link.iothread import IO_THREAD
from rpcnb.transport.shaper import Shaper

Serve = Callable[..., Any]
SIZE = 6 << 20  # 0.3 s at 20 MB/s


@pytest.fixture
def slow(serve: Serve) -> Iterator[rpcnb.Session]:
    """A session over a link of 20 MB/s."""
    server = serve()
    loop = server.io_loop.asyncio_loop
    shaper = Shaper(("127.0.0.1", server.port), 20e6, 0.001)
    asyncio.run_coroutine_threadsafe(shaper.start("127.0.0.1", 0), loop).result(10)
    with rpcnb.connect("127.0.0.1", shaper.port) as session:
        yield session
    loop.call_soon_threadsafe(shaper.close)


class Reports:
    """What a progress callback was told."""

    def __init__(self) -> None:
        self.moved: list[int] = []
        self.rates: list[float] = []
        self.in_io_thread: set[bool] = set()

    def __call__(self, transfer: Transfer) -> None:
        self.moved.append(transfer.moved)
        self.rates.append(transfer.rate)
        self.in_io_thread.add(IO_THREAD.is_current())


@pytest.mark.parametrize("direction", ["up", "down"])
def test_m8_progress_is_monotone_and_ends_at_the_total(slow: Any, direction: str) -> None:
    data = np.random.default_rng(0).integers(0, 255, SIZE, np.uint8)
    tensor = slow.empty((SIZE,), "uint8") if direction == "up" else slow.array(data)
    reports = Reports()
    operation, args = (tensor.copyfrom, (data,)) if direction == "up" else (tensor.numpy, ())
    transfer = slow.submit(operation, *args, progress=reports)
    assert isinstance(transfer, Transfer)
    assert (transfer.direction, transfer.total, transfer.what) == (direction, SIZE, f"({SIZE},) uint8")
    eventually(lambda: transfer.state in ("copying", "done"))
    result = transfer.result(timeout=30)
    assert result is tensor if direction == "up" else np.array_equal(result, data)
    eventually(lambda: reports.moved and reports.moved[-1] == SIZE)
    assert reports.moved == sorted(reports.moved)
    assert len(reports.moved) <= 20
    assert reports.in_io_thread == {True}
    assert transfer.moved == SIZE
    assert max(reports.rates) > 1e6
    assert "done" in repr(transfer)


def test_a_cancelled_transfer_leaves_the_session_usable(slow: Any) -> None:
    data = np.ones(SIZE, np.uint8)
    tensor = slow.empty((SIZE,), "uint8")
    transfer = slow.submit(tensor.copyfrom, data)
    eventually(lambda: transfer.moved > 0)
    assert transfer.seconds_left is None or transfer.seconds_left >= 0
    assert transfer.cancel()
    assert transfer.cancelled()
    assert transfer.state == "draining"
    with pytest.raises(CancelledError):
        transfer.result()
    assert not tensor.defined
    assert slow.state == "draining"
    assert slow.call("rpc.test.addone", 1) == 2
    np.testing.assert_array_equal(tensor.copyfrom(data).numpy(), data)
    assert tensor.defined


def test_files_are_transfers_too(slow: Any, tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(SIZE)
    (tmp_path / "file.bin").write_bytes(content)
    up = slow.submit(slow.upload, tmp_path / "file.bin")
    assert (up.direction, up.what, up.total) == ("up", "file.bin", SIZE)
    eventually(lambda: up.moved > 0)
    up.result(timeout=30)
    down = slow.submit(slow.download, "file.bin")
    assert (down.direction, down.what, down.total) == ("down", "file.bin", 0)
    assert down.result(timeout=30) == content
    assert down.moved > SIZE * 0.98  # a file's size is not known before it is there
    small = slow.submit(slow.upload, b"abc", "small")
    assert (small.what, small.total) == ("small", 3)
    small.result(timeout=30)
    with pytest.raises(FileNotFoundError):
        slow.submit(slow.upload, tmp_path / "missing").result(timeout=30)


def finished(seen: list[events.Event]) -> events.TransferFinished:
    """Wait for the end of a transfer to be told."""
    eventually(lambda: any(isinstance(event, events.TransferFinished) for event in seen))
    return next(event for event in seen if isinstance(event, events.TransferFinished))


def test_transfers_are_told_to_observers(slow: Any) -> None:
    seen: list[events.Event] = []
    slow.observers.subscribe(seen.append)
    slow.submit(slow.array, np.ones(SIZE, np.uint8)).result(timeout=30)
    last = finished(seen)
    kinds = [type(event) for event in seen]
    assert kinds.count(events.TransferStarted) == 1
    assert events.TransferProgress in kinds
    assert (last.moved, last.total, last.error) == (SIZE, SIZE, "")


def test_a_failed_transfer_says_why(slow: Any) -> None:
    seen: list[events.Event] = []
    slow.observers.subscribe(seen.append)
    transfer = slow.submit(slow.download, "nothing")
    with pytest.raises(rpcnb.RemoteError, match="nothing"):
        transfer.result(timeout=30)
    assert "nothing" in finished(seen).error
    assert transfer.state == "failed"
