"""Who has called what: told for every kind of function, with its outcome, without values."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpcnb.runtime.parcel import pack
from rpcnb.runtime.registry import Registry
from rpcnb.runtime.served import ServedFunction
from rpcnb.runtime.watched import watch

SECRET = "canary-of-a-value"


class Told(list[tuple[str, str, dict[str, Any]]]):
    def __call__(self, name: str, seconds: float, outcome: str, details: dict[str, Any]) -> None:
        assert seconds >= 0
        self.append((name, outcome, details))


class Done:
    """A completion."""

    cancelled = False

    def __init__(self) -> None:
        self.outcomes: list[Any] = []

    def __call__(self, *result: Any) -> None:
        self.outcomes.append(result)

    def error(self, error: BaseException) -> None:
        self.outcomes.append(error)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def watched(name: str, call: Any, kind: str = "plain", folder: Path | None = None) -> tuple[ServedFunction, Told]:
    told, served = Told(), ServedFunction(name, call, kind)
    files = SimpleNamespace(path=lambda file: folder / file if folder is not None else None)
    watch(SimpleNamespace(files=files), served, told)
    return served, told


def fail(*_: Any) -> None:
    raise ValueError(SECRET)


def test_a_plain_function() -> None:
    served, told = watched("f", lambda x: x + 1)
    assert served.call(1) == 2
    assert served.own(1) == 2
    served.call(5)
    assert told == [("f", "ok", {})] * 2
    served, told = watched("g", fail)
    with pytest.raises(ValueError, match=SECRET):
        served.call(1)
    assert told == [("g", "ValueError", {})]


def test_a_coroutine_function() -> None:
    async def story(x: float) -> float:
        await asyncio.sleep(0)
        return 1 / x

    served, told = watched("f", story, "coroutine")
    assert asyncio.run(served.call(2)) == 0.5
    with pytest.raises(ZeroDivisionError):
        asyncio.run(served.call(0))

    async def cancelled() -> None:
        task = asyncio.ensure_future(served.call(1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(cancelled())
    assert [outcome for _, outcome, _ in told] == ["ok", "ZeroDivisionError", "cancelled"]


def test_a_callback_function() -> None:
    def call(done: Any, x: int) -> None:
        assert done.cancelled is False
        if x < 0:
            raise ValueError(x)
        if x == 0:
            done.error(KeyError(x))
        done(x)
        done(x)

    served, told = watched("f", call, "callback")
    done = Done()
    served.call(done, 5)
    served.call(done, 0)
    with pytest.raises(ValueError, match="-1"):
        served.call(done, -1)
    assert told == [("f", "ok", {}), ("f", "KeyError", {}), ("f", "ValueError", {})]
    assert done.outcomes[:2] == [(5,), (5,)]


def test_what_rpcnb_asks_beside_its_user_s_calls_is_not_told() -> None:
    for name, kind in (("rpcnb.status", "plain"), ("anything", "raw")):
        served, told = watched(name, lambda *_: 1, kind)
        assert served.call is served.own
        assert told == []


def test_it_is_watched_once_and_goes_on_when_a_notebook_registers_it_anew() -> None:
    registry = Registry()
    registry.register("f", lambda: 1, override=True)
    first = registry.get("f")
    assert first is not None
    told, served = Told(), ServedFunction("f", first.call, source=first)
    for _ in range(2):
        watch(SimpleNamespace(), served, told)
    registry.register("f", lambda: 2, override=True)
    second = registry.get("f")
    assert second is not None
    served.follow(second)
    assert served.call() == 2
    assert told == [("f", "ok", {})]
    bare = ServedFunction("f", first.call, source=first)
    bare.follow(second)
    assert bare.call() == 2


def test_files_are_told_by_their_hashes(tmp_path: Path) -> None:
    def write(name: str, *rest: Any) -> None:
        (tmp_path / name).write_bytes(rest[-1] if len(rest) == 1 else b"whole")

    served, told = watched("tvm.rpc.server.upload", write, folder=tmp_path)
    served.call("a.so", SECRET.encode())
    assert told == [("tvm.rpc.server.upload", "ok", {"file": "a.so", "bytes": 17, "sha256": sha(SECRET.encode())})]
    served, told = watched("rpcnb.put", write, folder=tmp_path)
    served.call("b.so", 5, 0, b"who")
    assert told == [], "more is to come"
    served.call("b.so", 5, 3, b"le")
    assert told == [("rpcnb.put", "ok", {"file": "b.so", "bytes": 5, "sha256": sha(b"whole")})]
    served, told = watched("rpcnb.put", fail, folder=tmp_path)
    with pytest.raises(ValueError, match=SECRET):
        served.call("b.so", 5, 0, b"who")
    assert told == [("rpcnb.put", "ValueError", {"file": "b.so"})]
    served, told = watched("tvm.rpc.server.load_module", lambda _: None)
    served.call("a.so")
    assert told == [("tvm.rpc.server.load_module", "ok", {"file": "a.so"})]


def test_source_is_told_by_its_hash_and_values_are_not() -> None:
    served, told = watched("rpcnb.cell", lambda done, *_: done("{}"), "callback")
    served.call(Done(), SECRET, "cell 1")
    served, more = watched("rpcnb.set_variable", lambda *_: None)
    served.call("x", SECRET.encode())
    told += more
    served, more = watched("rpcnb.jobs", lambda done, *_: done(b""), "callback")
    for words in (
        {"op": "list"},
        {"op": "start", "name": "burn-in", "function": "b.burn", "source": None},
        {"op": "start", "name": "cell", "function": "", "source": SECRET},
    ):
        served.call(Done(), pack([words, b""]))
    told += more
    assert told == [
        ("rpcnb.cell", "ok", {"sha256": sha(SECRET.encode())}),
        ("rpcnb.set_variable", "ok", {"variable": "x"}),
        ("rpcnb.jobs", "ok", {"job": "burn-in", "function": "b.burn"}),
        ("rpcnb.jobs", "ok", {"job": "cell", "function": "", "sha256": sha(SECRET.encode())}),
    ]


def test_odd_arguments_do_not_hurt() -> None:
    served, told = watched("rpcnb.cell", lambda done: done(""), "callback")
    served.call(Done())
    assert told == [("rpcnb.cell", "ok", {"unclear": "IndexError"})]
