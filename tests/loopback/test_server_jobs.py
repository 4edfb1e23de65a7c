"""Detached jobs: work that outlives session, notebook and, as a record, the server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
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
from test_server_isolation import BOARD, TOKEN, connect, start

import rpcnb
from rpcnb.protocol.codes import Limits
from rpcnb.runtime.parcel import pack
from rpcnb.transport.loopthread import call_in_loop

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


def test_a_job_may_be_cancelled_before_it_begins(board: Any, session: Any) -> None:
    answers: list[Any] = []

    def both(name: str) -> None:
        words = {"op": "start", "name": name, "function": "b.block", "owner": None}
        board._jobs.ask(words, pack((60.0,)), lambda *answer: answers.append(answer))
        board._jobs.ask({"op": "cancel", "name": name}, b"", lambda *answer: answers.append(answer))

    for name in ("spare", "fresh"):  # the process that is ready, and one that has still to be made
        call_in_loop(board.io_loop, lambda name=name: both(name))  # type: ignore[misc]
    eventually(lambda: len(answers) == 4, "the answers")
    assert {job.name: job.facts["state"] for job in session.jobs.values()} == dict.fromkeys(
        ("spare", "fresh"), "cancelled"
    )
    assert session.call("b.add", 1, 2) == 3, "the server lives"


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


def test_a_result_that_cannot_be_kept_is_told_as_such(session: Any) -> None:
    for nested in (False, True):
        with pytest.raises(rpcnb.RemoteError, match=r"result of a job is kept as dicts with text keys.* no text$"):
            session.jobs.start("b.odd", nested).result(20)
    assert session.jobs.start_cell("{1: 2}").result(20) == "{1: 2}"
    with pytest.raises(rpcnb.ArgumentError, match="a key that is no text"):
        session.jobs.start("b.add", {1: 2}, 3)


def test_a_job_ends_though_something_in_its_process_would_go_on(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpcnb.server.jobs._LEAVE", 0.1)
    job = session.jobs.start("b.leave_at_exit")
    assert job.result(20) == 5
    assert job.state == "done"


def test_a_long_error_is_kept_in_part(session: Any) -> None:
    job = session.jobs.start("b.fail", "x" * 50_000 + "é" * 200_000 + "end")
    with pytest.raises(rpcnb.RemoteError) as caught:
        job.result(20)
    assert caught.value.message.startswith("x" * 50_000)
    assert caught.value.message.endswith("éend")
    assert caught.value.message.count("characters are not kept") == 1
    assert len(caught.value.message) < 200_000


def test_output_is_shown_in_whole_letters(session: Any) -> None:
    job = session.jobs.start("b.letters")
    shown: list[str] = []
    job.follow(shown.append)
    assert "".join(shown) == "äöü€" * 5


def test_the_output_of_a_job_that_goes_on_printing_has_an_end(session: Any) -> None:
    job = session.jobs.start("b.flood")
    eventually(lambda: job.refresh()["output"] > 1 << 20)
    assert set(job.output()) <= set("x... 0123456789bytes are not kept\n")
    assert job.cancel()


def test_a_job_learns_why_its_modules_cannot_be_had(start: Start, tmp_path: Path) -> None:
    once = tmp_path / "once.py"
    once.write_text("from isolatedboard import *")
    with connect(start({"load": [BOARD, str(once)]}, max_sessions=None)) as session:
        once.write_text("1 / 0")
        session.jobs.start("b.add", 1, 2).wait(20)  # the process that was ready
        with pytest.raises(rpcnb.RemoteError, match="ZeroDivisionError: division by zero") as caught:
            session.jobs.start("b.add", 1, 2).result(20)
        assert caught.value.remote_type == "IsolationFailed"


def test_files_that_are_too_much_cost_the_job_its_files_alone(start: Start) -> None:
    with connect(start(limits=Limits(job_bytes=1_000_000))) as session:
        session.jobs.start("b.add", 1, 2, name="before").wait(20)
        holes = session.jobs.start("b.files", 1000, name="holes")
        assert holes.result(20) == 1000
        assert holes.files == ["holes", "whole"], "a hole takes no room"
        much = session.jobs.start("b.files", 2_000_000, name="much")
        assert much.result(20) == 2_000_000
        assert much.files == []
        with pytest.raises(rpcnb.RemoteError, match="were not kept: job_bytes=1000000"):
            much.download("whole")
        assert list(session.jobs) == ["before", "holes", "much"]


def test_servers_with_one_token_leave_each_others_jobs_alone(start: Start) -> None:
    first, second = start(), start()
    with connect(first) as one, connect(second) as other:
        running = one.jobs.start("b.block", 60.0, name="burnin")
        one.jobs.start("b.add", 1, 2, name="done").wait(20)
        with pytest.raises(rpcnb.RemoteError, match="another server with the same token has a job 'burnin'"):
            other.jobs.start("b.add", 1, 2, name="burnin")
        assert list(other.jobs) == []
        third = start()
        with connect(third) as session:
            assert list(session.jobs) == []
        assert running.state == "running"
    first.close()
    with connect(second) as other:
        assert list(other.jobs) == [], "it has begun before"
    with connect(start()) as session:
        assert list(session.jobs) == ["done", "burnin"]
        assert session.jobs["burnin"].facts["how"] == "restart"
        with pytest.raises(rpcnb.errors.SessionLost, match="has ended with its server"):
            session.jobs["burnin"].result()


@pytest.mark.parametrize(
    "record", ["", "[]", "null", "{", '{"name": 5}', '{"state": "odd"}', '{"error": 5}', '{"error": {}}', "[" * 9999]
)
def test_a_damaged_record_is_told_as_such(start: Start, tmp_path: Path, record: str) -> None:
    board = start()
    with connect(board) as session:
        session.jobs.start("b.work", 1, 2, name="half").wait(20)
    board.close()
    (path,) = (tmp_path / "state" / "jobs").glob("*/half/job.json")
    path.write_text(record)
    with connect(start()) as session:
        (job,) = session.jobs.values()
        assert (job.name, job.facts["state"]) == ("half", "failed")
        with pytest.raises(rpcnb.errors.SessionLost, match=r"is damaged|has ended with its server"):
            job.result()
        job.forget()
        assert session.jobs.start("b.add", 1, 2, name="half").result(20) == 3


def test_jobs_that_are_killed_with_their_server_have_ended_with_it(start: Start) -> None:
    board = start()
    with connect(board) as session:
        job = session.jobs.start("b.block", 60.0, name="cut")
        child = board._jobs._running["cut"]
        eventually(lambda: child.pid)
        os.kill(child.pid, signal.SIGTERM)
        eventually(lambda: job.state == "failed")
        assert job.facts["how"] == "signal:SIGTERM"
    board.close()
    with connect(start()) as session:
        assert session.jobs["cut"].facts["how"] == "restart"


def test_a_crashed_job_is_not_called_a_session(session: Any) -> None:
    with pytest.raises(rpcnb.errors.SessionCrashed, match=r"^the job 'dead' at .* has crashed: .* by SIGKILL"):
        session.jobs.start("b.crash", "kill", name="dead").result(20)
    with pytest.raises(rpcnb.errors.SessionCrashed, match="exited with code 0, without a result"):
        session.jobs.start_cell("import os; os._exit(0)", "left").result(20)


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


def test_a_job_of_a_trackers_board_is_found_while_it_runs(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        board = start(key="rpi", tracker_addr=("127.0.0.1", tracker.port))
        asked = rpcnb.connect_tracker("127.0.0.1", tracker.port)
        with pytest.raises(rpcnb.errors.KeyMismatch):
            connect(board, key="rpi")  # there is no job that could be looked after
        with asked.request("rpi", token=TOKEN) as session:
            session.jobs.start("b.block", 60.0, name="burnin")
        eventually(lambda: "job burnin" in asked.text_summary(), "the tracker's word")
        with pytest.raises(LookupError, match=r"none of the 1 board 'rpi' .* has a job 'other'"):
            asked.find_job("rpi", "other", token=TOKEN)
        with pytest.raises(LookupError, match="or the token is wrong"):
            asked.find_job("rpi", "burnin", token="a-wrong-token")
        job = asked.find_job("rpi", "burnin", token=TOKEN)
        with connect(board, key="rpi") as visitor:
            with pytest.raises(rpcnb.RemoteError, match="lent by its tracker, and taken by the job 'burnin'"):
                visitor.call("b.add", 1, 2)
            assert job.cancel()
            eventually(lambda: "lent by its tracker: request it there" in why_not(visitor), "the end of the job")
            with asked.request("rpi", token=TOKEN, timeout=20) as session:
                assert session.call("b.add", 1, 2) == 3, "visitors take no place"
        job.session.close()

        async def awaited() -> str:
            other = await rpcnb.connect_tracker_async("127.0.0.1", tracker.port)
            with pytest.raises(LookupError):
                await other.find_job("rpi", "other", token=TOKEN)
            found = await other.find_job("rpi", "burnin", token=TOKEN)
            await found.session.close()
            return str(found.facts["state"])

        assert asyncio.run(awaited()) == "cancelled"
        asked.close()
    caplog.clear()


def test_a_job_behind_a_proxy_is_looked_after_while_it_runs(start: Start) -> None:
    with rpcnb.Proxy(port=0, silent=True) as proxy:
        board = start(host="127.0.0.1", port=proxy.port, key="x", is_proxy=True)
        eventually(lambda: board.registered, "the server's wait")
        with rpcnb.connect("127.0.0.1", proxy.port, key="x", token=TOKEN) as session:
            session.jobs.start("b.block", 60.0, name="burnin")
        eventually(lambda: board.registered, "the server's wait")
        with rpcnb.connect("127.0.0.1", proxy.port, key="x", token=TOKEN) as visitor:
            with pytest.raises(rpcnb.RemoteError, match="taken by the job 'burnin'"):
                visitor.call("b.add", 1, 2)
            assert visitor.jobs["burnin"].cancel()
            eventually(lambda: not why_not(visitor), "its place")
        board.close()  # before the proxy, whose end it would tell


def why_not(visitor: Any) -> str:
    """Why a call is refused; empty if it is not."""
    try:
        assert visitor.call("b.add", 1, 2) == 3
    except rpcnb.RemoteError as error:
        return str(error)
    return ""


def test_a_visitor_looks_after_jobs_alone(start: Start) -> None:
    board = start(max_sessions=1)
    with connect(board) as session:
        session.jobs.start("b.sleep", 60.0, name="burnin")
        assert session.call("b.add", 1, 2) == 3
    with connect(board) as visitor:
        with pytest.raises(rpcnb.RemoteError, match="taken by the job 'burnin'"):
            visitor.call("b.add", 1, 2)
        assert visitor.jobs["burnin"].cancel()
        eventually(lambda: not why_not(visitor), "its place")
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
