"""Remote cells at the server, without sockets: running, output, interrupts, variables, consent."""

from __future__ import annotations

import builtins
import enum
import gc
import io
import json
import linecache
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from runtime_wire import Client, Loop

from rpcnb.cells import cells
from rpcnb.cells import output as celloutput
from rpcnb.cells import show as cellshow
from rpcnb.cells.cells import Cells
from rpcnb.cells.output import CellOutput, output_to
from rpcnb.cells.pickles import pickled, unpickled
from rpcnb.cells.runners import Job, MainThread, Runner
from rpcnb.cells.variables import dump_variable, load_variable
from rpcnb.errors import AccessDenied, ArgumentError, RpcError
from rpcnb.protocol.messages import CallFunc, Raised, Return
from rpcnb.protocol.records import Emitted, read_records
from rpcnb.runtime import registry
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.overlap import Calls
from rpcnb.runtime.registry import Registry

START, NEXT, CANCEL = "rpcnb.start", "rpcnb.next", "rpcnb.cancel"


def value_of(reply: Any) -> Any:
    """The value of a plain result."""
    assert isinstance(reply, Return), reply
    return reply.values[1]


class ByHand(Runner):
    """Runs a cell when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Job] = []
        self.interrupted: list[Job] = []

    def submit(self, job: Job) -> None:
        self.waiting.append(job)

    def step(self) -> None:
        self._perform(self.waiting.pop(0))

    def _raise(self, job: Job) -> None:
        self.interrupted.append(job)


class Board:
    """A server with consent."""

    def __init__(self, loop: Loop, consent: bool = True) -> None:
        self.runner = ByHand()
        self.timers: list[Callable[[], object]] = []
        self.cells = Cells(self.runner)
        self.environment = Environment(
            registry=Registry(),
            spawn=loop.spawn,
            run_in_thread=lambda job: job(),
            later=self.later,
            cells=self.cells if consent else None,
        )
        self.client = Client(self.environment, extended=True)
        self.cell = self.client.find("rpcnb.cell")

    def later(self, seconds: float, function: Callable[[], object]) -> Callable[[], object]:
        self.timers.append(function)
        return lambda: None

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the server; returns its result, or what it raised."""
        reply = self.client.ask(CallFunc(self.client.find(name), args))
        return reply if isinstance(reply, Raised) else value_of(reply)

    def run(self, source: str, name: str = "cell") -> dict[str, Any]:
        """Run a cell on the connection itself; returns its outcome."""
        self.client.send(CallFunc(self.cell, (source, name)))
        self.runner.step()
        found: dict[str, Any] = json.loads(value_of(self.client.reply()))
        return found

    def start(self, number: int, source: str) -> None:
        """Begin a cell whose output travels."""
        self.call(START, number, 0.0, int(self.cell), source, "cell")

    def records(self) -> list[tuple[int, Any]]:
        """Collect output and outcomes."""
        found: list[tuple[int, Any]] = read_records(self.call(NEXT))
        return [
            (number, json.loads(one.data if isinstance(one, Emitted) else value_of(one)))
            for number, one in found
            if isinstance(one, (Emitted, Return))
        ]


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def board(loop: Loop) -> Iterator[Board]:
    made = Board(loop)
    yield made
    made.client.servant.cancel()


# -- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("1 + 1", "2"),
        ("x = 1", None),
        ("", None),
        ("None", None),
        ("x = 2\nx * 21", "42"),
        ("x = 3; x;", None),
        ("import asyncio\nawait asyncio.sleep(0, 'slept')", "'slept'"),
        ("await __import__('asyncio').sleep(0)\n5", "5"),
    ],
)
def test_the_value_of_a_last_expression_is_the_result(board: Board, source: str, text: str | None) -> None:
    outcome = board.run(source)
    assert outcome["error"] is None
    assert outcome["data"].get("text/plain") == text
    assert outcome["seconds"] >= 0


def test_a_namespace_lives_as_long_as_its_session(board: Board) -> None:
    board.run("x = 20")
    assert board.run("x + 1\n_ = 0; x + 1")["data"]["text/plain"] == "21"
    assert board.run("_")["data"]["text/plain"] == "21"
    other = Client(board.environment, extended=True)
    assert other.find("rpcnb.cell") != 0
    other_names = value_of(other.ask(CallFunc(other.find("rpcnb.variables"))))
    assert json.loads(other_names) == []
    namespace = next(iter(board.environment.cells._namespaces.values()))  # type: ignore[union-attr]  # it has consent
    other.servant.cancel()
    board.client.servant.cancel()
    assert namespace == {}


def test_an_exception_is_told_with_the_cells_own_lines(board: Board) -> None:
    outcome = board.run("def f():\n    return 1 / 0\nf()", "In[3]")
    error = outcome["error"]
    assert (error["type"], error["text"]) == ("ZeroDivisionError", "division by zero")
    assert "return 1 / 0" in error["traceback"]
    assert 'File "<In[3] #' in error["traceback"]
    assert "cells.py" not in error["traceback"]


def test_a_cells_source_is_kept_as_long_as_code_of_it_exists(board: Board) -> None:
    def kept() -> int:
        gc.collect()
        return sum(name.startswith("<kept #") for name in linecache.cache)

    for source in ("1 + 1", "x = 5", "x = = 1", "raise KeyError", "[f() for f in [lambda: 3]]"):
        board.run(source, "kept")
        assert kept() == 0, source
    board.run("def f():\n    def g():\n        return 1 / 0\n    return g", "kept")
    assert kept() == 1
    board.run("g = f()\ndel f", "kept")
    assert kept() == 1
    assert "return 1 / 0" in board.run("g()", "kept")["error"]["traceback"]
    board.run("del g", "kept")
    assert kept() == 0


def test_what_cannot_be_parsed_or_told_is_an_error_too(board: Board) -> None:
    assert board.run("x = = 1")["error"]["type"] == "SyntaxError"
    assert board.run("raise SystemExit(3)")["error"]["type"] == "SystemExit"
    odd = "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd"
    assert board.run(odd)["error"]["type"] == "Odd"
    assert board.run("input('name? ')")["error"]["text"].startswith("a remote cell cannot ask")


def test_an_exception_that_breaks_the_report_is_named() -> None:
    class Odd(Exception):
        @property
        def __cause__(self) -> Any:  # type: ignore[override]  # that is what is odd
            raise ValueError

    assert cells._failure(Odd())["error"]["text"].startswith("without a text: ValueError")


@pytest.mark.parametrize("args", [(1,), ("1", 2)])
def test_a_cell_must_be_text(board: Board, args: tuple[Any, ...]) -> None:
    reply = board.call("rpcnb.cell", *args)
    assert isinstance(reply, Raised)
    assert "the text of a cell" in reply.text


# -- output ----------------------------------------------------------------------------------------------------------


def test_output_travels_while_the_cell_runs(board: Board) -> None:
    board.start(1, "import sys\nprint('one'); print('two')\nprint('careful', file=sys.stderr)\ndisplay(3)\n'end'")
    board.runner.step()
    (stdout, stderr, shown, end) = [piece for _, piece in board.records()]
    assert stdout == {"stream": "stdout", "text": "one\ntwo\n"}
    assert stderr == {"stream": "stderr", "text": "careful\n"}
    assert shown["display"] == {"text/plain": "3"}
    assert end["data"]["text/plain"] == "'end'"
    assert end["outputs"] == []


def test_without_a_way_output_comes_with_the_result(board: Board) -> None:
    outcome = board.run("import sys\nsys.stdout.writelines(['a', 'b'])\nsys.stdout.flush()\nsys.stdout.isatty()")
    assert outcome["outputs"] == [{"stream": "stdout", "text": "ab"}]
    assert outcome["data"]["text/plain"] == "False"


class Way:
    """A client that reads, or not."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.has_room = True
        self.waited = 0

    def emit(self, data: bytes) -> None:
        self.sent.append(data)

    def await_room(self) -> None:
        self.waited += 1
        self.has_room = True


def test_small_pieces_travel_together_and_a_slow_client_holds_the_cell_up() -> None:
    way, timers = Way(), list[Callable[[], object]]()
    output = CellOutput(way, lambda seconds, function: timers.append(function))
    output.write("stdout", "a")
    output.write("stdout", "b")
    assert (len(timers), way.sent) == (1, [])
    way.has_room = False
    timers[0]()  # in the loop's thread, which must not wait: another time
    assert (len(timers), way.sent) == (2, [])
    way.has_room = True
    timers[1]()
    assert json.loads(way.sent[0])["text"] == "ab"
    output.write("stdout", "x" * (1 << 16))  # much leaves at once
    assert len(way.sent) == 2
    way.has_room = False
    output.write("stdout", "c")
    output.show({"image/png": b"\x89PNG"}, {})
    assert way.waited == 1
    assert json.loads(way.sent[-1])["display"] == {"image/png": "iVBORw=="}


def test_what_cannot_travel_is_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(celloutput, "_KEPT", 150)
    output = CellOutput(None, lambda seconds, function: None)
    for _ in range(5):
        output.show({"text/plain": "x" * 60}, {})
    output._send_soon()
    assert len(output.kept) == 2


def test_only_the_cell_itself_is_listened_to(capsys: pytest.CaptureFixture[str]) -> None:
    outer, inner = (CellOutput(None, lambda seconds, function: None) for _ in range(2))
    with output_to(outer):
        print("outer")  # noqa: T201  # that is what is tested
        with output_to(inner):
            print("inner")  # noqa: T201  # likewise
        stand = sys.stdout
        token = celloutput._OUTPUT.set(None)
        print("elsewhere")  # noqa: T201  # as another thread does
        sys.stdout.flush()
        assert not stand.isatty()
        assert stand.encoding
        celloutput._OUTPUT.reset(token)
    assert capsys.readouterr().out == "elsewhere\n"
    assert [piece["text"] for piece in outer.kept] == ["outer\n"]
    assert [piece["text"] for piece in inner.kept] == ["inner\n"]


def test_a_stream_that_somebody_else_has_taken_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    own = io.StringIO()
    with output_to(CellOutput(None, lambda seconds, function: None)):
        ours = sys.stdout
        monkeypatch.setattr(own, "write", ours.write)  # it writes to what it has replaced
        monkeypatch.setattr(sys, "stdout", own)
    assert sys.stdout is own
    with output_to(CellOutput(None, lambda seconds, function: None)) as _:
        assert sys.stdout is not ours
        token = celloutput._OUTPUT.set(None)
        print("no endless circle")  # noqa: T201  # that is what is tested
        celloutput._OUTPUT.reset(token)


def test_a_stand_in_is_never_freed() -> None:
    with output_to(CellOutput(None, lambda seconds, function: None)):
        ours = sys.stdout
    assert any(ours is stand for stand in celloutput._stands), "another thread's print may be writing to it"


def test_the_server_keeps_output_only_while_somebody_wants_it(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = board.client.servant.session.calls  # type: ignore[union-attr]  # a local session
    board.start(1, "1")
    call = calls.running[0]
    assert call.has_room
    call.emit(b'"x"')
    monkeypatch.setattr("rpcnb.runtime.overlap._ROOM", 1)
    assert not call.has_room
    monkeypatch.setattr("rpcnb.runtime.overlap.time.sleep", lambda seconds: setattr(call, "_stopped", True))
    call.await_room()  # until it is cancelled
    assert call.has_room, "nobody wants it any more"
    assert calls._waiting
    call.emit(b'"late"')
    assert [piece for _, piece in board.records()] == ["x"]
    board.runner.step()
    (outcome,) = read_records(board.call(NEXT))
    assert isinstance(outcome[1], Raised)


def test_the_end_of_a_session_ends_waiting_for_room(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = board.client.servant.session.calls  # type: ignore[union-attr]  # a local session
    board.start(1, "1")
    call = calls.running[0]
    call.emit(b'"x"')
    monkeypatch.setattr("rpcnb.runtime.overlap._ROOM", 0)
    monkeypatch.setattr("rpcnb.runtime.overlap.time.sleep", lambda seconds: setattr(calls, "_closed", True))
    call.await_room()
    calls.close()
    assert not calls._waiting


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (
            "class Odd:\n    def _repr_mimebundle_(self, **k): return {'application/json': {(1, 2): 3}}\nOdd()",
            "TypeError",
        ),
        ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "E"),
    ],
)
def test_an_odd_outcome_is_told_as_such_and_the_next_cell_runs(board: Board, source: str, kind: str) -> None:
    assert board.run(source)["error"]["type"] == kind
    assert board.run("1 + 1")["data"] == {"text/plain": "2"}


def test_what_cannot_be_displayed_says_so() -> None:
    output = CellOutput(None, lambda seconds, function: None)
    output.show({"application/json": {(1, 2): 3}}, {})
    assert output.kept[0]["display"]["text/plain"].startswith("cannot be shown")


def test_a_destructor_that_prints_in_the_middle_of_sending_does_not_wait_for_itself() -> None:
    way, timers = Way(), list[Callable[[], object]]()
    output = CellOutput(way, lambda seconds, function: timers.append(function))
    emit = way.emit

    def collect(data: bytes) -> None:
        emit(data)
        if len(way.sent) == 1:
            output.write("stdout", "gone")  # a destructor's, by the garbage collector
            output.show({"text/plain": "lost"}, {})
            output.flush()

    way.emit = collect  # type: ignore[method-assign]  # for this test
    output.write("stdout", "x" * (1 << 16))
    output.flush()
    assert [json.loads(one)["text"][-4:] for one in way.sent] == ["xxxx", "gone"]
    with output._lock:
        output._send_soon()  # in the loop's thread: it never waits
    assert len(timers) == 1


def test_a_poll_that_waits_takes_output_at_once(board: Board) -> None:
    board.start(1, "print('now', flush=True)")
    board.client.send(CallFunc(board.client.find(NEXT)))
    board.runner.step()
    (piece,) = read_records(value_of(board.client.reply()))
    assert isinstance(piece[1], Emitted)
    assert json.loads(piece[1].data) == {"stream": "stdout", "text": "now\n"}


# -- interrupts ------------------------------------------------------------------------------------------------------


def test_a_cell_that_is_cancelled_before_it_began_never_runs(board: Board) -> None:
    board.start(1, "never = 1")
    assert json.loads(board.call("rpcnb.cells"))[0]["state"] == "queued"
    board.call(CANCEL, 1)
    (cell,) = json.loads(board.call("rpcnb.cells"))
    assert (cell["state"], cell["mine"], cell["name"]) == ("cancelled", True, "cell")
    board.runner.step()
    assert json.loads(board.call("rpcnb.cells")) == []
    assert json.loads(board.call("rpcnb.variables")) == []
    assert board.runner.interrupted == []


def test_a_cell_that_runs_is_interrupted(board: Board) -> None:
    board.environment.registry.register("stop", lambda: board.call(CANCEL, 1))
    found: list[Any] = []

    def stop() -> None:
        board.call(CANCEL, 1)
        found.extend(json.loads(board.call("rpcnb.cells")))
        raise KeyboardInterrupt  # what the runner does in its thread

    namespace = board.cells.namespace(board.client.servant.session)  # type: ignore[arg-type]  # a local session
    namespace["stop"] = stop
    board.start(1, "stop()")
    board.runner.step()
    assert found[0]["state"] == "interrupting"
    assert len(board.runner.interrupted) == 1
    (outcome,) = read_records(board.call(NEXT))
    assert isinstance(outcome[1], Raised)  # nobody waits for it


def test_an_interrupt_at_the_very_end_still_gives_an_answer(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Cells, "execute", interrupted)
    assert board.run("1")["error"]["type"] == "KeyboardInterrupt"


def test_a_runner_must_say_how_it_interrupts() -> None:
    with pytest.raises(NotImplementedError):
        Runner()._raise(None)  # type: ignore[arg-type]  # no job is needed for that


def test_cells_work_without_a_completion(board: Board) -> None:
    results: list[bytes] = []
    session: Any = board.client.servant.session
    board.cells._submit(session, results.append, "6 * 7")  # type: ignore[arg-type]  # a callback's
    board.runner.step()
    assert json.loads(results[0])["data"]["text/plain"] == "42"


# -- variables -------------------------------------------------------------------------------------------------------


def test_variables_are_listed_read_set_and_removed(board: Board) -> None:
    board.run("x = [1, 'a']; _hidden = 2\nimport math")
    assert json.loads(board.call("rpcnb.variables")) == [["x", "list"], ["math", "module"]]
    assert load_variable(board.call("rpcnb.variable", "x"), False) == [1, "a"]
    board.call("rpcnb.set_variable", "y", b'j{"a": 1}')
    assert board.run("y['a']")["data"]["text/plain"] == "1"
    board.call("rpcnb.del_variable", "y")
    reply = board.call("rpcnb.variable", "y")
    assert isinstance(reply, Raised)
    assert "there are x, math" in reply.text
    reply = board.call("rpcnb.set_variable", "not a name", b"j1")
    assert isinstance(reply, Raised)
    assert "expected a variable's name" in reply.text


def test_arrays_are_copied(board: Board) -> None:
    session: Any = board.client.servant.session
    array = np.arange(3.0)
    board.cells._set(session, "a", array)
    array[:] = 0
    assert board.cells.namespace(session)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, [(1,)]], ids=repr)
def test_what_would_come_as_something_else_travels_as_a_pickle_only(value: Any) -> None:
    with pytest.raises(AccessDenied, match="travel only as a pickle"):
        dump_variable(value, False)
    assert load_variable(dump_variable(value, True), True) == value


@pytest.mark.parametrize(
    "value", [None, True, 3, 1 << 80, 1.5, "text", b"bytes", [1, [2]], {"a": None}], ids=lambda value: repr(value)[:12]
)
def test_plain_values_travel_without_pickle(value: Any) -> None:
    assert load_variable(dump_variable(value, False), False) == value


def test_numpys_scalars_are_numbers_and_arrays_stay() -> None:
    assert load_variable(dump_variable(np.float32(1.5), False), False) == 1.5
    assert load_variable(dump_variable(bytearray(b"x"), False), False) == b"x"
    array = np.ones(3)
    assert dump_variable(array, False) is array
    with pytest.raises(AccessDenied, match="travel only as a pickle"):
        dump_variable(np.dtype("float32").newbyteorder, False)


def test_values_of_subclasses_are_what_they_hold_inside_lists_too() -> None:
    class Mode(str, enum.Enum):
        FAST = "fast"

    class Colour(enum.Enum):
        RED = 1

    for value, good in (
        (Mode.FAST, "fast"),
        ([Mode.FAST, np.float64(0.5)], ["fast", 0.5]),
        ({"m": Mode.FAST}, {"m": "fast"}),
    ):
        assert load_variable(dump_variable(value, False), False) == good
    with pytest.raises(AccessDenied, match=r"objects of type Colour travel .* pass \.value, or say pickle=True"):
        dump_variable(Colour.RED, False)


def test_other_objects_need_both_sides_consent() -> None:
    with pytest.raises(AccessDenied, match="say pickle=True"):
        dump_variable({1, 2}, False)
    data = dump_variable({1, 2}, True)
    with pytest.raises(AccessDenied, match="runs code here"):
        load_variable(data, False)
    assert load_variable(data, True) == {1, 2}
    with pytest.raises(ArgumentError, match="a variable"):
        load_variable(b"?", True)


def test_pickles_need_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unpickled(pickled(3)) == 3
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(RpcError, match=r"rpcnb\[exec\]"):
        pickled(3)


# -- consent ---------------------------------------------------------------------------------------------------------


def test_without_consent_the_error_says_how_to_get_it(loop: Loop) -> None:
    board = Board(loop, consent=False)
    for name in ("rpcnb.cell", "rpcnb.cells", "rpcnb.variable", "rpcnb.set_variable"):
        reply = board.call(name, "x", "y")
        assert isinstance(reply, Raised)
        assert reply.type_name == "AccessDenied"
        assert "--allow-exec" in reply.text
    board.client.servant.cancel()


def test_unknown_names_of_cells_are_not_found(board: Board) -> None:
    assert board.cells.serve(board.client.servant.session, "rpcnb.nothing") is None  # type: ignore[arg-type]  # a local session


# -- how values are shown --------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was looked up once is looked up again."""
    monkeypatch.setattr(cellshow._prepared, "done", False, raising=False)
    lookups = cellshow._shell, cellshow._formatter
    for cached in lookups:
        cached.cache_clear()
    yield
    for cached in lookups:
        cached.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_ipython_values_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_ipython(name: str, *args: Any) -> Any:
        if name.startswith("IPython"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_ipython)
    assert cellshow._shell() is None
    assert cellshow._formatter() is None
    cellshow.prepare_display()
    assert cellshow.mime_bundle([1]) == ({"text/plain": "[1]"}, {})


class Publisher:
    """A kernel's, or a terminal's."""

    def __init__(self) -> None:
        self.published: list[Any] = []

    def publish(self, data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        self.published.append(data)


class KernelPublisher(Publisher):
    def register_hook(self, hook: Callable[..., Any]) -> None:
        self.hook = hook


@pytest.mark.usefixtures("fresh")
def test_a_bare_shell_is_made_where_there_is_none_and_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setattr(InteractiveShell, "initialized", lambda: False)
    hooks = sys.displayhook, sys.excepthook
    shell = cellshow._shell()
    assert shell.is_bare
    assert (sys.displayhook, sys.excepthook) == hooks
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    assert registry._notebook_context() is None
    cellshow._shell.cache_clear()
    monkeypatch.setattr(InteractiveShell, "initialized", lambda: True)
    assert cellshow._shell() is shell
    InteractiveShell.clear_instance()


@pytest.mark.usefixtures("fresh")
def test_a_terminals_publisher_shares_what_is_not_a_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher()
    monkeypatch.setattr(cellshow, "_shell", lambda: type("Shell", (), {"display_pub": publisher}))
    cellshow.prepare_display()
    cellshow.prepare_display()  # once is enough
    publisher.publish({"text/plain": "mine"})
    output = CellOutput(None, lambda seconds, function: None)
    with output_to(output):
        publisher.publish({"text/plain": "the cell's"}, {})
    assert publisher.published == [{"text/plain": "mine"}]
    assert output.kept[0]["display"] == {"text/plain": "the cell's"}


@pytest.mark.usefixtures("fresh")
def test_a_kernels_publisher_gives_what_a_cell_displays(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = KernelPublisher()
    monkeypatch.setattr(cellshow, "_shell", lambda: type("Shell", (), {"display_pub": publisher}))
    cellshow.prepare_display()
    content = {"data": {"text/plain": "x"}, "metadata": {}}
    message = {"header": {"msg_type": "display_data"}, "content": content}
    assert publisher.hook(message) is message
    output = CellOutput(None, lambda seconds, function: None)
    with output_to(output):
        assert publisher.hook(message) is None
        stream = {"header": {"msg_type": "stream"}, "content": {}}
        assert publisher.hook(stream) is stream
    assert output.kept == [{"display": {"text/plain": "x"}, "metadata": {}}]


class Figure:
    """Stands in for matplotlib's."""

    def __init__(self, number: int) -> None:
        self.number = number

    def savefig(self, file: Any, format: str, bbox_inches: str) -> None:
        file.write(b"picture")


class Pyplot:
    """Stands in for matplotlib.pyplot."""

    def __init__(self) -> None:
        self.figures: dict[int, Figure] = {1: Figure(1)}

    def get_fignums(self) -> list[int]:
        return list(self.figures)

    def figure(self, number: int) -> Figure:
        return self.figures[number]

    def close(self, number: int) -> None:
        del self.figures[number]


def test_figures_that_a_cell_draws_are_shown_once_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    output = CellOutput(None, lambda seconds, function: None)
    with cellshow.figures_shown(output):
        pass
    pyplot = Pyplot()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    with cellshow.figures_shown(output) as shown:
        pyplot.figures |= {2: Figure(2), 3: Figure(3)}
        shown.value = pyplot.figures[3]  # the last expression: shown as the result
    assert list(pyplot.figures) == [1]
    assert len(output.kept) == 1
    shower = cellshow.figures_shown(output)
    shower.__enter__()
    pyplot.figures[4] = Figure(4)
    assert not shower.__exit__(ValueError, ValueError("boom"), None)
    assert list(pyplot.figures) == [1]
    assert len(output.kept) == 1


def test_a_figure_becomes_a_picture() -> None:
    assert cellshow._picture(Figure(1)) == b"picture"


def test_display_without_a_cell_does_nothing() -> None:
    cellshow.display(1)


def test_in_a_forked_child_the_interrupting_signal_is_nobodys() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        MainThread().forked()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)
