"""What others ask TVM's runtime for, where it is not loaded."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from runtime_wire import Client

from rpcnb.errors import DeviceError, LibraryError
from rpcnb.protocol.messages import CallFunc, Shutdown
from rpcnb.runtime import backend
from rpcnb.runtime.backend import Backend
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.standins import STAND_INS


class FakeBackend(Backend):
    threads = 3


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    made = FakeBackend()

    def install() -> Backend:
        return made

    install.cache_info = lambda: type("Info", (), {"currsize": 1})  # type: ignore[attr-defined]
    monkeypatch.setattr(backend, "install_backend", install)
    monkeypatch.setattr(backend, "processors", lambda: 5)
    return made


def test_the_threads_of_parallel_loops_are_told_and_set(threads: FakeBackend) -> None:
    client = Client(Environment(native=True))
    assert client.call("runtime.NumThreads") == (1, 3)
    client.call("runtime.config_threadpool", 1, 2)
    assert client.call("runtime.NumThreads") == (1, 2)
    client.call("runtime.config_threadpool", 1, 0)
    assert threads.threads == 5, "as many as there are processors"
    client.send(Shutdown())


def test_setting_threads_needs_trust(threads: FakeBackend) -> None:
    client = Client(Environment(native=False))
    text = client.error(CallFunc(client.find("runtime.config_threadpool"), (1, 2))).text
    assert "needs trust" in text
    assert threads.threads == 3
    client.send(Shutdown())


def test_where_no_compiled_code_runs_there_are_as_many_threads_as_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.install_backend.cache_clear()
    monkeypatch.setattr(backend, "processors", lambda: 7)
    assert STAND_INS["runtime.NumThreads"]() == 7


@pytest.mark.parametrize("outcome", [None, LibraryError("apache-tvm-ffi is missing")])
def test_where_others_run_the_loops_nothing_is_set(
    monkeypatch: pytest.MonkeyPatch, outcome: LibraryError | None
) -> None:
    def install() -> None:
        if outcome is not None:
            raise outcome

    install.cache_info = lambda: type("Info", (), {"currsize": 1})  # type: ignore[attr-defined]
    monkeypatch.setattr(backend, "install_backend", install)
    monkeypatch.setattr(backend, "processors", lambda: 6)
    assert STAND_INS["runtime.NumThreads"]() == 6
    if outcome is None:
        assert STAND_INS["runtime.config_threadpool"](1, 2) is None
    else:
        with pytest.raises(LibraryError):
            STAND_INS["runtime.config_threadpool"](1, 2)
    assert STAND_INS["runtime.NumThreads"]() == 6


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8", "bool"])
def test_random_numbers_fill_a_tensor(dtype: str) -> None:
    out = np.zeros((50, 20), dtype)
    STAND_INS["tvm.contrib.random.random_fill"](out)
    if dtype == "bool":
        assert 300 < out.sum() < 700
    else:
        assert out.min() >= 1
        assert out.max() <= 10
        assert len(np.unique(out)) > 5


def test_random_numbers_have_the_distribution_that_is_asked_for() -> None:
    out = np.zeros(4000, "float32")
    STAND_INS["tvm.contrib.random.uniform"](-2.0, 4.0, out)
    assert (out.min() >= -2, out.max() < 4, abs(out.mean() - 1) < 0.2) == (True, True, True)
    STAND_INS["tvm.contrib.random.normal"](5.0, 0.5, out)
    assert abs(out.mean() - 5) < 0.1
    assert abs(out.std() - 0.5) < 0.1
    whole = np.zeros(1000, "int32")
    STAND_INS["tvm.contrib.random.randint"](3, 6, whole)
    assert set(whole) == {3, 4, 5}
    with pytest.raises(DeviceError, match="expected a tensor in the CPU's memory"):
        STAND_INS["tvm.contrib.random.uniform"](0.0, 1.0, object())


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("ascending", [True, False])
def test_sorting(axis: int, ascending: bool) -> None:
    data = np.array([[3, 1, 2, 1], [0, 5, 5, 4], [9, 9, 0, 1]], "float32")
    values, order = np.zeros_like(data), np.zeros(data.shape, "int32")
    STAND_INS["tvm.contrib.sort.sort"](data, values, axis, ascending)
    STAND_INS["tvm.contrib.sort.argsort"](data, order, axis, ascending)
    expected = np.sort(data, axis) if ascending else -np.sort(-data, axis)
    assert (values == expected).all()
    assert (np.take_along_axis(data, order, axis) == expected).all()
    assert order.tolist() == np.argsort(data if ascending else -data, axis, kind="stable").tolist()


def test_the_greatest_and_the_first_of_boxes() -> None:
    data = np.array([[3, 1, 2, 5], [0, 5, 6, 4]], "float32")
    values, order = np.zeros((2, 2), "float32"), np.zeros((2, 2), "int64")
    topk = STAND_INS["tvm.contrib.sort.topk"]
    topk(data, values, order, 2, 1, "both", False)
    assert values.tolist() == [[5, 3], [6, 5]]
    assert order.tolist() == [[3, 0], [2, 1]]
    topk(data, order, 2, 1, "indices", True)
    assert order.tolist() == [[1, 2], [0, 3]]
    all_values = np.zeros((2, 4), "float32")
    topk(data, all_values, 0, 1, "values", True)
    assert (all_values == np.sort(data)).all()
    out = np.zeros((2, 4), "int32")
    STAND_INS["tvm.contrib.sort.argsort_nms"](data, np.array([2, 3]), out, 1, False)
    assert out.tolist() == [[0, 1, 2, 3], [2, 1, 0, 3]]


def test_all_but_the_first_argument_are_pushed_out_of_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    flusher = SimpleNamespace(flush=lambda arrays: flushed.extend(array.nbytes for array in arrays))
    monkeypatch.setattr("rpcnb.runtime.backend.measuring_backend", lambda: flusher)
    assert STAND_INS["cache_flush_cpu_non_first_arg"](np.zeros(3), np.zeros(4), 5, np.zeros(6)) is None
    assert flushed == [32, 48]


def test_caches_are_flushed_also_where_no_compiled_code_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise LibraryError("needs apache-tvm-ffi")

    monkeypatch.setattr("rpcnb.runtime.backend.measuring_backend", refuse)
    monkeypatch.setattr("rpcnb.runtime.backend._CACHE", 1 << 16)
    assert STAND_INS["cache_flush_cpu_non_first_arg"](np.zeros(3), np.zeros(4)) is None
