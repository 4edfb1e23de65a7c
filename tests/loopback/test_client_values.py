"""What people give and get is what travels, whichever way it goes; or it is refused by name."""

from __future__ import annotations

import asyncio
import copy
import enum
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rpcnb
from rpcnb.errors import AccessDenied, ArgumentError, CopyMismatch, RemoteError
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]
PLAIN = np.array([[1.0, 2.0], [3.0, 4.0]])


class Mode(str, enum.Enum):
    FAST = "fast"


class Colour(enum.Enum):
    RED = "red"


class Raw(bytes):
    def __len__(self) -> int:
        return 1 << 40


class Own(np.ndarray[Any, Any]):
    def __len__(self) -> int:
        return 7


@pytest.fixture
def session(serve: Serve, registry: Registry) -> Iterator[rpcnb.Session]:
    async def later(x: Any) -> Any:
        return x

    registry.register("sum", lambda x: float(x.sum()))
    registry.register("echo", lambda x: x)
    registry.register("later", later)
    registry.register("kind", lambda x: type(x).__name__)
    registry.register("raw", lambda: Raw(b"abc"))
    registry.register("masked", lambda: np.ma.masked_array([1.0], mask=[True]))
    with rpcnb.connect(serve(allow_exec=True, token="t").address, token="t") as made:
        yield made


@pytest.mark.parametrize("value", ["2026-11-26T00:00:00.000000001", "2026-11-26", "NaT"])
def test_dates_never_become_numbers_without_their_unit(session: rpcnb.Session, registry: Registry, value: str) -> None:
    date = np.datetime64(value)
    with pytest.raises(ArgumentError):
        session.call("echo", date)
    with pytest.raises(ArgumentError):
        session.get_function("later").submit(date - date).result(10)
    registry.register("date", lambda: date)
    registry.register("is_date", lambda x: x is date)
    assert session.call("is_date", session.call("date"))  # an object that goes back as it is
    with pytest.raises(AccessDenied):
        session.namespace["date"] = date


def test_a_number_too_wide_for_the_wire_is_refused_by_name(session: rpcnb.Session) -> None:
    wide = np.ones(2, np.clongdouble)
    for give in (session.array, lambda x: session.call("echo", x)):
        with pytest.raises((CopyMismatch, ArgumentError), match="has no counterpart on the wire"):
            give(wide)


def test_what_a_submitted_call_raised_is_raised_anew_each_time(session: rpcnb.Session) -> None:
    pending = session.get_function("sum").submit(1)

    def depth(error: BaseException) -> int:
        trace, count = error.__traceback__, 0
        while trace is not None:
            trace, count = trace.tb_next, count + 1
        return count

    async def wait() -> None:
        await pending

    depths = set()
    for _ in range(3):
        with pytest.raises(RemoteError) as raised:
            asyncio.run(wait())
        depths.add(depth(raised.value))
        kept = pending.exception(10)
        assert kept is not None
        with pytest.raises(RemoteError) as raised:
            raise kept
        depths.add(-depth(raised.value))
    assert len(depths) == 2


@pytest.fixture(params=["matrix", "masked", "memmap", "own"])
def array(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "matrix":
        return PLAIN.copy().view(np.matrix)
    if request.param == "masked":
        return np.ma.masked_array(PLAIN.copy())
    if request.param == "own":
        return PLAIN.copy().view(Own)
    found = np.memmap(tmp_path / "array", "float64", "w+", shape=(2, 2))
    found[...] = PLAIN
    return found


def test_an_array_of_a_subclass_travels_whichever_way_it_is_given(session: rpcnb.Session, array: Any) -> None:
    assert (session.array(array).numpy() == PLAIN).all()
    assert (session.empty((2, 2), "float64").copyfrom(array).numpy() == PLAIN).all()
    total = session.get_function("sum")
    assert (total(array), total.submit(array).result(10)) == (10.0, 10.0)
    back = session.get_function("later").submit(array).result(10)
    assert (back.numpy() == PLAIN).all()
    assert [one.shape for one in session.get_function("later").map([array])] == [(2, 2)]
    with pytest.raises(ArgumentError, match="argument 0 is a numpy array"):
        total.map([array])
    session.namespace["x"] = array
    assert type(session.namespace["x"]) is np.ndarray
    assert (session.namespace["x"] == PLAIN).all()


def test_a_copy_goes_into_an_array_of_a_subclass(session: rpcnb.Session, array: Any) -> None:
    array[...] = 0
    assert session.array(PLAIN).numpy(array) is array
    assert (np.asarray(array) == PLAIN).all()


def test_an_array_of_a_subclass_travels_when_awaited(serve: Serve, registry: Registry, array: Any) -> None:
    registry.register("sum", lambda x: float(x.sum()))
    server = serve()

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            assert await session.call("sum", array) == 10.0
            made = await session.array(array)
            assert (await made.numpy() == PLAIN).all()

    asyncio.run(main())


def test_masked_elements_and_records_are_refused_by_name_and_the_session_goes_on(session: rpcnb.Session) -> None:
    masked = np.ma.masked_array([1.0, 2.0], mask=[False, True])
    records = np.rec.fromarrays([[1], [2.0]])
    made = session.empty((2,), "float64")
    for give in (session.array, made.copyfrom, made.numpy):
        with pytest.raises(CopyMismatch, match=r"1 elements of a MaskedArray are masked; pass \.filled\(value\)"):
            give(masked)
    with pytest.raises(CopyMismatch, match="are masked"):
        session.array([masked])
    for array in (masked, records):
        with pytest.raises(ArgumentError, match="argument 0 is an array that cannot travel"):
            session.call("sum", array)
        with pytest.raises(ArgumentError, match="argument 0 is an array that cannot travel"):
            session.get_function("sum").submit(array).result(10)
    with pytest.raises(RemoteError, match=r"CopyMismatch: 1 elements .* pass \.filled\(value\)"):
        session.call("masked")
    session.run_cell(
        "import numpy; m = numpy.ma.masked_array([1.0], mask=[1]); m2 = numpy.ones((1, 1)).view(numpy.matrix)"
    )
    with pytest.raises(RemoteError, match="CopyMismatch"):
        _ = session.namespace["m"]
    assert session.namespace["m2"].tolist() == [[1.0]]
    assert session.call("sum", np.ones(3)) == 3.0


@pytest.mark.parametrize("name", ["echo", "later"])
def test_values_of_subclasses_travel_as_what_they_hold(session: rpcnb.Session, name: str) -> None:
    function = session.get_function(name)
    for value, good in ((Mode.FAST, "fast"), (Raw(b"raw"), b"raw")):
        assert function(value) == function.submit(value).result(10) == function.map([value])[0] == good
    with pytest.raises(ArgumentError, match=r"argument 0 is a member of the enum Colour; pass \.value"):
        function(Colour.RED)
    session.upload(Raw(b"file"), Mode.FAST)
    assert session.download("fast") == b"file"
    session.namespace["mode"] = Mode.FAST
    assert session.namespace["mode"] == "fast"
    with pytest.raises(AccessDenied, match=r"pass \.value"):
        session.namespace["colour"] = Colour.RED


def test_bytes_that_lie_about_their_length_come_whole(session: rpcnb.Session) -> None:
    raw = session.get_function("raw")
    assert raw() == raw.submit().result(10) == b"abc"


def refuses(take: Callable[[Any], Any], things: list[Any], instead: str) -> None:
    for one in things:
        with pytest.raises(TypeError, match=rf"belongs to this process and cannot be copied or pickled; .*{instead}"):
            take(one)


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_what_belongs_to_a_session_is_not_copied_and_stays_usable(
    session: rpcnb.Session, serve: Serve, take: Callable[[Any], Any]
) -> None:
    function, tensor = session.get_function("echo"), session.array(PLAIN)
    module = session.system_lib()
    things = [session, session.fn, session.namespace, function, tensor, module, session.cpu(), function.submit(1)]
    refuses(take, things, "session")
    gc.collect()
    assert function(2) == 2
    assert (tensor.numpy() == PLAIN).all()
    with rpcnb.Tracker(port=0) as tracker:
        refuses(take, [serve(), tracker, rpcnb.connect_tracker("127.0.0.1", tracker.port)], "make another one there")
    gc.collect()  # known trackers are shown elsewhere as long as somebody holds them


def test_what_is_awaited_is_not_copied_either(serve: Serve) -> None:
    server = serve()

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            function = await session.get_function("testing.echo")
            tensor = await session.array(PLAIN)
            task = asyncio.ensure_future(function(1, timeout=10))
            await asyncio.sleep(0)
            for one in (session, function, tensor, session.cpu(), session.pending[0]):
                with pytest.raises(TypeError, match=r"cannot be copied or pickled; .*session"):
                    copy.deepcopy(one)
            assert await task == 1

    asyncio.run(main())


@pytest.mark.parametrize("name", ["plain", "later"])
def test_a_remote_error_tells_what_caused_it(serve: Serve, registry: Registry, name: str) -> None:
    def fail() -> None:
        try:
            dict[str, int]()["x"]
        except KeyError as error:
            raise ValueError("no layout") from error

    async def later() -> None:
        fail()

    registry.register("plain", fail)
    registry.register("later", later)
    with rpcnb.connect(serve(allow_exec=True, token="t").address, token="t") as session:
        with pytest.raises(RemoteError) as info:
            session.call(name)
        assert info.value.message == "no layout\ncaused by KeyError: 'x'"
        assert "caused by KeyError: 'x'\n" in info.value.remote_traceback
        assert "rpcnb/runtime/" not in info.value.remote_traceback
        with pytest.raises(rpcnb.CellError) as cell:
            session.run_cell("try: {}['x']\nexcept KeyError as error: raise ValueError('no layout') from error")
        assert cell.value.message == info.value.message
        assert "rpcnb/cells/" not in cell.value.remote_traceback


# -- limits that the sender knows --------------------------------------------------------------------------------------


def call(session: Any, name: str, how: str, *args: Any) -> Any:
    function = session.get_function(name)
    if how == "submit":
        return function.submit(*args).result(20)
    return function.map([args[0]])[0] if how == "map" else function(*args)


@pytest.fixture
def texts(registry: Registry) -> None:
    async def later(n: int) -> str:
        return "x" * n

    def complain(n: int) -> None:
        raise ValueError("x" * n)

    async def complain_later(n: int) -> None:
        complain(n)

    registry.register("text", lambda n: "x" * n)
    registry.register("later", later)
    registry.register("data", lambda n: bytes(n))
    registry.register("complain", complain)
    registry.register("complain_later", complain_later)
    registry.register("size", lambda value: len(value))


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("how", ["call", "submit", "map"])
def test_a_result_over_the_clients_limit_is_an_error_of_its_call(serve: Serve, how: str) -> None:
    limits = rpcnb.Limits(text=100_000, bytes_argument=1 << 20)
    with rpcnb.connect(serve().address, limits=limits) as session:
        for name in ("text", "later"):
            with pytest.raises(RemoteError, match=r"LimitExceeded: the text result of 100001 bytes .* text=100000"):
                call(session, name, how, 100_001)
            assert len(call(session, name, how, 100_000)) == 100_000
        with pytest.raises(RemoteError, match=r"bytes result of 1048577 bytes .* bytes_argument=1048576"):
            call(session, "data", how, (1 << 20) + 1)
        for name in ("complain", "complain_later"):
            with pytest.raises(RemoteError) as info:
                call(session, name, how, 200_000)
            assert info.value.remote_type == "ValueError"
            assert len(info.value.message) == 100_000
            assert info.value.message.startswith("xxx")
            assert "(cut: this text has 200000 bytes, the client's text=100000" in info.value.message


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("extensions", [True, False])
def test_who_says_nothing_takes_texts_of_16_mib(serve: Serve, extensions: bool) -> None:
    with rpcnb.connect(serve().address, extensions=extensions) as session:
        for how in ("call", "submit"):
            with pytest.raises(RemoteError, match="exceeds the client's text=16777216"):
                call(session, "text", how, 17 << 20)
            with pytest.raises(RemoteError, match="cut: this text has"):
                call(session, "complain", how, 17 << 20)
        assert len(call(session, "text", "call", 16 << 20)) == 16 << 20


@pytest.mark.usefixtures("texts")
def test_a_client_may_take_longer_texts(serve: Serve) -> None:
    server = serve()
    with rpcnb.connect(server.address, limits=rpcnb.Limits(text=100 << 20)) as session:
        for name in ("text", "later"):
            assert len(call(session, name, "submit", 17 << 20)) == 17 << 20
        assert len(session.call("text", 65 << 20)) == 65 << 20

    async def main() -> None:
        async with await rpcnb.connect_async(server.address, limits=rpcnb.Limits(text=1000)) as session:
            for name in ("text", "later"):
                with pytest.raises(RemoteError, match="exceeds the client's text=1000"):
                    await session.call(name, 1001)
                assert len(await session.call(name, 1000)) == 1000

    asyncio.run(main())


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("how", ["call", "submit", "map"])
def test_a_text_over_the_servers_limit_is_refused_before_anything_is_sent(serve: Serve, how: str) -> None:
    with rpcnb.connect(serve(limits=rpcnb.Limits(text=1000), allow_exec=True, token="t").address, token="t") as session:
        assert call(session, "size", how, "x" * 1000) == 1000
        sent = session.traffic.sent
        for text in ("x" * 1001, "ä" * 501):
            with pytest.raises(
                ArgumentError, match=r"argument 0 is a text of 100\d bytes; expected at most 1000, the server's"
            ):
                call(session, "size", how, text)
        assert session.traffic.sent < sent + 500  # looking the function up
        assert call(session, "size", how, b"x" * 2000) == 2000
        with pytest.raises(ArgumentError, match="argument 0 is a text of"):
            session.run_cell("#" * 1001)
