"""Tuning with TVM's runner on our farm: hooks, cache flush, candidates that crash or hang, boards that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import eventually

import rpcnb

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(120)]


def tune(*args: Any) -> Any:
    import tuning_flows

    return tuning_flows.tune(*args)


def tracker_of_environment(*args: Any) -> Any:
    import tuning_flows

    return tuning_flows.tracker_of_environment(*args)


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[tuple[rpcnb.Tracker, list[subprocess.Popen[bytes]]]]:
    """A tracker with two boards, and one that is killed soon."""
    boards: list[subprocess.Popen[bytes]] = []
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        for _ in range(2):
            command = [sys.executable, "-m", "rpcnb", "serve", "--port", "0", "--key", "tune", "--silent"]
            command += ["--tracker", tracker.address, "--trust-tracker"]
            log = (tmp_path / f"board-{len(boards)}.log").open("wb")
            boards.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TVM_NUM_THREADS": "2"}))
            log.close()
        session = rpcnb.connect_tracker(tracker.address)
        eventually(lambda: session.summary()["queue_info"].get("tune", {}).get("free") == 2, "both boards", 30)
        yield tracker, boards
        for board in boards:
            board.terminate()
            board.wait(10)


def test_a_tuning_goes_on_past_what_crashes_or_hangs(farm: Any, stock: Peer, tmp_path: Path) -> None:
    tracker, _ = farm
    found = stock.run(tune, tracker.port, str(tmp_path), seconds=100)
    assert [found[0], found[2], found[4]] == ["ok"] * 3
    assert "ok" not in (found[1], found[3])


def test_a_tuning_goes_on_without_a_board_that_was_killed(farm: Any, stock: Peer, tmp_path: Path) -> None:
    tracker, boards = farm
    boards[1].kill()
    found = stock.run(tune, tracker.port, str(tmp_path), seconds=100)
    assert [found[0], found[2], found[4]] == ["ok"] * 3


def test_the_tracker_is_found_in_the_environment(farm: Any, stock: Peer) -> None:
    tracker, _ = farm
    host, _, port = tracker.address.partition(":")
    assert stock.run(tracker_of_environment, host, int(port)) == 2
