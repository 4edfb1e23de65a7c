"""Calls that overlap at the server: start, next, cancel, cancel_at; and what a function can ask about its call."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from runtime_wire import Client, Loop

import rpcnb
from rpcnb.errors import LimitExceeded, RemoteProtocolError
from rpcnb.protocol.codes import Code, Limits
from rpcnb.protocol.messages import CallFunc, InitServer, Raised, Return, Syscall
from rpcnb.protocol.peerlimits import PeerLimits
from rpcnb.protocol.records import Emitted, read_records, write_record
from rpcnb.runtime import tasks
from rpcnb.runtime.current import CALL
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.overlap import POLL_SECONDS, Calls
from rpcnb.runtime.registry import Registered, Registry
from rpcnb.values import CPU, TensorMeta, dtype

START, NEXT, CANCEL, CANCEL_AT = "rpcnb.start", "rpcnb.next", "rpcnb.cancel", "rpcnb.cancel_at"


class Server:
    """A server without sockets and without time of its own."""

    def __init__(self, loop: Loop, limits: Limits | None = None) -> None:
        self.loop = loop
        self.seen: list[Any] = []
        self.kept: list[Any] = []
        self.jobs: list[Callable[[], object]] = []
        self.kernel: list[Callable[[], object]] = []
        self.timers: list[tuple[float, Callable[[], object]]] = []
        self.cancelled_timers = 0
        registry = Registry()
        registry.register("wait", self.wait)
        registry.register("keep", lambda done, *args: self.kept.append(done), callback=True)
        registry.register("add", lambda a, b: a + b)
        registry.register("ask", lambda: self.seen.append(rpcnb.cancelled()))
        registry.register("fail", self.fail)
        registry.register("exit", self.exit)
        registry.register("much", self.much)
        registry.register("kernel", lambda: "there", run="kernel")
        registry.register("huge", lambda: 1 << 70)
        self.environment = Environment(
            registry=registry,
            spawn=loop.spawn,
            run_in_thread=self.jobs.append,
            run_in_kernel=self.kernel.append,
            later=self.later,
            limits=limits or Limits(),
        )
        self.client = Client(self.environment, extended=True)
        self.handles = {name: self.client.find(name) for name in (*registry.names(), START, NEXT, CANCEL, CANCEL_AT)}

    def later(self, seconds: float, function: Callable[[], object]) -> Callable[[], object]:
        self.timers.append((seconds, function))

        def cancel() -> None:
            self.cancelled_timers += 1

        return cancel

    async def wait(self, what: Any) -> Any:
        try:
            await asyncio.sleep(0 if what != "ever" else 1000)
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise
        return what

    async def fail(self) -> None:
        raise ValueError("boom")

    async def much(self, count: int, fails: bool) -> str:
        if fails:
            raise ValueError("x" * count)
        return "x" * count

    def exit(self) -> None:
        raise KeyboardInterrupt

    def request(self, name: str, *args: Any) -> CallFunc:
        return CallFunc(self.handles[name], args)

    def start(self, number: int, name: str, *args: Any, seconds: float = 0.0) -> None:
        assert self.client.values(self.request(START, number, seconds, self.handles[name], *args)) == (0, None)

    def outcomes(self) -> list[Any]:
        """Collect what has ended."""
        values = self.client.values(self.request(NEXT))
        assert values[0] == 66
        return read_records(values[1])  # type: ignore[arg-type]  # bytes


@pytest.fixture
def server() -> Iterator[Server]:
    loop = Loop()
    made = Server(loop)
    yield made
    made.client.servant.cancel()
    loop.close()


def test_functions_that_may_answer_later_have_marked_handles(server: Server) -> None:
    marked = {name for name, handle in server.handles.items() if handle & 1}
    assert marked == {"wait", "keep", "fail", "much"}
    (missing,) = server.client.values(Syscall(Code.GET_GLOBAL_FUNC, ("rpcnb.nothing",)))
    assert not missing


def test_outcomes_are_collected_in_the_order_of_their_ends(server: Server) -> None:
    server.start(1, "wait", "ever")
    server.start(2, "wait", "soon")
    server.start(3, "fail")
    server.start(4, "add", 1, 2)
    server.start(5, "add", "no", 2)
    server.loop.run()
    (job,) = server.jobs  # plain functions run one after the other in one worker
    job()
    found = dict(server.outcomes())
    assert found[2] == Return((11, "soon"))
    assert found[4] == Return((1, 3))
    assert (found[3].text, found[3].type_name) == ("boom", "ValueError")
    assert found[5].type_name == "TypeError"
    assert 1 not in found
    assert [call.name for call in server.client.local.calls.running] == ["wait"]


def test_a_poll_waits_for_the_next_outcome(server: Server) -> None:
    server.start(1, "wait", "soon")
    assert server.client.ask(server.request(NEXT)) is None
    server.loop.run()
    reply = server.client.reply()
    assert read_records(reply.values[1]) == [(1, Return((11, "soon")))]


def test_a_poll_gives_way_to_what_comes_behind_it(server: Server) -> None:
    client = server.client
    assert client.ask(server.request(NEXT)) is None
    client.send(server.request(START, 1, 0.0, server.handles["wait"], "soon"), server.request(NEXT))
    assert client.reply().values == (66, b"")
    assert client.reply().values == (0, None)
    server.loop.run()
    assert read_records(client.reply().values[1]) == [(1, Return((11, "soon")))]
    assert client.ask(server.request("keep")) is None  # an ordinary parked call does not
    assert client.ask(server.request("add", 1, 2)) is None


def test_a_poll_that_another_thread_completes_does_not_give_way_twice(server: Server) -> None:
    client = server.client
    client.ask(server.request(NEXT))
    calls = client.local.calls
    poll, calls._poll = calls._poll, None  # as a thread does that is about to answer it
    assert client.ask(server.request("add", 1, 2)) is None
    poll((66, b""))  # type: ignore[misc]  # it was there
    assert client.reply().values == (66, b"")
    server.loop.run()


def test_a_poll_that_is_replaced_is_answered(server: Server) -> None:
    calls, first, second = server.client.local.calls, _Outcome(), _Outcome()
    calls.next(first, ())
    calls.next(second, ())
    assert (first.results, second.results) == ([(66, b"")], [])
    calls.give_way()
    calls.give_way()
    assert second.results == [(66, b"")]


def test_a_poll_is_answered_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, done = server.client.local.calls, _Outcome()
    calls.next(done, ())
    ((seconds, look),) = server.timers
    assert seconds == POLL_SECONDS
    look()  # too early: it is looked at again
    ((_, _), (left, again)) = server.timers
    assert POLL_SECONDS - 1 < left <= POLL_SECONDS
    calls._polled -= POLL_SECONDS
    again()
    assert done.results == [(66, b"")]
    calls._answer_in_time()  # nobody polls
    assert len(server.timers) == 2


class _Outcome:
    def __init__(self) -> None:
        self.results: list[Any] = []
        self.errors: list[BaseException] = []
        self.cancelled = False
        self.gives_way: Any = None

    def __call__(self, result: Any = None) -> None:
        self.results.append(result)

    def error(self, error: BaseException) -> None:
        self.errors.append(error)


# -- giving up ---------------------------------------------------------------------------------------------------------


def test_cancel_ends_a_coroutine_and_answers_for_anything_else(server: Server) -> None:
    server.start(1, "wait", "ever")
    server.start(2, "keep")
    server.loop.run()
    assert not server.kept[0].cancelled
    for number in (1, 2, 1):
        assert server.client.values(server.request(CANCEL, number)) == (0, None)
    assert server.kept[0].cancelled
    server.kept[0](5)
    server.loop.run()
    assert server.seen == ["cancelled"]
    found = server.outcomes()
    assert sorted(number for number, _ in found) == [1, 2]
    assert {reply.type_name for _, reply in found} == {"CancelledError"}


def test_a_cancel_may_come_before_its_call(server: Server) -> None:
    server.client.values(server.request(CANCEL, 7))
    server.start(7, "add", 1, 2)
    assert not server.jobs
    ((number, reply),) = server.outcomes()
    assert (number, reply.type_name) == (7, "CancelledError")
    for number in range(2000):
        server.client.local.calls.cancel(_Outcome(), (number,))
    assert len(server.client.local.calls._early) == 1024


def test_a_plain_call_that_was_cancelled_in_the_queue_does_not_run(server: Server) -> None:
    server.start(1, "ask")
    server.start(2, "ask")
    server.client.values(server.request(CANCEL, 2))
    server.jobs[0]()
    assert server.seen == [False]


def test_a_plain_call_can_ask_whether_it_was_cancelled(server: Server) -> None:
    registry = server.environment.registry

    def cancel_and_ask() -> None:
        server.client.local.calls.cancel(_Outcome(), (1,))
        server.seen.append(rpcnb.cancelled())

    registry.register("both", cancel_and_ask)
    server.handles["both"] = server.client.find("both")
    server.start(1, "both")
    server.jobs[0]()
    assert server.seen == [True]
    assert not rpcnb.cancelled()


def test_a_time_limit_ends_a_call_and_its_timer_ends_with_it(server: Server) -> None:
    server.start(1, "wait", "ever", seconds=3.5)
    server.start(2, "wait", "soon", seconds=9.0)
    server.loop.run()
    (first, end), (second, _) = server.timers
    assert (first, second) == (3.5, 9.0)
    assert server.cancelled_timers == 1
    end()
    server.loop.run()
    assert [number for number, _ in server.outcomes()] == [2, 1]


def test_the_end_of_the_session_ends_its_calls(server: Server) -> None:
    server.start(1, "wait", "ever")
    server.start(2, "ask")
    server.loop.run()
    server.client.servant.cancel()
    server.loop.run()
    assert server.seen == ["cancelled"]
    server.jobs[0]()
    assert server.seen == ["cancelled"]


def test_an_interrupt_in_a_worker_is_the_calls_own(server: Server) -> None:
    server.start(1, "exit")
    server.jobs[0]()
    ((_, reply),) = server.outcomes()
    assert reply.type_name == "KeyboardInterrupt"


def test_functions_of_the_kernel_run_there(server: Server) -> None:
    server.start(1, "kernel")
    (job,) = server.kernel
    job()
    assert server.outcomes() == [(1, Return((11, "there")))]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused(server: Server) -> None:
    client = server.client
    server.start(1, "wait", "ever")
    wrong: list[tuple[str, tuple[Any, ...], str]] = [
        (START, (), "3 numbers"),
        (START, (1, 0.0), "3 numbers"),
        (START, ("x", 0.0, 1), "3 numbers"),
        (START, (1, 0.0, server.handles["wait"]), "a new number"),
        (CANCEL, ("x",), "1 numbers"),
        (CANCEL_AT, (), "1 numbers"),
    ]
    for name, args, text in wrong:
        assert text in client.call_error(server.handles[name], *args)
    client.local.calls._most = 1
    assert "not collected yet" in client.call_error(server.handles[START], 2, 0.0, server.handles["wait"], "ever")


def test_what_cannot_be_called_is_an_outcome(server: Server) -> None:
    assert server.client.values(server.request(START, 1, 0.0, 12345)) == (0, None)
    server.start(2, "huge")
    server.jobs[0]()
    found = dict(server.outcomes())
    assert "never issued" in found[1].text
    assert found[2].type_name == "ResultError"


def test_an_outcome_that_cannot_be_packed_is_an_error(server: Server) -> None:
    calls = server.client.local.calls
    done = _Outcome()
    calls.start(done, (1, 0.0, server.handles["keep"]))
    (call,) = calls.running
    call((1, object()))
    ((_, reply),) = server.outcomes()
    assert isinstance(reply, Raised)


def test_outcomes_come_in_as_many_answers_as_the_client_takes(server: Server) -> None:
    calls = server.client.local.calls
    calls.takes = PeerLimits(text=1000, bytes=1000)
    for number in (1, 2, 3):
        server.start(number, "wait", "x" * 300)
    server.start(4, "wait", b"x" * 990)
    server.start(5, "wait", "x" * 1001)
    server.loop.run()
    first, second = dict(server.outcomes()), dict(server.outcomes())
    assert [*first, *second][:3] == [1, 2, 3]
    rest = first | second
    while 5 not in rest:
        rest |= dict(server.outcomes())
    assert rest[1] == Return((65, "x" * 300))
    assert "the encoded result of 1038 bytes exceeds the client's bytes_argument=1000" in rest[4].text
    assert "the text result of 1001 bytes exceeds the client's text=1000" in rest[5].text
    assert server.client.ask(server.request(NEXT)) is None


def test_the_client_of_a_handshake_tells_what_its_records_may_hold() -> None:
    client = Client(extended=True, init=None)
    client.servant.endpoint.takes = PeerLimits(text=1000, bytes=2000)
    assert client.ask(InitServer()) == Return((None,))
    assert client.local.calls.takes == PeerLimits(text=500, bytes=2000)
    client.servant.cancel()


def test_output_that_the_client_does_not_take_ends_its_call(server: Server) -> None:
    server.start(1, "keep")
    calls = server.client.local.calls
    calls.takes = PeerLimits(text=1000, bytes=1000)
    (call,) = calls.running
    call.emit(b"x" * 900)
    call.emit(b"x" * 1000)
    outcomes = server.outcomes() + server.outcomes()
    assert outcomes[0] == (1, Emitted(b"x" * 900))
    assert "the shown result of 1036 bytes exceeds the client's bytes_argument=1000" in outcomes[1][1].text
    assert calls.running == []


def test_an_errors_text_is_made_printable_in_a_record(server: Server) -> None:
    session = server.client.local
    session.calls.start(_Outcome(), (1, 0.0, server.handles["keep"]))
    (call,) = session.calls.running
    call.error(ValueError("a\0b\ud800"))
    ((_, reply),) = server.outcomes()
    assert reply.text == "a\\x00b\\ud800"


def test_an_error_without_a_text_is_an_outcome_too(server: Server) -> None:
    class Broken(LocalServingSession):
        def send_exception(self, error: BaseException) -> Raised:
            raise RuntimeError

        def placement(self, request: CallFunc) -> str:
            raise ValueError

    session = Broken(server.environment)
    done = _Outcome()
    session.calls.start(done, (1, 0.0, 5))
    session.calls.next(done, ())
    ((_, reply),) = read_records(done.results[1][1])
    assert reply == Raised("ValueError without a text: RuntimeError while making it")
    session.shutdown()


@pytest.mark.parametrize("cut", [1, 10, 21, 24, 27])
def test_records_that_are_cut_are_refused(cut: int) -> None:
    record = write_record(1, Return((11, "text")))
    with pytest.raises(RemoteProtocolError, match="expected"):
        read_records(record + record[:cut])


def test_records_that_are_damaged_are_refused() -> None:
    record = bytearray(write_record(1, Raised("a", "b", "c")))
    assert read_records(bytes(record)) == [(1, Raised("a", "b", "c"))]
    for place, value in ((8, 9), (20, 2), (20, 9), (12, 1), (12, 255), (27, 255)):
        damaged = bytearray(record)
        damaged[place] = value
        with pytest.raises(RemoteProtocolError, match="expected"):
            read_records(bytes(damaged))
    result = bytearray(write_record(1, Return((1, 2))))
    result[8] = 2
    with pytest.raises(RemoteProtocolError, match="kind 2"):
        read_records(bytes(result))


# -- requests by their number ------------------------------------------------------------------------------------------


def test_cancel_at_ends_a_parked_request_of_its_number(server: Server) -> None:
    client, servant = server.client, server.client.servant
    client.ask(server.request("keep"))
    number = servant.ordinal
    calls = client.local.calls
    calls.cancel_at(_Outcome(), (0, number - 1, "x", number))
    assert client.reply().type_name == "CancelledError"
    assert servant.parked is None
    client.ask(server.request("wait", "ever"))
    server.loop.run()
    calls.cancel_at(_Outcome(), (0, servant.ordinal))
    server.loop.run()
    assert client.reply().text == "the call was cancelled"
    assert server.seen == ["cancelled"]
    calls.cancel_at(_Outcome(), (5, 1))  # no such lane


def test_a_request_that_was_cancelled_before_it_came_is_not_begun(server: Server) -> None:
    client, servant = server.client, server.client.servant
    servant.cancel_request(servant.ordinal + 2)
    assert client.call(server.handles["ask"]) == (0, None)
    assert client.error(server.request("ask")).text == "the call was cancelled"
    servant.cancel_request(servant.ordinal + 1)
    meta = TensorMeta(0, CPU, (4,), dtype("uint8"))
    assert isinstance(client.ask(Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (meta, None))), Return)  # calls only
    assert len(server.seen) == 1
    for number in range(5000):
        servant.cancel_request(servant.ordinal + 1 + number)
    assert len(servant._stopped) == 4096
    servant.cancel()
    servant.cancel_request(servant.ordinal)
    assert servant.cancelled


def test_a_call_that_is_cancelled_while_it_is_being_started_ends(server: Server) -> None:
    servant = server.client.servant
    server.environment.registry.register("now", lambda done: servant.cancel_request(servant.ordinal), callback=True)
    assert server.client.call_error("now") == "the call was cancelled"


def test_a_coroutine_that_is_cancelled_before_it_is_bound_ends(server: Server) -> None:
    from rpcnb.runtime.overlap import Started
    from rpcnb.runtime.servant import Completion

    ended: list[str] = []
    call = Started(server.client.local.calls, 99, "late")
    call._stopped = True
    call.bind(lambda: ended.append("started"))
    completion = Completion(server.client.servant, "late", Return, True)
    completion._stopped = True
    completion.bind(lambda: ended.append("parked"))
    assert ended == ["started", "parked"]
    assert completion.cancelled


def test_a_function_of_a_cell_sees_its_session_and_call(server: Server) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append((rpcnb.workpath("x"), rpcnb.cancelled()))

    entry = Registered("look", look, context=contextvars.copy_context())
    server.environment.registry._functions = {**server.environment.registry._functions, "look": entry}
    server.client.call("look")
    ((path, cancelled),) = seen
    assert path.endswith("x")
    assert not cancelled
    assert CALL.get() is None


# -- lanes -------------------------------------------------------------------------------------------------------------


def test_a_lane_shares_the_session_and_ends_alone(server: Server) -> None:
    from rpcnb.protocol.codes import Role
    from rpcnb.protocol.endpoint import Endpoint
    from rpcnb.protocol.messages import InitServer
    from rpcnb.runtime.servant import Servant

    shared: list[Any] = [server.client.local]
    ends = [Endpoint(Role.CLIENT), Endpoint(Role.SERVER)]
    lane = Servant(ends[1], server.environment, shares=lambda: shared[0], lane=2)
    lane.extended = True

    def ask(message: Any) -> Any:
        for part in ends[0].send(message):
            ends[1].receive_data(bytes(part))
        lane.advance()
        for part in lane.output.first(10):
            ends[0].receive_data(bytes(part))
        lane.output.clear()
        return ends[0].next_message()

    assert isinstance(ask(InitServer(())), Return)
    assert lane.session is server.client.local
    assert server.client.local.calls.lanes[2] is lane
    assert ask(server.request("add", 1, 2)) == Return((1, 3))
    lane.cancel()
    assert server.client.call(server.handles["add"], 3, 4) == (1, 7)
    late = Servant(Endpoint(Role.SERVER), server.environment, shares=lambda: shared[0], lane=3)
    late.over = True
    late._initialized(server.client.local)
    assert late.session is None
    shared[0] = None
    ends = [Endpoint(Role.CLIENT), Endpoint(Role.SERVER)]
    lane = Servant(ends[1], server.environment, shares=lambda: shared[0], lane=2)
    assert "session of this lane is over" in ask(InitServer(())).text


def test_calls_are_made_once(server: Server) -> None:
    session = LocalServingSession(server.environment)
    assert isinstance(session.calls, Calls)
    assert session.calls is session.calls
    session.shutdown()


def test_without_a_server_threads_run_and_wait() -> None:
    import threading

    done = threading.Event()
    tasks.thread_anywhere(done.set)
    assert done.wait(5)
    rung = threading.Event()
    tasks.later_anywhere(0.001, rung.set)
    assert rung.wait(5)
    tasks.later_anywhere(1000, rung.clear)()
    assert rung.is_set()


def test_what_no_worker_takes_is_answered(server: Server) -> None:
    def refuse(job: Callable[[], object]) -> None:
        raise LimitExceeded("512 functions go on running here")

    server.environment.run_in_thread = refuse
    server.start(1, "add", 1, 2)
    ((number, outcome),) = server.outcomes()
    assert (number, outcome.text, outcome.type_name) == (1, "512 functions go on running here", "LimitExceeded")
    server.environment.run_in_thread = server.jobs.append
    server.start(2, "add", 1, 2)
    server.jobs.pop()()
    assert server.outcomes() == [(2, Return((1, 3)))]


def test_outcomes_that_nobody_collects_are_bounded() -> None:
    loop = Loop()
    server = Server(loop, Limits(outcomes=5000))
    for number in (1, 2, 3, 4):
        server.start(number, "much", 2000 if number < 3 else 3000, number == 3)
        loop.run()
    found = dict(server.outcomes())
    assert found[1] == found[2] == Return((65, "x" * 2000))
    assert (found[3].text, found[3].type_name) == ("x" * 200, "ValueError")  # shortened
    assert "bytes of outcomes are not collected, outcomes=5000; collect some first" in found[4].text
    server.start(5, "much", 3000, False)
    loop.run()
    assert server.outcomes() == [(5, Return((65, "x" * 3000)))]
    server.client.servant.cancel()
    loop.close()


def test_arguments_of_calls_that_have_not_ended_are_bounded() -> None:
    loop = Loop()
    server = Server(loop, Limits(outcomes=5000))
    for number in (1, 2):
        server.start(number, "add", "x" * 2000, "y")
    third = server.request(START, 3, 0.0, server.handles["add"], "x" * 2000, "y")
    error = "started calls hold 4002 bytes of arguments and outcomes, outcomes=5000; collect some first"
    assert server.client.error(third).text == error
    assert server.client.values(server.request(CANCEL, 2)) == (0, None)  # what is given up holds nothing any more
    server.outcomes()
    assert server.client.values(third) == (0, None)
    server.jobs.pop()()
    assert dict(server.outcomes()) == {1: Return((65, "x" * 2000 + "y")), 3: Return((65, "x" * 2000 + "y"))}
    server.start(4, "add", "x" * 9000, "y")  # one may be as large as a packet may
    server.client.servant.cancel()
    loop.close()
