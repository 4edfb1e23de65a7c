"""What is told of an exception, of what stands behind it, and of one that does not want to be told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpcnb.protocol.messages import Raised
from rpcnb.runtime import report as module
from rpcnb.runtime.completion import is_ours
from rpcnb.runtime.report import format_cell, report, text_of

OURS = f"{Path(module.__file__).parent}/performing.py"  # where it is does not matter, but for its room


class Group(Exception):
    """A group as Python 3.11 has it, and packages for Python 3.10."""

    def __init__(self, text: str, exceptions: Any) -> None:
        super().__init__(text)
        self.exceptions = exceptions


def raised(act: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as info:  # noqa: PT011  # any
        act()
    return info.value


def run(source: str, filename: str = "user.py", **names: Any) -> BaseException:
    """Return what a source raises."""
    return raised(lambda: exec(compile(source, filename, "exec"), names))


def chained() -> None:
    try:
        try:
            raise KeyError("x")
        except KeyError as error:
            raise ValueError("bad layout") from error
    except ValueError:
        raise RuntimeError("could not compile")  # noqa: B904  # that there is a context is the point


def test_an_exception_alone_is_its_text_its_class_and_its_frames() -> None:
    found = report(run("def f(): raise ValueError('x')\nf()"))
    assert (found.text, found.type_name) == ("x", "ValueError")
    assert 'File "user.py", line 1, in f' in found.traceback
    assert report(ValueError()) == Raised("ValueError", "ValueError", "")
    assert text_of(ValueError()) == ""


def test_causes_and_contexts_stand_behind_the_first_line() -> None:
    found = report(raised(chained))
    assert found.text == "could not compile\nwhile handling ValueError: bad layout\ncaused by KeyError: 'x'"
    told = found.traceback.index("while handling ValueError: bad layout\n")
    assert "raise RuntimeError" in found.traceback[:told]
    assert "raise ValueError" in found.traceback[told:]
    assert "caused by KeyError: 'x'\n" in found.traceback[told:]


def test_a_context_that_was_suppressed_or_was_ours_is_not_told() -> None:
    assert report(run("try: 1 / 0\nexcept Exception: raise ValueError('x') from None")).text == "x"
    source = "try: 1 / 0\nexcept Exception: raise ValueError('x')"
    assert report(run(source)).text == "x\nwhile handling ZeroDivisionError: division by zero"
    assert report(run(source, OURS)).text == "x"
    error = ValueError("x")
    error.__context__ = KeyError("made, not raised")
    assert report(error).text == "x\nwhile handling KeyError: 'made, not raised'"


def test_members_of_groups_are_told_below_their_group() -> None:
    cause = OSError("no space")
    one = ValueError("bad\nlayout")
    one.__cause__ = cause
    error = Group("2 failed", [one, Group("inner", (KeyError(),)), "no exception"])
    assert report(error).text == (
        "2 failed\n- ValueError: bad\n    layout\n  caused by OSError: no space\n- Group: inner\n    - KeyError"
    ).replace("\n- ", "\n  - ")
    assert report(Group("odd", 3)).text == "odd"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no groups and no notes")
def test_pythons_own_groups_and_notes_are_told() -> None:
    source = "e = ExceptionGroup('two', [ValueError('a'), TypeError('b')])\ne.add_note('while at it')\nraise e"
    error = run(source, "<cell>")
    assert report(error).text == "two (2 sub-exceptions)\nwhile at it\n  - ValueError: a\n  - TypeError: b"
    assert "+-+---------------- 1 ----------------\n" in format_cell(error)


def test_circles_are_told_once_and_long_chains_and_texts_are_bounded() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert report(one).text == "one\ncaused by ValueError: other"
    error = last = ValueError("0")
    for number in range(1, 1000):
        last.__cause__ = ValueError(f"{number} " + "x" * 5000)
        last = last.__cause__
    found = report(error)
    assert found.text.startswith("0\ncaused by ValueError: 1 xxx")
    assert found.text.endswith("xxx...\n... and more")
    assert found.text.count("\n") == 21
    assert len(found.text) < 21 * 1100
    assert found.traceback.endswith("... and more\n")


def test_long_tracebacks_are_bounded() -> None:
    lines = "\n".join(f"def f{number}(): f{number + 1}()" for number in range(900))
    error = run(f"{lines}\ndef f900(): raise ValueError('deep' * 20)\nf0()", "<" + "long" * 30 + ">")
    trace = report(error).traceback
    assert len(trace) < (1 << 16) + 100
    assert trace.endswith("\n... and more\n")
    assert format_cell(error).startswith("...\n")
    assert format_cell(error).endswith("ValueError: " + "deep" * 20 + "\n")


def exits(*_: Any) -> Any:
    sys.exit(3)


class Mute(Exception):
    __str__ = __repr__ = exits


class Noted(Exception):
    __notes__ = property(exits)


class Caused(Exception):
    __cause__ = property(exits)


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "shown"


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]  # that is the point
        raise SystemExit(5)


class Classless(Exception):
    @property  # type: ignore[misc]  # likewise
    def __class__(self) -> Any:
        raise SystemExit(3)


class Closed(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise SystemExit(9)


class Anonymous(Exception, metaclass=Nameless):
    pass


class Odd(Exception):
    def __str__(self) -> str:
        return Text("real")


@pytest.mark.parametrize("kind", [Mute, Noted, Caused])
def test_an_exception_that_raises_while_it_is_asked_is_told_without_a_text(kind: type[Exception]) -> None:
    error = kind("x")
    said = "without a text: SystemExit while making it"
    assert report(error) == Raised(f"{kind.__name__} {said}", kind.__name__, "")
    assert text_of(error) == said
    outer = ValueError("outer")
    outer.__cause__ = error
    assert report(outer).text == f"outer\ncaused by {kind.__name__} {said}"


def test_a_text_is_plain() -> None:
    assert type(report(Odd()).text) is str
    assert report(Odd()).text == "real"


def test_frames_that_cannot_be_read_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    error = raised(chained)
    monkeypatch.setattr("traceback.extract_tb", exits)
    assert report(error).traceback.startswith("while handling")
    monkeypatch.setattr("traceback.TracebackException", exits)
    assert format_cell(error) == "RuntimeError without a traceback: SystemExit while making it\n"


def test_a_cells_traceback_has_the_cells_frames_and_none_of_ours() -> None:
    def perform() -> None:
        exec(compile("def act(): raise KeyError('x')", OURS, "exec"), names)
        exec(compile("try: act()\nexcept KeyError as e: raise ValueError('y') from e", "<cell>", "exec"), names)

    names: dict[str, Any] = {}
    text = format_cell(raised(perform))
    assert text.count('File "<cell>"') == 2
    assert "The above exception was the direct cause" in text
    assert OURS not in text
    assert __file__ not in text


def test_where_nobody_gets_a_traceback_none_is_made() -> None:
    told = report(raised(chained), traced=False)
    assert told.text == report(raised(chained)).text
    assert told.traceback == ""


@pytest.mark.parametrize("name", ["Anonymous", "Classless", "Closed"])
def test_an_exception_cannot_leave_by_what_it_raises_when_it_is_looked_at(name: str) -> None:
    error = {"Anonymous": Anonymous, "Classless": Classless, "Closed": Closed}[name]("x")
    told = report(error)
    assert told.type_name == name
    assert told.text in ("x", f"{name} without a text: SystemExit while making it")
    outer = ValueError("outer")
    outer.__cause__ = error
    assert f"caused by {name}" in report(outer).text
    assert name in format_cell(error)
    assert not is_ours(error)
