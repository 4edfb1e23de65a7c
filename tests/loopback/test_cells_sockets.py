"""Remote cells over sockets: output while they run, variables, interrupts in both kinds of runners, consent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb.cells import runners as cellrunners
from rpcnb.cells.runners import MainThread, Worker
from rpcnb.client.cells import CellOutput
from rpcnb.command.board import DemoBoard
from rpcnb.errors import AccessDenied, CellError, ConnectFailed, DeadlineExceeded, RemoteProtocolError

Serve = Callable[..., Any]


@pytest.fixture(scope="module")
def board() -> Iterator[DemoBoard]:
    with DemoBoard() as made:
        yield made


@pytest.fixture(params=["process", "thread"])
def session(request: pytest.FixtureRequest, serve: Serve) -> Iterator[rpcnb.Session]:
    """A session with a board that runs cells in its main thread, and with a server that runs them in a worker."""
    if request.param == "process":
        with rpcnb.connect(request.getfixturevalue("board").address, key="demo") as made:
            yield made
    else:
        with rpcnb.connect(serve(allow_exec=True, token="t").address, token="t") as made:
            yield made


def test_a_cells_value_and_output(session: rpcnb.Session) -> None:
    pieces: list[CellOutput] = []
    result = session.run_cell("print('hello')\nx = 21\nx * 2", on_output=pieces.append)
    assert result.data == {"text/plain": "42"}
    assert pieces == [CellOutput("stdout", "hello\n")]
    assert session.run_cell("x += 1").data == {}
    assert session.namespace["x"] == 22


def test_output_arrives_while_the_cell_runs(session: rpcnb.Session) -> None:
    arrived = threading.Event()
    source = "import rpcnb, time\nprint('begun')\nwhile not rpcnb.cancelled(): time.sleep(0.01)"
    pending = session.submit(session.run_cell, source, on_output=lambda piece: arrived.set())
    assert arrived.wait(10)
    assert [cell.state for cell in session.list_cells()] == ["running"]
    pending.cancel()
    eventually(lambda: session.list_cells() == [], "the cell's end")


def test_variables_there_and_back(session: rpcnb.Session) -> None:
    names = session.namespace
    names["a"] = np.arange(6.0).reshape(2, 3)
    names["config"] = {"rate": 0.5, "names": ["x", "y"]}
    session.run_cell("a = a * 2; config['names'].append('z')")
    assert names["a"].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert names["config"] == {"rate": 0.5, "names": ["x", "y", "z"]}
    assert list(names) == names._ipython_key_completions_() == ["a", "config"]
    assert (len(names), "a" in names, "b" in names) == (2, True, False)
    del names["a"]
    with pytest.raises(KeyError):
        names["a"]
    with pytest.raises(AccessDenied, match="pickle=True"):
        names["s"] = {1}
    session.set_variable("s", {1}, pickle=True)
    with pytest.raises(AccessDenied, match="pickle"):
        session.get_variable("s")
    assert session.get_variable("s", pickle=True) == {1}
    assert repr(names) == f"<Namespace of {session.name}>"
    assert session.allocations == 0


def test_errors_have_the_cells_lines(session: rpcnb.Session) -> None:
    with pytest.raises(CellError, match="ZeroDivisionError") as caught:
        session.run_cell("def f():\n    return 1 / 0\nf()", "In[5]")
    assert "return 1 / 0" in "\n".join(caught.value._render_traceback_())
    assert session.run_cell("1").data == {"text/plain": "1"}


def test_a_time_limit_interrupts_the_cell_there(session: rpcnb.Session) -> None:
    with pytest.raises(DeadlineExceeded):
        session.run_cell("import time\nwhile True: time.sleep(0.01)", timeout=0.2)
    eventually(lambda: session.list_cells() == [], "the cell's end")
    assert session.run_cell("1 + 1").data == {"text/plain": "2"}


def test_an_interrupt_here_interrupts_the_cell_there(session: rpcnb.Session) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = threading.Event()

    def press(piece: CellOutput) -> None:
        begun.set()
        os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.run_cell("import time\nprint('begun', flush=True)\nwhile True: time.sleep(0.01)", on_output=press)
    assert begun.is_set()
    assert time.monotonic() - start < 30
    eventually(lambda: session.list_cells() == [], "the cell's end")
    assert session.run_cell("'alive'").data == {"text/plain": "'alive'"}


def test_a_call_that_blocks_in_the_system_is_interrupted_on_a_board(board: DemoBoard) -> None:
    with rpcnb.connect(board.address, key="demo") as session:
        source = "import socket\na, b = socket.socketpair()\nprint('waits', flush=True)\na.recv(1)"
        arrived = threading.Event()
        pending = session.submit(session.run_cell, source, on_output=lambda piece: arrived.set())
        assert arrived.wait(10)
        pending.cancel()
        eventually(lambda: session.list_cells() == [], "the cell's end")


def test_cells_of_all_clients_run_one_at_a_time(serve: Serve) -> None:
    server = serve(allow_exec=True, token="t")
    with rpcnb.connect(server.address, token="t") as one, rpcnb.connect(server.address, token="t") as other:
        first = one.submit(one.run_cell, "import time\nwhile True: time.sleep(0.01)", "first")
        eventually(lambda: [cell.state for cell in other.list_cells()] == ["running"], "its beginning")
        second = other.submit(other.run_cell, "2", "second")
        eventually(lambda: len(other.list_cells()) == 2, "the queue")
        assert [(cell.name, cell.state, cell.mine) for cell in other.list_cells()] == [
            ("first", "running", False),
            ("second", "queued", True),
        ]
        first.cancel()
        assert second.result(10).data == {"text/plain": "2"}


def test_the_end_of_a_session_ends_its_cell(serve: Serve) -> None:
    server = serve(allow_exec=True, token="t")
    with rpcnb.connect(server.address, token="t") as other:
        with rpcnb.connect(server.address, token="t") as one:
            one.submit(one.run_cell, "import time\nwhile True: time.sleep(0.01)")
            eventually(lambda: len(other.list_cells()) == 1, "its beginning")
        eventually(lambda: other.list_cells() == [], "its end", 5)


def test_without_lanes_everything_comes_at_the_end(serve: Serve) -> None:
    pieces: list[CellOutput] = []
    server = serve(allow_exec=True, token="t")
    with rpcnb.connect(server.address, token="t", lanes=0) as session:
        result = session.run_cell("print('late')\n3", on_output=pieces.append)
    assert (result.data, pieces) == ({"text/plain": "3"}, [CellOutput("stdout", "late\n")])


def test_awaited_cells(serve: Serve) -> None:
    server = serve(allow_exec=True, token="t")
    asyncio.run(_await_cells(server.address))


async def _await_cells(address: str) -> None:
    pieces: list[CellOutput] = []
    async with await rpcnb.connect_async(address, token="t") as session:
        result = await session.run_cell("print('hello')\nx = [1]\n3", on_output=pieces.append)
        assert result.data == {"text/plain": "3"}
        assert await session.get_variable("x") == [1]
        await session.set_variable("y", np.ones(2))
        assert await session.list_variables() == {"x": "list", "y": "ndarray"}
        await session.delete_variable("x")
        assert (await session.run_cell("float(y.sum())")).data == {"text/plain": "2.0"}
        begun = asyncio.Event()
        source = "import time\nprint('begun', flush=True)\nwhile True: time.sleep(0.01)"
        task = asyncio.ensure_future(session.run_cell(source, on_output=lambda piece: begun.set()))
        await begun.wait()
        task.cancel()
        assert (await session.run_cell("'next'")).data == {"text/plain": "'next'"}  # its turn comes
        assert (await session.status())["state"] == "READY"
    assert pieces == [CellOutput("stdout", "hello\n")]


def test_consent_is_asked_for(serve: Serve) -> None:
    with rpcnb.connect(serve().address) as session:
        with pytest.raises(AccessDenied, match="rpcnb serve --allow-exec"):
            session.run_cell("1")
        with pytest.raises(AccessDenied, match="--allow-exec"):
            session.list_variables()
    with pytest.raises(AccessDenied, match="without a token anybody"):
        serve(allow_exec=True)
    with pytest.raises(AccessDenied, match="without a token anybody"):
        serve(allow_exec=True, token="t", tracker_addr=("127.0.0.1", 1), trust_tracker=True)
    with pytest.raises(CellError), rpcnb.connect(serve(allow_exec=True, insecure=True).address) as session:
        session.run_cell("1 / 0")


def test_answers_that_are_none_are_the_servers_mistake(serve: Serve, registry: Any) -> None:
    for name, answer in (
        ("rpcnb.cells", '[{"id": 1}]'),
        ("rpcnb.variables", "[1]"),
        ("rpcnb.variable", 3),
        ("rpcnb.status", "{"),
    ):
        registry.register(name, lambda *args, answer=answer: answer)
    with rpcnb.connect(serve().address) as session:
        for ask in (session.list_cells, session.list_variables, lambda: session.get_variable("x"), session.status):
            with pytest.raises(RemoteProtocolError):
                ask()


# -- the runners themselves --------------------------------------------------------------------------------------------


class Sleeper:
    """A job that sleeps until it is interrupted."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ended = ""
        self.finished = threading.Event()

    def run(self) -> None:
        try:
            self.begun.set()
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            self.ended = "interrupted"

    def finish(self) -> None:
        self.finished.set()


class Quick(Sleeper):
    """A job that ends at once, after which an interrupt comes."""

    def run(self) -> None:
        self.begun.set()


def test_a_main_thread_runs_jobs_until_the_end_and_is_interrupted() -> None:
    runner, end, sleepers = MainThread(), threading.Event(), [Sleeper(), Sleeper()]
    quick = Quick()

    def press() -> None:
        assert sleepers[0].begun.wait(10)
        runner.interrupt(sleepers[1])  # not the one that runs
        runner.interrupt(sleepers[0])
        assert sleepers[1].begun.wait(10)
        end.set()  # the end interrupts what runs

    for job in (quick, *sleepers):
        runner.submit(job)
    thread = threading.Thread(target=press)
    thread.start()
    runner.run(end.wait)
    thread.join()
    assert [job.ended for job in sleepers] == ["interrupted", "interrupted"]
    assert all(job.finished.is_set() for job in (quick, *sleepers))


def test_a_signal_that_is_not_noticed_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, job, end = MainThread(), Sleeper(), threading.Event()
    send, sent = signal.pthread_kill, []

    def lose_the_first(*args: Any) -> None:
        sent.append(args)
        if len(sent) > 1:
            send(*args)

    monkeypatch.setattr(signal, "pthread_kill", lose_the_first)

    def press() -> None:
        assert job.begun.wait(10)
        runner.interrupt(job)
        assert job.finished.wait(10)
        end.set()

    runner.submit(job)
    thread = threading.Thread(target=press)
    thread.start()
    runner.run(end.wait)
    thread.join()
    assert (job.ended, len(sent)) == ("interrupted", 2)
    eventually(lambda: not [one for one in threading.enumerate() if isinstance(one, threading.Timer)], "the timers")


def test_an_interrupt_that_comes_late_hits_nobody() -> None:
    runner = MainThread()
    runner._wanted = Sleeper()
    runner._on_signal()  # its job has ended meanwhile
    assert runner._wanted is None


def test_a_job_that_lets_an_interrupt_through_is_finished() -> None:
    class Careless(Sleeper):
        def run(self) -> None:
            raise KeyboardInterrupt

    runner, job = Worker(), Careless()
    runner.submit(job)
    assert job.finished.wait(10)
    runner.close()


def test_a_worker_is_interrupted_between_two_bytecodes() -> None:
    runner, one = Worker(), Sleeper()
    runner.submit(one)
    runner.submit(Quick())
    assert one.begun.wait(10)
    runner.interrupt(one)
    assert one.finished.wait(10)
    assert one.ended == "interrupted"
    runner.close()


class Printer(Sleeper):
    """A job that is interrupted while its output is being sent."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.runner = runner
        self.sent = 0
        self.torn = False

    def run(self) -> None:
        try:
            while True:
                with self.runner.shield():
                    self.torn = True
                    self.begun.set()
                    time.sleep(0.002)
                    self.sent += 1
                    self.torn = False
        except KeyboardInterrupt:
            self.ended = "interrupted"
            with self.runner.shield():
                self.sent += 1  # what it has to say of that is no further interrupt


@pytest.mark.parametrize("kind", [MainThread, Worker])
def test_an_interrupt_never_tears_what_sends_output(kind: Any) -> None:
    runner, end = kind(), threading.Event()
    printers = [Printer(runner) for _ in range(30)]

    def press() -> None:
        for number, job in enumerate(printers):
            assert job.begun.wait(10)
            time.sleep(number * 0.0002)  # at another instant each time
            runner.interrupt(job)
            assert job.finished.wait(10)
        end.set()

    for job in printers:
        runner.submit(job)
    thread = threading.Thread(target=press)
    thread.start()
    if kind is MainThread:
        runner.run(end.wait)
    thread.join()
    runner.close()
    assert {(job.ended, job.torn) for job in printers} == {("interrupted", False)}


def test_a_cells_own_threads_are_not_meant_by_its_interrupts() -> None:
    runner = MainThread()
    runner._wanted = Sleeper()
    with runner.shield():  # this thread runs no cell
        assert runner._wanted is not None
    runner._worker = threading.get_ident()
    outer, inner = runner.shield(), runner.shield()
    outer.__enter__()
    inner.__enter__()
    inner.__exit__(None, None, None)
    assert runner._held, "it comes at the end of the outermost"
    with pytest.raises(KeyboardInterrupt):
        outer.__exit__(None, None, None)


def test_a_job_that_breaks_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Sleeper):
        def run(self) -> None:
            raise SystemExit

        def finish(self) -> None:
            super().finish()
            raise ValueError

    runner, broken, quick = Worker(), Broken(), Quick()
    runner.submit(broken)
    runner.submit(quick)
    assert quick.finished.wait(10)
    assert broken.finished.is_set()
    runner.close()
    late = Quick()
    runner.submit(late)
    runner._perform(late)
    assert late.finished.is_set()
    assert not late.begun.is_set(), "nothing begins any more"
    assert "could not be run" in caplog.text
    assert "could not be told" in caplog.text
    caplog.clear()


def test_output_that_cannot_be_read_ends_that_call_and_no_other(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpcnb.cells.output.CellOutput._send", lambda self, piece: self._way.emit(b"{"))
    with rpcnb.connect(serve(allow_exec=True, token="t").address, token="t") as session:
        with pytest.raises(RemoteProtocolError, match="expected JSON"):
            session.run_cell("print(1)", on_output=[].append)
        assert session.run_cell("1 + 1").data == {"text/plain": "2"}


def test_an_on_output_of_ones_own_that_fails_is_logged_only(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with rpcnb.connect(serve(allow_exec=True, token="t").address, token="t") as session:
        assert session.run_cell("print(1)\n2", on_output=lambda piece: 1 / 0).data == {"text/plain": "2"}
    assert "failed in the I/O thread" in caplog.text
    caplog.clear()


def test_an_interrupt_on_its_way_is_held_back_for_the_end_of_the_shield(monkeypatch: pytest.MonkeyPatch) -> None:
    def arrives(steps: int) -> None:
        raise KeyboardInterrupt

    runner, inside = Worker(), []
    runner._worker = threading.get_ident()
    runner._sent = True  # and it has arrived before
    with runner.shield():
        inside.append(1)
    runner._sent = True
    monkeypatch.setattr(cellrunners, "range", arrives, raising=False)
    shield = runner.shield()
    shield.__enter__()
    inside.append(2)
    with pytest.raises(KeyboardInterrupt):
        shield.__exit__(None, None, None)
    assert inside == [1, 2]
    board = MainThread()
    board._worker = threading.get_ident()
    board._wanted = Sleeper()
    with pytest.raises(KeyboardInterrupt), board.shield():
        inside.append(3)
    assert inside == [1, 2, 3]


def test_a_connection_that_is_reset_before_our_key_was_sent_is_no_server() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def reset() -> None:
            peer, _ = listener.accept()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.close()

        for _ in range(20):
            thread = threading.Thread(target=reset)
            thread.start()
            with pytest.raises(ConnectFailed):
                rpcnb.connect("127.0.0.1", listener.getsockname()[1])
            thread.join()
