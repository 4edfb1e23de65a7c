"""Operations as flows, driven by hand: what each asks, and what the replies mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rpcnb.errors import RemoteError, RemoteProtocolError, SessionTimeout
from rpcnb.protocol import flows
from rpcnb.protocol.codes import Code
from rpcnb.protocol.flows import Flow, Send, SendCalls, TensorResult, Wait, call_result, result_of, undo
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Raised,
    Reply,
    Request,
    Return,
    Syscall,
)
from rpcnb.protocol.shortcut import NOT_PLAIN
from rpcnb.values import CPU, NULL, DType, FunctionRef, ModuleRef, ObjectRef, Pointer, TensorMeta, Value

META = TensorMeta(7, CPU, (20,), DType(0, 32), 16)
P5 = Pointer(5)


def run(flow: Flow[Any], *replies: Reply) -> tuple[list[Request], Any]:
    """Answer a flow's requests in order; returns what it asked and its result. A ticket is a position."""
    asked: list[Request] = []
    waiting: Iterator[Reply] = iter(replies)
    outcome: Any = None
    while True:
        try:
            step = flow.send(outcome)
        except StopIteration as end:
            return asked, end.value
        if isinstance(step, Send):
            asked.append(step.request)
            outcome = len(asked) - 1
        elif isinstance(step, Wait):
            assert step.ticket < len(asked)
            outcome = next(waiting)
        else:
            assert not isinstance(step, SendCalls)
            asked.append(step)
            outcome = next(waiting)


class Settled:
    """A ticket that is done: with a plain value, or with a reply."""

    def __init__(self, value: Any = NOT_PLAIN, reply: Reply | None = None) -> None:
        self.value = value
        self.reply = reply

    def result(self) -> Reply:
        assert self.reply is not None
        return self.reply


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_many_calls_go_in_windows_two_of_them_on_the_way(window: int) -> None:
    failed = Settled(reply=Raised("no"))
    outcomes = [Settled(0), Settled(reply=Return((11, "one"))), failed, Settled(reply=Return()), Settled(4)]
    flow = flows.map_calls(7, [(number,) for number in range(5)], window, lambda result: (result,))
    sent: list[tuple[Any, ...]] = []
    on_the_way = most = 0
    step = next(flow)
    with pytest.raises(StopIteration) as end:  # noqa: PT012  # whichever step is the last
        while True:
            if isinstance(step, SendCalls):
                assert step.handle == 7
                tickets = outcomes[len(sent) : len(sent) + len(step.calls)]
                sent += step.calls
                on_the_way += len(tickets)
                most = max(most, on_the_way)
                step = flow.send(tickets)
            else:
                assert isinstance(step, Wait)
                on_the_way -= min(window, on_the_way)
                step = flow.send(None)
    results = end.value.value
    assert sent == [(number,) for number in range(5)]
    assert most <= 2 * window
    assert [results[0], results[1], results[4]] == [0, ("one",), 4]
    assert isinstance(results[2], RemoteError)
    assert isinstance(results[3], RemoteProtocolError)


SIMPLE: list[tuple[Flow[Any], Request, Reply, Any]] = [
    (flows.initialize(), InitServer(), Return(), None),
    (flows.initialize(("x", 1)), InitServer(("x", 1)), Return(), None),
    (flows.get_function("f"), Syscall(Code.GET_GLOBAL_FUNC, ("f",)), Return((P5,)), 5),
    (flows.get_function("f"), Syscall(Code.GET_GLOBAL_FUNC, ("f",)), Return((NULL,)), 0),
    (flows.get_function("f"), Syscall(Code.GET_GLOBAL_FUNC, ("f",)), Return((None,)), 0),
    (flows.call_function(9, ("a",)), CallFunc(9, ("a",)), Return((1, 5)), 5),
    (flows.call_function(9, ()), CallFunc(9), Return((11, "abc")), "abc"),
    (flows.free_handle(5), Syscall(Code.FREE_HANDLE, (P5,)), Return(), None),
    (flows.set_device(CPU), Syscall(Code.DEV_SET_DEVICE, (CPU,)), Return(), None),
    (flows.get_attribute(CPU, 3), Syscall(Code.DEV_GET_ATTR, (CPU, 3)), Return(("text",)), "text"),
    (flows.get_attribute(CPU, 3), Syscall(Code.DEV_GET_ATTR, (CPU, 3)), Return(), None),
    (flows.allocate(META, None), Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (META, None)), Return((P5,)), 5),
    (flows.allocate(META, "global"), Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (META, "global")), Return((P5,)), 5),
    (
        flows.allocate_bytes(CPU, 8, 64, DType(0, 8)),
        Syscall(Code.DEV_ALLOC_DATA, (CPU, 8, 64, DType(0, 8))),
        Return((P5,)),
        5,
    ),
    (flows.free_data(CPU, 5), Syscall(Code.DEV_FREE_DATA, (CPU, P5)), Return(), None),
    (flows.create_stream(CPU), Syscall(Code.DEV_CREATE_STREAM, (CPU,)), Return((NULL,)), 0),
    (flows.current_stream(CPU), Syscall(Code.DEV_GET_CURRENT_STREAM, (CPU,)), Return((P5,)), 5),
    (flows.free_stream(CPU, 5), Syscall(Code.DEV_FREE_STREAM, (CPU, P5)), Return(), None),
    (flows.set_stream(CPU, 5), Syscall(Code.DEV_SET_STREAM, (CPU, P5)), Return(), None),
    (flows.sync_stream(CPU), Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL)), Return(), None),
    (
        flows.copy_among_remote(META, META),
        Syscall(Code.COPY_AMONG_REMOTE, (META, META, NULL)),
        Return(),
        None,
    ),
]


@pytest.mark.parametrize(("flow", "request_", "reply", "result"), SIMPLE, ids=[str(one[1]) for one in SIMPLE])
def test_an_operation_of_one_exchange(flow: Flow[Any], request_: Request, reply: Reply, result: Any) -> None:
    assert run(flow, reply) == ([request_], result)


def test_a_reply_is_its_values_or_raises() -> None:
    assert result_of(Return((1, 2))) == (1, 2)
    with pytest.raises(RemoteError, match="ValueError: boom") as remote:
        result_of(Raised("boom", "ValueError", "line 1"))
    assert (remote.value.message, remote.value.remote_type, remote.value.remote_traceback) == (
        "boom",
        "ValueError",
        "line 1",
    )
    with pytest.raises(SessionTimeout, match=r"^Your 1.0s session has expired$"):
        result_of(Raised("RPCSessionTimeoutError: Your 1.0s session has expired"))
    with pytest.raises(RemoteProtocolError, match="expected a result, got CopyAck"):
        result_of(CopyAck())


@pytest.mark.parametrize(
    ("flow", "reply", "words"),
    [
        (flows.get_function("f"), Return((1, 2)), "expected one result, got 2"),
        (flows.get_function("f"), Return((5,)), "expected a handle, got int"),
        (flows.get_attribute(CPU, 1), Return(()), "expected one result, got 0"),
        (flows.call_function(1, ()), Return((5,)), "expected a type index and a result, got 1 values"),
        (flows.call_function(1, ()), Return(("x", 5)), "expected a type index and a result, got 2 values"),
        (flows.call_function(1, ()), Return((70, META)), "expected a tensor and its handle"),
        (flows.call_function(1, ()), Return((70, P5, P5)), "expected a tensor and its handle"),
        (flows.call_function(1, ()), Return((70, META, 5)), "expected a tensor and its handle"),
        (flows.call_function(1, ()), Return((68, 5)), "expected the handle of an object of type 68, got int"),
        (flows.call_function(1, ()), CopyAck(), "expected a result, got CopyAck"),
    ],
)
def test_a_reply_that_does_not_fit_breaks_the_protocol(flow: Flow[Any], reply: Reply, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        run(flow, reply)


def test_an_exception_is_raised_inside_the_flow() -> None:
    for flow in (flows.call_function(1, ()), flows.initialize(), flows.free_handle(1), flows.get_attribute(CPU, 1)):
        with pytest.raises(RemoteError, match="boom"):
            run(flow, Raised("boom"))


@pytest.mark.parametrize(
    ("values", "result"),
    [
        ((0, None), None),
        ((0, P5), None),
        ((1, 5), 5),
        ((2, True), True),
        ((3, 1.5), 1.5),
        ((4, P5), P5),
        ((5, DType(0, 8)), DType(0, 8)),
        ((6, CPU), CPU),
        ((7, META), META),
        ((7, META, P5), TensorResult(META, 5)),
        ((70, META, P5), TensorResult(META, 5)),
        ((11, "a"), "a"),
        ((65, "a"), "a"),
        ((12, b"a"), b"a"),
        ((66, b"a"), b"a"),
        ((66, ""), ""),
        ((68, P5), FunctionRef(5)),
        ((73, P5), ModuleRef(5)),
        ((69, P5), ObjectRef(5)),
        ((128, P5), ObjectRef(5)),
        ((1, "the payload's own type decides"), "the payload's own type decides"),
    ],
)
def test_a_calls_result_is_interpreted(values: tuple[Value, ...], result: flows.Result) -> None:
    found = call_result(values)
    assert found == result
    assert type(found) is type(result)
    assert run(flows.call_function(1, ()), Return(values))[1] == result


# -- chunked copies ------------------------------------------------------------------------------------------------

LOOKUP = Syscall(Code.GET_GLOBAL_FUNC, ("tvm.rpc.server.GetCRTMaxPacketSize",))


@pytest.mark.parametrize(
    ("replies", "asked", "limit"),
    [
        ([Return((NULL,))], [LOOKUP], 0),
        ([Return((P5,)), Return((1, 100))], [LOOKUP, CallFunc(5)], 100),
        ([Return((P5,)), Return((1, -1))], [LOOKUP, CallFunc(5)], 0),
        ([Return((P5,)), Return((11, "x"))], [LOOKUP, CallFunc(5)], 0),
    ],
)
def test_the_packet_limit_is_asked_for(replies: list[Reply], asked: list[Request], limit: int) -> None:
    assert run(flows.chunk_limit(), *replies) == (asked, limit)


def test_a_copy_within_a_limit_of_100_bytes_has_blocks_of_48_bytes() -> None:
    assert flows.block_size(100, META) == 48
    assert flows.block_size(45, META._replace(shape=())) == 1
    data = memoryview(bytearray(range(80)))
    asked, _ = run(flows.copy_to_remote(META, data, limit=100), Return(), Return())
    assert asked == [CopyToRemote(META, 48, data[:48]), CopyToRemote(META.at(48), 32, data[48:])]
    assert [request.meta.byte_offset for request in asked if isinstance(request, CopyToRemote)] == [16, 64]
    asked, _ = run(flows.copy_from_remote(META, data, limit=100, sync=True), CopyAck(), CopyAck(), Return())
    assert asked == [
        CopyFromRemote(META, 48, data[:48]),
        CopyFromRemote(META.at(48), 32, data[48:]),
        Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL)),
    ]


def test_a_limit_without_room_for_data_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="expected a packet limit above 52 bytes, got 52"):
        run(flows.copy_to_remote(META, memoryview(b"abcd"), limit=52))


def test_without_a_limit_a_copy_is_one_packet_of_the_callers_own_memory() -> None:
    data = memoryview(bytearray(1 << 20))
    asked, _ = run(flows.copy_to_remote(META, data, sync=True), Return(), Return())
    assert asked == [CopyToRemote(META, 1 << 20, data), Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL))]
    assert isinstance(asked[0], CopyToRemote)
    assert isinstance(asked[0].payload, memoryview)
    assert asked[0].payload.obj is data.obj


def test_a_pace_says_how_large_the_parts_are() -> None:
    class Growing:
        size = 4

        def __init__(self) -> None:
            self.seen: list[int] = []

        def moved(self, nbytes: int) -> None:
            self.seen.append(nbytes)
            self.size *= 2

    pace, data = Growing(), memoryview(bytearray(48))
    flow = flows.copy_to_remote(META, data, pace=pace)
    step: Any = next(flow)
    sizes: list[int] = []
    try:
        while True:
            if isinstance(step, Send):
                assert isinstance(step.request, CopyToRemote)
                sizes.append(step.request.nbytes)
                step = flow.send(len(sizes))
            else:
                step = flow.send(Return())
    except StopIteration:
        pass
    assert sizes == [4, 4, 4, 4, 4, 8, 16, 4]
    assert pace.seen == [4, 4, 4, 4]


def test_a_copy_of_nothing_sends_no_copy() -> None:
    assert run(flows.copy_to_remote(META, memoryview(b""))) == ([], None)
    assert run(flows.copy_from_remote(META, memoryview(bytearray()), limit=100, sync=True), Return()) == (
        [Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL))],
        None,
    )


def test_at_most_five_chunks_are_on_the_way() -> None:
    flow = flows.copy_from_remote(META, memoryview(bytearray(480)), limit=100)
    step, sent, most = next(flow), 0, 0
    answered = 0
    try:
        while True:
            if isinstance(step, Send):
                sent += 1
                most = max(most, sent - answered)
                step = flow.send(sent)
            else:
                assert isinstance(step, Wait)
                answered += 1
                assert step.ticket == answered, "replies are awaited in order"
                step = flow.send(CopyAck())
    except StopIteration:
        pass
    assert (sent, answered, most) == (10, 10, 5)


def test_a_failed_chunk_raises() -> None:
    with pytest.raises(RemoteError, match="out of range"):
        run(flows.copy_to_remote(META, memoryview(bytes(80)), limit=100), Return(), Raised("out of range"))
    with pytest.raises(RemoteError, match="out of range"):
        run(flows.copy_from_remote(META, memoryview(bytearray(480)), limit=100), Raised("out of range"))


# -- undo ----------------------------------------------------------------------------------------------------------

FREE_HANDLE = [Syscall(Code.FREE_HANDLE, (P5,))]
FREE_DATA = [Syscall(Code.DEV_FREE_DATA, (CPU, P5))]


@pytest.mark.parametrize(
    ("request_", "reply", "undone"),
    [
        (CallFunc(1), Return((68, P5)), FREE_HANDLE),
        (CallFunc(1), Return((70, META, P5)), FREE_HANDLE),
        (CallFunc(1), Return((128, P5)), FREE_HANDLE),
        (CallFunc(1), Return((4, P5)), []),
        (CallFunc(1), Return((1, 5)), []),
        (CallFunc(1), Return(("x", P5)), []),
        (CallFunc(1), Raised("boom"), []),
        (CallFunc(1), Return(()), []),
        (Syscall(Code.GET_GLOBAL_FUNC, ("f",)), Return((P5,)), FREE_HANDLE),
        (Syscall(Code.GET_GLOBAL_FUNC, ("f",)), Return((NULL,)), []),
        (Syscall(Code.DEV_ALLOC_DATA, (CPU, 8, 64, DType(0, 8))), Return((P5,)), FREE_DATA),
        (Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (META, None)), Return((P5,)), FREE_DATA),
        (Syscall(Code.DEV_GET_CURRENT_STREAM, (CPU,)), Return((P5,)), []),
        (Syscall(Code.DEV_GET_ATTR, (CPU, 1)), Return((5,)), []),
        (CopyFromRemote(META, 4), CopyAck(), []),
        (InitServer(), Return((P5,)), []),
    ],
)
def test_what_an_abandoned_reply_brought_is_released(request_: Request, reply: Reply, undone: list[Request]) -> None:
    assert undo(request_, reply) == undone
