"""``rpcnb.tvm.watch``, with a MetaSchedule that the test plays."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest

import rpcnb
from rpcnb.jupyter import tuning
from rpcnb.jupyter.tuning import Trials


class Future:
    def __init__(self, done: Any, result: Any) -> None:
        self.done, self.result = done, result


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A MetaSchedule, and what is shown."""
    runners = types.SimpleNamespace(PyRunner=object, RunnerFuture=Future)
    monkeypatch.setitem(sys.modules, "tvm.s_tir.meta_schedule.runner", runners)
    monkeypatch.setitem(sys.modules, "tvm.ir.utils", types.SimpleNamespace(derived_object=lambda kind: kind))
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(tuning, "_display", lambda: lambda text, picture: shown.append((text, picture)))
    monkeypatch.setattr(tuning, "_EVERY", 0)
    return shown


class Runner:
    """Measures what is given."""

    def run(self, inputs: list[Any]) -> list[Future]:
        results = [types.SimpleNamespace(run_secs=one.seconds, error_msg=one.error) for one in inputs]
        return [Future(lambda: True, lambda one=one: one) for one in results]


def candidate(seconds: list[float] | None, error: str | None = None, rows: int = 64) -> Any:
    shape = types.SimpleNamespace(dtype="float32", shape=(rows, 64))
    return types.SimpleNamespace(seconds=seconds, error=error, args_info=[shape, "no shape"])


def test_what_a_runner_does_is_shown_and_passed_on(played: list[tuple[str, str]]) -> None:
    watched = rpcnb.tvm.watch(Runner(), total=4)
    given = [candidate([2e-3]), candidate(None, "Traceback\n  lost\n"), candidate([1e-3, 3e-4]), candidate([1.0])]
    futures = watched.run(iter(given))
    assert played == [("4 on the way", "")]
    assert all(one.done() for one in futures)
    assert [one.result().run_secs for one in futures] == [one.seconds for one in given]
    assert played[1][0] == "float32[64, 64]: 1 of 4 measured, best 2 ms, 3 on the way"
    assert played[-1][0] == "float32[64, 64]: 4 of 4 measured, best 650 us, 1 failed: lost"
    assert "<polyline points=" in played[-1][1]
    count = len(played)
    futures[0].result()
    assert len(played) == count, "a result is counted once"


def test_tasks_of_one_tuning_are_told_apart(played: list[tuple[str, str]]) -> None:
    watched = rpcnb.tvm.watch(Runner())
    for one in watched.run([candidate([1e-3]), candidate([2e-3], rows=8)]):
        one.result()
    assert played[-1][0].splitlines() == [
        "float32[64, 64]: 1 measured, best 1 ms",
        "float32[8, 64]: 1 measured, best 2 ms",
    ]


def test_it_is_not_shown_more_often_than_can_be_seen(
    played: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_EVERY", 1000)
    monkeypatch.setattr("time.monotonic", lambda: 5000.0)
    for one in rpcnb.tvm.watch(Runner()).run([candidate([1e-3])] * 10):
        one.result()
    assert len(played) == 2, "at the beginning and at the end"


def test_a_curve_goes_down_and_skips_what_has_no_best() -> None:
    trials = Trials("f")
    assert trials.svg() == ""
    trials.note([], "it failed")
    assert trials.line() == "f: 1 measured, none yet, 1 failed: it failed"
    trials.note([], "")
    assert trials.failed == "no result"
    for seconds in (4e-3, 1e-3, 2e-3):
        trials.note([seconds], "")
    assert trials.curve == [math.inf, math.inf, 4e-3, 1e-3, 1e-3]
    shown = trials.svg()
    assert "best so far over 5 trials, from 4 ms to 1 ms" in shown
    flat = Trials("g")
    for _ in range(2):
        flat.note([1e-3], "")
    assert "from 1 ms to 1 ms" in flat.svg()


def test_labels_are_short() -> None:
    shape = types.SimpleNamespace(dtype="float32", shape=(1, 2, 3, 4))
    assert len(tuning._label(types.SimpleNamespace(args_info=[shape] * 9))) == 60
    assert tuning._label(types.SimpleNamespace(args_info=[])) == "no arguments"


def test_without_a_notebook_it_is_written_as_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    tuning._display()("a line", "<svg>")
    assert capsys.readouterr().err == "a line\n"


def test_what_is_no_runner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="expected a runner of MetaSchedule, got int"):
        rpcnb.tvm.watch(5)
    monkeypatch.setitem(sys.modules, "tvm.s_tir.meta_schedule.runner", None)
    with pytest.raises(rpcnb.LocalProtocolError, match="pip install apache-tvm"):
        rpcnb.tvm.watch(Runner())
