"""A process for each session: what a crash costs, and whom it does not."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import eventually
from rawpeer import RawClient, hello

import rpcnb
from rpcnb import events
from rpcnb.server.isolation import Isolation
from rpcnb.server.zygote import ONE_THREAD
from rpcnb.transport.channel import Channel
from rpcnb.transport.loopthread import call_in_loop

BOARD = str(Path(__file__).with_name("isolatedboard.py"))
TOKEN = "a-token-of-the-tests"
Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start servers whose sessions have processes of their own; nothing is left of them."""
    monkeypatch.setenv("RPCNB_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    servers: list[Any] = []

    def begin(isolation: dict[str, Any] | None = None, **options: Any) -> Any:
        isolate = Isolation(**{"load": [BOARD], **(isolation or {})})
        server = rpcnb.Server(**{"port": 0, "silent": True, "token": TOKEN, **options, "isolate": isolate})
        servers.append(server)
        return server

    yield begin
    for server in servers:
        server.close()
    eventually(lambda: not list(tmp_path.glob("rpcnb-*")), "the end of the directories")


@pytest.fixture
def board(start: Start) -> Any:
    return start()


def connect(server: Any, **options: Any) -> Any:
    return rpcnb.connect(server.address, **{"token": TOKEN, **options})


def children_of(server: Any) -> list[psutil.Process]:
    """Those of sessions, and what they have left; not the one that waits for the next session."""
    spare = server._processes._spare
    found: list[psutil.Process] = psutil.Process(server._processes._process.pid).children(recursive=True)
    if spare is not None:
        found = [child for child in found if child.pid != spare.pid]
    return found


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_each_session_has_a_process_and_a_state_of_its_own(board: Any) -> None:
    with connect(board) as one, connect(board) as other:
        assert one.call("b.pid") != other.call("b.pid") != os.getpid()
        assert [one.call("b.note", 1), one.call("b.note", 1), other.call("b.note", 1)] == [1, 2, 1]
        one.upload(b"content", "file")
        assert other.listdir() == []
        assert one.call("b.pid") in [child.pid for child in children_of(board)]
        assert one.call("b.facts").split()[:2] == [str(os.environ.get("OMP_NUM_THREADS")), "1000"]
        assert one.call("b.facts") != other.call("b.facts"), "random numbers of its own"
        assert board.sessions == 2
        assert one.status()["sessions"] == 2
    eventually(lambda: board.sessions == 0 and not children_of(board), "the end of the processes")


@pytest.mark.parametrize(
    ("kind", "how"),
    [("segfault", "signal:SIGSEGV"), ("abort", "signal:SIGABRT"), ("exit", "exit:3"), ("kill", "signal:SIGKILL")],
)
@pytest.mark.parametrize("name", ["b.crash", "b.crash_later"])
def test_a_crash_costs_one_session(
    board: Any, kind: str, how: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(board) as good, connect(board) as bad:
        slow = good.submit(good.fn.b.sleep, 0.3)
        copied = good.submit(good.array, np.arange(1 << 20))
        began = time.monotonic()
        with pytest.raises(rpcnb.errors.SessionCrashed) as caught:
            bad.call(name, kind)
        assert time.monotonic() - began < 2
        assert caught.value.how == how
        assert caught.value.function == name
        assert how.partition(":")[2] in str(caught.value)
        assert "reconnect()" in str(caught.value)
        with pytest.raises(rpcnb.errors.SessionCrashed):  # and so every later time
            bad.call("b.add", 1, 2)
        bad.reconnect()
        assert bad.call("b.add", 1, 2) == 3
        assert slow.result(10) == 0.3
        assert (copied.result(10).numpy() == np.arange(1 << 20)).all()
    caplog.clear()


@pytest.mark.parametrize(
    "call",
    [
        lambda session: session.fn.b.crash("kill"),
        lambda session: session.get_function("b.crash")("kill"),
        lambda session: session.get_function("b.crash").submit("kill").result(),
        lambda session: list(session.get_function("b.crash").map(["kill"] * 3)),
        lambda session: (session.call("b.add", 1, 2), session.fn.b.crash("kill")),
    ],
)
def test_a_crash_names_the_call_however_it_was_made(
    board: Any, call: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with connect(board) as session, pytest.raises(rpcnb.errors.SessionCrashed) as caught:
        call(session)
    assert caught.value.function == "b.crash"
    caplog.clear()


def test_an_awaited_session_learns_of_a_crash(board: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with await rpcnb.connect_async(board.address, token=TOKEN) as session:
            waiting = asyncio.gather(
                session.call("b.sleep", 20), session.call("b.crash", "segfault"), return_exceptions=True
            )
            found = await asyncio.wait_for(waiting, 10)
            assert [type(one).__name__ for one in found] == ["SessionCrashed"] * 2
            await session.reconnect()
            assert await session.call("b.add", 1, 2) == 3

    asyncio.run(main())
    caplog.clear()


def test_calls_that_overlap_and_copies_learn_of_a_crash(board: Any, caplog: pytest.LogCaptureFixture) -> None:
    with connect(board) as session:
        started = [session.submit(session.fn.b.sleep, 20) for _ in range(5)]
        eventually(lambda: all(one.state == "running" for one in started))
        bad = session.submit(session.fn.b.crash, "abort")
        for one in [*started, bad]:
            assert isinstance(one.exception(10), rpcnb.errors.SessionCrashed)
    caplog.clear()


def test_a_stock_client_sees_the_end_of_the_stream(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    from rawpeer import packet
    from test_server_packets import function_handle

    from rpcnb.protocol.messages import CallFunc

    board = start()
    with RawClient((board.host, board.port)) as client:
        client.start(f"client: -token={TOKEN}")
        client.send(packet(CallFunc(function_handle(client, "b.crash"), ("segfault",))))
        client.sock.settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert client.sock.recv(100) == b""
    eventually(lambda: board.sessions == 0, "a free place", 1)
    caplog.clear()


def test_a_time_limit_ends_what_lets_nothing_else_run(board: Any, caplog: pytest.LogCaptureFixture) -> None:
    with connect(board, session_timeout=0.5) as session:
        process = psutil.Process(session.call("b.pid"))
        began = time.monotonic()
        with pytest.raises(rpcnb.errors.SessionTimeout, match=r"0\.5s session has expired"):
            session.call("b.hang", 30)
        assert time.monotonic() - began < 3
    eventually(lambda: has_ended(process) and board.sessions == 0)
    caplog.clear()


@pytest.mark.parametrize("name", ["b.hang", "b.block"])
def test_the_place_of_a_client_that_has_gone_is_free_again(start: Start, name: str) -> None:
    board = start(max_sessions=1)
    with RawClient((board.host, board.port)) as client:
        from rawpeer import packet
        from test_server_packets import function_handle

        from rpcnb.protocol.messages import CallFunc

        client.start(f"client: -token={TOKEN}")
        client.send(packet(CallFunc(function_handle(client, name), (30.0,))))
        eventually(lambda: [one.state for one in board.pending] == ["running"])
    eventually(lambda: board.sessions == 0, "a free place", 3)


def test_one_place_is_handed_from_session_to_session(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    board = start(max_sessions=1)
    with connect(board) as session:
        first = session.call("b.pid")
        with pytest.raises(rpcnb.RemoteError, match="server is full"):
            connect(board)
        for _ in range(5):
            session.reconnect()  # its old process may not have ended yet
            assert session.call("b.pid") != first
    caplog.clear()


def test_a_process_may_use_so_much(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    board = start({"memory": 600 << 20, "cpu_time": 1.0})
    with connect(board) as session:
        with pytest.raises(rpcnb.RemoteError, match="MemoryError"):
            session.call("b.allocate", 1 << 30)
        assert session.call("b.allocate", 1 << 20) == 1 << 20
        with pytest.raises(rpcnb.errors.SessionCrashed, match="processor time") as caught:
            session.call("b.burn")
        assert caught.value.how == "cpu"
    caplog.clear()


@pytest.mark.parametrize("how", ["close", "crash", "zygote", "server"])
def test_nothing_that_a_session_has_started_is_left(board: Any, how: str, caplog: pytest.LogCaptureFixture) -> None:
    session = connect(board)
    left = [psutil.Process(session.call("b.leave", kind)) for kind in ("child", "orphan", "group")]
    assert all(one.is_running() for one in left)
    if how == "close":
        session.close()
    elif how == "crash":
        with pytest.raises(rpcnb.errors.SessionCrashed):
            session.call("b.crash", "segfault")
    elif how == "zygote":
        os.kill(board._processes._process.pid, signal.SIGKILL)
    else:
        board.close()
    eventually(lambda: all(map(has_ended, left)), "the end of what it has started")
    session.close()
    caplog.clear()


def test_what_a_session_has_needed_the_next_one_finds_imported(start: Start, tmp_path: Path) -> None:
    module = tmp_path / "imported.py"
    module.write_text(
        "import sys, rpcnb\n"
        "@rpcnb.register_func('b.imported')\n"
        "def imported(name, now): return bool(now and __import__(name)) or name in sys.modules\n"
    )
    board = start({"load": [str(module)]})
    with connect(board) as session:
        assert not session.call("b.imported", "tvm_ffi", False)
    with connect(board) as session:
        session.call("b.imported", "tvm_ffi", True)
    eventually(lambda: board._processes._warm, "its word")

    def finds_it() -> bool:  # nobody waits for the import: the next session may come before it
        with connect(board) as session:
            found: bool = session.call("b.imported", "tvm_ffi", False)
            return found

    eventually(finds_it, "the import")


@pytest.mark.parametrize(
    "lines",
    ["import threading; threading.Thread(target=lambda: __import__('time').sleep(600), daemon=True).start()",
     "import os; os._exit(0)", "import os; os.kill(os.getpid(), 11)", "import time; time.sleep(600)"],
    ids=["thread", "exit", "crash", "hang"],
)  # fmt: skip
def test_what_cannot_be_imported_before_a_fork_is_not(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str
) -> None:
    (tmp_path / "nobodyforks.py").write_text(lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    board = start()
    with connect(board) as before:
        call_in_loop(board.io_loop, lambda: board._processes.warm(("nobodyforks",)))
        began = time.monotonic()
        for _ in range(4):
            with connect(board) as session:
                assert session.call("b.add", 1, 2) == 3
        assert time.monotonic() - began < 8, "nobody waits for what hangs, which is given up after 10 s"
        assert before.call("b.add", 1, 2) == 3


def test_memory_that_is_used_up_costs_one_session(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    board = start({"memory": 160 << 20})
    with connect(board) as good, connect(board) as bad:
        with contextlib.suppress(rpcnb.RemoteError, rpcnb.errors.SessionCrashed):
            bad.call("b.hoard")
        how: list[str] = []

        def has_crashed() -> bool:
            try:
                list(bad.jobs)  # the server's words come over the channel
            except rpcnb.errors.SessionCrashed as error:
                how.append(error.how)
            return bool(how)

        eventually(has_crashed, "its end")
        assert how == ["memory"]
        assert good.call("b.add", 1, 2) == 3
    caplog.clear()


@pytest.mark.parametrize("memory", [64 << 20, 80 << 20, 100 << 20])
def test_too_little_memory_is_one_line(start: Start, memory: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(rpcnb.errors.IsolationFailed, match="too little") as caught:
        start({"memory": memory})
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "wrong", [{"memory": 1}, {"memory": 10**21}, {"cpu_time": 0.5}, {"cpu_time": math.inf}, {"cpu_time": math.nan}]
)
def test_a_limit_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="for a session, got"):
        Isolation(**wrong)


def test_a_stopped_process_is_ended_with_its_client(board: Any) -> None:
    with connect(board) as session:
        call = session.submit(session.fn.b.stop)
        eventually(lambda: [one.status() for one in children_of(board)] == ["stopped"])
        assert [one.state for one in board.pending] == ["running"]
        assert not call.done()
    eventually(lambda: board.sessions == 0 and not children_of(board), "its end", 4)


def test_closed_descriptors_cost_one_session(board: Any, caplog: pytest.LogCaptureFixture) -> None:
    with connect(board) as good, connect(board) as bad:
        with pytest.raises(rpcnb.errors.SessionLost):
            bad.call("b.close_all", timeout=10)
        assert good.call("b.add", 1, 2) == 3
    eventually(lambda: board.sessions == 0 and not children_of(board), "its end", 5)
    caplog.clear()


def test_the_end_of_the_zygote_ends_its_sessions_and_no_more(board: Any, caplog: pytest.LogCaptureFixture) -> None:
    with connect(board) as session:
        os.kill(board._processes._process.pid, signal.SIGKILL)
        with pytest.raises(rpcnb.errors.SessionLost):
            session.call("b.sleep", 20)
        eventually(lambda: not board._processes.broken and board.sessions == 0, "another zygote", 20)
        session.reconnect()
        assert session.call("b.add", 1, 2) == 3
    caplog.clear()


def test_a_module_that_is_being_edited_is_tried_again(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = tmp_path / "edited.py"
    module.write_text("from isolatedboard import *")
    board = start({"load": [BOARD, str(module)]})
    module.write_text("1 / 0")
    os.kill(board._processes._process.pid, signal.SIGKILL)
    eventually(lambda: "ZeroDivisionError" in board._processes.broken, "a try", 20)
    with pytest.raises(rpcnb.RemoteError, match="no process for a session: ZeroDivisionError: division by zero"):
        connect(board)
    module.write_text("")
    eventually(lambda: not board._processes.broken, "another try", 20)
    with connect(board) as session:
        assert session.call("b.add", 1, 2) == 3
    assert len([one for one in caplog.records if "until this is mended" in one.message]) == 1
    module.write_text("1 / 0")
    os.kill(board._processes._process.pid, signal.SIGKILL)
    eventually(lambda: board._processes.broken, "its end")
    board.close()  # while it is tried
    caplog.clear()


def test_where_no_process_can_be_made_a_client_is_told(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tmp_path / "free"
    (tmp_path / "forksonce.py").write_text(
        textwrap.dedent(f"""
        import os
        forks, real = [], os.fork
        def fork():
            forks.append(1)
            if len(forks) > 1 and not os.path.exists({str(free)!r}):  # the first one tries the modules
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return real()
        os.fork = fork
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    board = start({"preload": ["forksonce"]}, max_sessions=1)
    with pytest.raises(rpcnb.RemoteError, match="no process can be made: Resource temporarily unavailable; try again"):
        connect(board)
    free.touch()
    with connect(board) as session:
        assert session.call("b.add", 1, 2) == 3
    caplog.clear()


@pytest.mark.parametrize(
    ("how", "source", "text"),
    [
        ("load", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("load", "import os; os._exit(3)", "a module of --load (wrongmodule) has ended the process that imported it"),
        ("load", "1 / 0", "ZeroDivisionError: division by zero"),
        ("preload", "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", "start threads"),
        ("preload", "import os; os._exit(3)", "a module of --preload (wrongmodule) has ended it"),
        ("preload", "1 / 0", "--preload wrongmodule: ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_had_is_one_line(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, source: str, text: str
) -> None:
    (tmp_path / "wrongmodule.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(rpcnb.errors.IsolationFailed) as caught:
        start({how: ["wrongmodule"]})
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_module_may_beganthreads_where_it_is_loaded(start: Start, tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
    )
    board = start({"load": [str(tmp_path / "threaded.py"), BOARD]})
    with connect(board) as session:
        assert session.call("b.add", 1, 2) == 3
    eventually(lambda: board.sessions == 0)


def test_cells_of_two_sessions_run_at_once(start: Start) -> None:
    board = start(allow_exec=True)
    with connect(board) as one, connect(board) as other:
        busy = one.submit(one.run_cell, "import time\nwhile True: time.sleep(0.01)", "busy")
        eventually(lambda: [cell.state for cell in one.list_cells()] == ["running"], "its beginning")
        assert other.run_cell("1 + 1").data == {"text/plain": "2"}
        assert other.list_cells() == []
        busy.cancel()
    eventually(lambda: board.sessions == 0)


def test_a_websocket_goes_over_too(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    board = start(web_port=0)
    with rpcnb.connect(f"ws://127.0.0.1:{board.web_port}/ws", token=TOKEN) as session:
        array = np.arange(1 << 18)
        assert (session.array(array).numpy() == array).all()
        assert session.submit(session.fn.b.sleep, 0.01).result(10) == 0.01
        with pytest.raises(rpcnb.errors.SessionCrashed):
            session.call("b.crash", "segfault")
    caplog.clear()


@pytest.mark.parametrize("web", [False, True], ids=["tcp", "ws"])
def test_a_session_behind_a_proxy_is_isolated(start: Start, caplog: pytest.LogCaptureFixture, web: bool) -> None:
    with rpcnb.Proxy(port=0, web_port=0, silent=True) as proxy:
        where = ("127.0.0.1", proxy.port)
        board = start(
            host=f"ws://127.0.0.1:{proxy.web_port}" if web else where[0], port=where[1], key="x", is_proxy=True
        )
        for _ in range(2):
            eventually(lambda: board.registered, "the server's wait")
            with rpcnb.connect(*where, key="x", token=TOKEN) as session:
                array = np.arange(1 << 18)
                assert (session.array(array).numpy() == array).all()
                assert session.call("b.pid") in [child.pid for child in children_of(board)]
                with pytest.raises(rpcnb.errors.SessionLost):
                    session.call("b.crash", "segfault")
        board.close()
    caplog.clear()


def test_a_tracker_hands_a_board_out_again_after_a_crash(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        board = start(key="rpi", tracker_addr=("127.0.0.1", tracker.port), trust_tracker=True)
        asked = rpcnb.connect_tracker("127.0.0.1", tracker.port)
        for _ in range(3):
            with asked.request("rpi") as session, pytest.raises(rpcnb.errors.SessionCrashed):
                session.call("b.crash", "abort")
        asked.close()
        board.close()
    caplog.clear()


def test_observers_and_pending_see_what_processes_do(board: Any) -> None:
    seen: list[events.Event] = []
    end = board.observers.subscribe(seen.append)
    with connect(board, lanes=0) as session:
        call = session.submit(session.fn.b.sleep, 0.5)
        eventually(lambda: [one.function for one in board.pending] == ["b.sleep"])
        assert call.result(10) == 0.5
        session.fn.b.sleep(0.01)
        eventually(lambda: any(isinstance(one, events.RequestCompleted) for one in seen), "its event")
        assert {one.source for one in seen} == {board.name}
        end()
    eventually(lambda: board.sessions == 0)
    assert board.pending == []


def test_only_the_tickets_owner_learns_how_a_session_has_ended(board: Any, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient((board.host, board.port), hello("client: -session=abc.def -ended= -rpcnb=1.0")) as client:
        assert client.receive(4) != (0xFF271).to_bytes(4, "little"), "refused"
    eventually(lambda: "wrong session or secret" in caplog.text)
    caplog.clear()


def test_an_unanswered_question_is_a_lost_session(
    board: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(board) as session, socket.create_server(("127.0.0.1", 0)) as deaf:
        inquiry = session._link.wire.inquire.args[0] if hasattr(session._link.wire.inquire, "args") else None
        owner = session._link.wire.inquire.func.__self__
        assert inquiry is session._link
        owner._address = rpcnb.transport.address.parse_address("127.0.0.1", deaf.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(rpcnb.errors.SessionLost) as caught:
            session.call("b.crash", "abort")
        assert type(caught.value) is rpcnb.errors.SessionLost
        assert time.monotonic() - began < 2
    caplog.clear()


def test_a_program_serves_its_own_functions(tmp_path: Path) -> None:
    import subprocess

    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import multiprocessing, os, sys
        import rpcnb

        @rpcnb.register_func("mine")
        def mine(): return os.getpid()

        if __name__ == "__main__" or len(sys.argv) > 1:
            with rpcnb.Server(port=0, isolate=True) as server, rpcnb.connect(server.address) as session:
                print(session.call("mine") != os.getpid())
        """)
    )
    run = [sys.executable, str(program)]
    good = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert good.stdout == "True\n", good.stderr
    bad = subprocess.run([*run, "unguarded"], capture_output=True, text=True, timeout=60)
    assert 'under if __name__ == "__main__"' in bad.stderr


def test_what_stays_in_this_process_is_refused() -> None:
    with pytest.raises(ValueError, match="registry= and session= stay"):
        rpcnb.Server(port=0, isolate=True, registry=rpcnb.runtime.registry.Registry())
    with pytest.raises(ValueError, match="64 MiB"):
        Isolation(memory=1000)
    with pytest.raises(ValueError, match="one second"):
        Isolation(cpu_time=0.5)


def test_many_sessions_come_and_go_at_once(board: Any) -> None:
    wrong: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for turn in range(4):
                with connect(board) as session:
                    assert session.call("b.add", number, turn) == number + turn
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    eventually(lambda: board.sessions == 0 and not children_of(board))


def test_crashes_beside_good_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The short form of ``tests/soak/crashes.py``."""
    monkeypatch.setenv("RPCNB_STATE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "soak"))
    from crashes import run

    counts, findings = run(24, 7, good=3)
    assert not findings
    assert counts["good"] > 3
    caplog.clear()


def test_the_process_that_waits_for_a_session_may_end_while_it_waits(start: Start) -> None:
    board = start()
    processes = board._processes

    def ready() -> bool:
        return processes._spare is not None and processes._spare.pid != 0

    for _ in range(2):
        eventually(ready, "a process that waits")
        pid = processes._spare.pid
        waiting = psutil.Process(pid)
        waiting.kill()
        # A process whose first thread has ended may still have its descriptors, until its last thread has.
        eventually(lambda: processes._spare is None or not processes._spare.is_alive, "its end")
        with connect(board, lanes=0) as session:
            assert session.call("b.pid") != pid
    eventually(ready)
    pid = processes._spare.pid
    with connect(board, lanes=0) as session:
        assert session.call("b.pid") == pid


def test_what_the_zygote_is_asked_at_once_is_all_done(board: Any, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    one, other = socket.socketpair()
    ours.settimeout(10)
    command = [sys.executable, "-m", "rpcnb.server.zygote", str(theirs.fileno())]
    environment = {**os.environ, **ONE_THREAD}
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment) as process, theirs, one, other:
        channel = Channel(ours)
        channel.send({**board._processes._options, "directory": str(tmp_path / "none")})
        assert channel.receive() == ({"ready": True}, b"", [])
        psutil.Process(process.pid).suspend()
        for _ in range(3):
            channel.send({"kill": 1})  # none of its own
        channel.send({"fork": 7}, b"", [other.fileno()])
        psutil.Process(process.pid).resume()
        note = channel.receive()
        assert note is not None
        assert note.words["forked"] == 7
        channel.close()
