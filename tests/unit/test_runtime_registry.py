"""The registry of global functions."""

from __future__ import annotations

import contextvars
import functools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rpcnb.errors import FunctionNotFound
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.local import LocalServingSession
from rpcnb.runtime.registry import (
    REGISTRY,
    Registry,
    get_global_func,
    list_global_func_names,
    register_func,
    remove_global_func,
)

CELL: contextvars.ContextVar[str] = contextvars.ContextVar("cell", default="none")


@pytest.fixture(autouse=True)
def _global_registry_as_before() -> Iterator[None]:
    before = REGISTRY._functions
    yield
    REGISTRY._functions = before


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be inside a kernel."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object))


def cell_function(name: str, body: str) -> Callable[[], str]:
    """A function as a notebook cell defines it."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(f"def {name}():\n    return {body!r}", space)
    found: Callable[[], str] = space[name]
    return found


def test_register_func_is_call_and_decorator() -> None:
    @register_func
    def plain_name() -> int:
        return 1

    @register_func("t.second")
    def second() -> int:
        return 2

    def third() -> int:
        return 3

    assert register_func("t.third", third) is third
    assert [REGISTRY.get(name) is not None for name in ("plain_name", "t.second", "t.third")] == [True] * 3
    assert (plain_name(), second()) == (1, 2)
    assert get_global_func("t.third") is third
    assert "t.second" in list_global_func_names()
    remove_global_func("t.second")
    remove_global_func("t.never")
    assert get_global_func("t.second", allow_missing=True) is None
    with pytest.raises(FunctionNotFound, match=r"no function is registered as 't\.second'"):
        get_global_func("t.second")


def test_a_taken_name_needs_override() -> None:
    register_func("t.f", len)
    with pytest.raises(ValueError, match=r"function 't\.f' is registered already; pass override=True"):
        register_func("t.f", max)
    assert get_global_func("t.f") is len
    register_func("t.f", max, override=True)
    assert get_global_func("t.f") is max


@pytest.mark.usefixtures("notebook")
def test_running_a_cell_again_replaces_its_function() -> None:
    register_func("t.cell", cell_function("f", "old"))
    register_func("t.cell", cell_function("f", "new"))
    found = get_global_func("t.cell")
    assert found is not None
    assert found() == "new"
    with pytest.raises(ValueError, match="registered already"):
        register_func("t.cell", cell_function("g", "another function"))
    with pytest.raises(ValueError, match="registered already"):
        register_func("t.cell", len)


def test_outside_a_notebook_main_is_not_a_cell() -> None:
    register_func("t.script", cell_function("f", "old"))
    with pytest.raises(ValueError, match="registered already"):
        register_func("t.script", cell_function("f", "new"))


def test_ipython_imported_without_a_shell_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert Registry().register("f", len).context is None


def test_without_ipython_there_is_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert Registry().register("f", len).call is len


@pytest.mark.usefixtures("notebook")
def test_a_plain_function_runs_in_the_context_of_its_registration() -> None:
    registry = Registry()
    context = contextvars.copy_context()
    context.run(CELL.set, "cell 7")
    entry = context.run(registry.register, "t.where", lambda suffix: CELL.get() + suffix)
    assert CELL.get() == "none"
    assert entry.call("!") == "cell 7!"
    nested = context.run(registry.register, "t.nested", lambda: entry.call("?"))
    assert nested.call() == "cell 7?"  # a context cannot be entered twice; copies can


class AsyncCall:
    async def __call__(self) -> int:
        return 1


async def coroutine() -> int:
    return 1


@functools.wraps(coroutine)
def wrapped() -> Any:
    return coroutine()


@pytest.mark.parametrize(
    ("function", "kind"),
    [(len, "plain"), (coroutine, "coroutine"), (AsyncCall(), "coroutine"), (wrapped, "coroutine")],
)
def test_the_kind_of_a_function_is_recognised(function: Callable[..., Any], kind: str) -> None:
    entry = Registry().register("f", function)
    assert entry.kind == kind
    assert entry.call is function


def test_a_callback_function_is_declared() -> None:
    assert Registry().register("f", len, callback=True).kind == "callback"


@pytest.mark.parametrize("run", [None, "thread", "loop", "kernel"])
def test_where_a_function_runs_is_kept(run: Any) -> None:
    assert Registry().register("f", len, run=run).run == run


def test_an_unknown_place_to_run_is_refused() -> None:
    place: Any = "moon"
    with pytest.raises(ValueError, match="expected run='thread', 'loop' or 'kernel', got 'moon'"):
        Registry().register("f", len, run=place)


def test_what_cannot_be_called_is_refused() -> None:
    number: Any = 5
    with pytest.raises(TypeError, match="expected a function for 'f', got int"):
        Registry().register("f", number)


def test_names_are_sorted() -> None:
    registry = Registry()
    for name in ("b", "a"):
        registry.register(name, len)
    assert registry.names() == ["a", "b"]
    registry.remove("a")
    assert registry.names() == ["b"]


def test_a_cell_that_is_run_again_replaces_its_function_also_for_those_who_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry()
    session = LocalServingSession(Environment(registry=registry))
    monkeypatch.setattr("rpcnb.runtime.registry._notebook_context", contextvars.copy_context)
    held = session._serve_registered(registry.register("cell.f", lambda: 1))
    assert held.call() == 1
    registry.register("cell.f", lambda: 2, override=True)
    assert held.call() == 2

    async def later() -> int:
        return 3

    registry.register("cell.f", later, override=True)
    assert held.call() == 2, "another kind needs another handle"
    registry.register("cell.f", lambda: 4, override=True)
    assert held.call() == 4
    monkeypatch.undo()
    registry.register("cell.f", lambda: 5, override=True)
    assert held.call() == 4, "a script's own business"
