"""Detached jobs: work that outlives session, notebook and, as a record, the server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from test_server_isolation import TOKEN, connect, start

import rpcnb
from rpcnb.protocol.codes import Limits

__all__ = ["start"]
Start = Callable[..., Any]


@pytest.fixture
def board(start: Start) -> Any:
    return start(allow_exec=True)


@pytest.fixture
def session(board: Any) -> Iterator[Any]:
    with connect(board) as session:
        yield session


def test_a_job_outlives_its_session(board: Any) -> None:
    with connect(board) as session:
        work = session.get_function("b.work")
        job = work.submit(20, np.arange(6.0).reshape(2, 3), detach=True, name="burnin")
        assert job.state == "running"
        assert repr(job) == "<Job burnin: running, b.work>"
    with connect(board) as other:
        job = other.jobs["burnin"]
        shown = io.StringIO()
        job.follow(shown.write)
        assert shown.getvalue() == job.output()
        assert shown.getvalue().splitlines()[:3] == ["step 0", "noted", "from a child"]
        assert (job.result() == np.arange(6.0).reshape(2, 3) * 2).all()
        assert job.files == ["report.txt"]
        assert bytes(job.download("report.txt")) == b"all well"
        assert list(other.jobs) == ["burnin"]
        assert job.facts["state"] == "done"
        job.forget()
        assert len(other.jobs) == 0
        with pytest.raises(KeyError, match="no job 'burnin'"):
            other.jobs["burnin"]


@pytest.mark.parametrize(("name", "args", "result"), [("b.sleep", (0.01,), 0.01), ("b.callback", (2,), 3)])
def test_every_kind_of_function_can_be_a_job(session: Any, name: str, args: Any, result: Any) -> None:
    assert session.jobs.start(name, *args).result(20) == result


def test_a_tensor_is_copied_in(session: Any) -> None:
    tensor = session.array(np.arange(5))
    assert (session.jobs.start(session.get_function("b.work"), 0, tensor).result(20) == np.arange(5) * 2).all()


def test_a_cell_can_be_a_job(session: Any) -> None:
    job = session.jobs.start_cell("import os\nprint('hello')\nos.system('echo child')\n[1, {'a': 2}]", "cell")
    assert job.result(20) == [1, {"a": 2}]
    assert job.output() == "hello\nchild\n"
    assert session.jobs.start_cell("object()").result(20).startswith("<object object")
    wrong = session.jobs.start_cell("1 / 0", "wrong")
    with pytest.raises(rpcnb.RemoteError, match="ZeroDivisionError") as caught:
        wrong.result(20)
    assert "1 / 0" in caught.value.remote_traceback


def test_a_cell_needs_consent(start: Start) -> None:
    with connect(start()) as session:
        job = session.jobs.start_cell("1")
        with pytest.raises(rpcnb.RemoteError, match="--allow-exec"):
            job.result(20)


def test_how_a_job_fails_is_kept(session: Any) -> None:
    job = session.jobs.start("b.fail", "because", name="failed")
    with pytest.raises(rpcnb.RemoteError, match="because") as caught:
        job.result(20)
    assert caught.value.remote_type == "ValueError"
    assert "isolatedboard" in caught.value.remote_traceback
    assert "jobprocess" not in caught.value.remote_traceback
    crashed = session.jobs.start("b.crash", "segfault", name="crashed")
    with pytest.raises(rpcnb.errors.SessionCrashed, match="SIGSEGV"):
        crashed.result(20)
    for args in (("b.nothing",), ("b.add", 1)):
        with pytest.raises(rpcnb.RemoteError):
            session.jobs.start(*args).result(20)
    assert session.call("b.add", 1, 2) == 3


def test_a_job_is_cancelled(session: Any) -> None:
    job = session.jobs.start("b.work", 100000, 1, name="long")
    eventually(lambda: "step 1" in job.output())
    assert job.cancel()
    assert job.state == "cancelled"
    assert not job.cancel()
    with pytest.raises(rpcnb.errors.SessionLost, match="was cancelled"):
        job.result(20)


def test_a_job_that_does_not_listen_is_killed(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpcnb.server.jobs._STOP", 0.2)
    job = session.jobs.start("b.hang", 60.0, name="deaf")
    with pytest.raises(rpcnb.errors.DeadlineExceeded):
        job.result(0.3)
    assert job.cancel()
    assert job.state == "cancelled"


def test_what_cannot_be_a_job_is_refused(session: Any) -> None:
    with pytest.raises(rpcnb.ArgumentError, match="numbers, texts, bytes"):
        session.jobs.start("b.add", object(), 1)
    with pytest.raises(rpcnb.ArgumentError, match="registered function"):
        session.jobs.start(lambda: 1)
    with pytest.raises(rpcnb.RemoteError, match="expected a job's name"):
        session.jobs.start("b.add", 1, 2, name="../up")
    session.jobs.start("b.add", 1, 2, name="once").wait(20)
    with pytest.raises(rpcnb.RemoteError, match=r"already \(done\); forget"):
        session.jobs.start("b.add", 1, 2, name="once")
    running = session.jobs.start("b.sleep", 30.0, name="runs")
    with pytest.raises(rpcnb.RemoteError, match="is running; cancel"):
        running.forget()
    with pytest.raises(rpcnb.RemoteError, match="has no file"):
        session.jobs["once"].download("../job.json")
    running.cancel()


def test_a_server_without_processes_says_so(serve: Callable[..., Any]) -> None:
    with rpcnb.connect(serve().address) as session, pytest.raises(rpcnb.FunctionNotFound, match="--shared-state"):
        list(session.jobs)


def test_a_restart_of_the_server_ends_jobs_with_a_reason(start: Start) -> None:
    board = start()
    with connect(board) as session:
        session.jobs.start("b.add", 1, 2, name="done").wait(20)
        session.jobs.start("b.sleep", 60.0, name="cut")
    board.close()
    with connect(start()) as session:
        with pytest.raises(rpcnb.errors.SessionLost, match="has ended with its server"):
            session.jobs["cut"].result()
        assert session.jobs["done"].result() == 3
    with rpcnb.connect(start(token="another-token").address, token="another-token") as session:
        assert len(session.jobs) == 0, "they belong to the token"


def test_jobs_are_found_after_their_client_was_killed(board: Any) -> None:
    program = textwrap.dedent(f"""
        import os, signal, rpcnb
        session = rpcnb.connect({board.address!r}, token={TOKEN!r})
        session.jobs.start("b.work", 10, 21, name="mine")
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    with connect(board) as session:
        assert session.jobs["mine"].result(20) == 42


def test_what_jobs_keep_is_bounded(start: Start) -> None:
    board = start(limits=Limits(jobs=3, job_output=2000, job_bytes=100_000))
    with connect(board) as session:
        noisy = session.jobs.start("b.work", 400, 1, name="noisy")
        noisy.wait(60)
        text = noisy.output()
        assert 1000 < len(text) < 6000
        assert "bytes are not kept" in text
        assert text.endswith("noted\nfrom a child\n")
        big = session.jobs.start("b.work", 0, np.zeros(100_000), name="big")
        with pytest.raises(rpcnb.RemoteError, match="job_bytes=100000"):
            big.result(20)
        for number in range(4):
            session.jobs.start("b.add", number, 1, name=f"n{number}").wait(20)
        assert list(session.jobs) == ["n1", "n2", "n3"]


def test_a_board_counts_as_taken_until_its_job_ends(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        start(key="rpi", tracker_addr=("127.0.0.1", tracker.port), trust_tracker=True)
        asked = rpcnb.connect_tracker("127.0.0.1", tracker.port)
        with asked.request("rpi") as session:
            session.jobs.start("b.work", 40, 1, name="burnin")
        with asked.request("rpi") as session:
            assert session.jobs["burnin"].facts["state"] == "done"
        asked.close()


def test_a_visitor_looks_after_jobs_alone(start: Start) -> None:
    board = start(max_sessions=1)
    with connect(board) as session:
        session.jobs.start("b.sleep", 60.0, name="burnin")
        assert session.call("b.add", 1, 2) == 3
    with connect(board) as visitor:
        with pytest.raises(rpcnb.RemoteError, match="taken by the job 'burnin'"):
            visitor.call("b.add", 1, 2)
        assert visitor.jobs["burnin"].cancel()
    with connect(board) as session:
        assert session.call("b.add", 1, 2) == 3


def test_an_awaited_session_has_jobs_too(board: Any) -> None:
    async def main() -> None:
        async with await rpcnb.connect_async(board.address, token=TOKEN) as session:
            job = await session.jobs.start("b.work", 2, 4, name="mine")
            assert await job.wait() == "done"
            assert await job.result() == 8
            assert "step 1" in await job.output()
            assert bytes(await job.download("report.txt")) == b"all well"
            assert [one.name for one in await session.jobs.list()] == ["mine"]
            cell = await session.jobs.start_cell("import time; time.sleep(60)", "cell")
            assert await cell.cancel()
            assert (await cell.refresh())["state"] == "cancelled"
            await job.forget()
            with pytest.raises(KeyError):
                await session.jobs.get("mine")

    asyncio.run(main())


def test_many_questions_at_once(session: Any) -> None:
    job = session.jobs.start("b.work", 30, 1, name="asked")
    wrong: list[BaseException] = []

    def ask() -> None:
        with contextlib.suppress(StopIteration):
            try:
                job.follow(lambda text: None)
                assert session.jobs["asked"].result(20) == 2
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_jobs_lie_where_the_operator_says(session: Any, tmp_path: Path) -> None:
    session.jobs.start("b.add", 1, 2, name="here").wait(20)
    (found,) = (tmp_path / "state" / "jobs").glob("*/here/job.json")
    assert os.stat(found.parent).st_mode & 0o077 == 0
