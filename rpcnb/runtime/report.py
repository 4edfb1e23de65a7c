"""What is told of an exception: its text, what it was caused by, what else was raised with it, and where.

A text's first line is that of the exception itself, for stock clients too, which get nothing else. Behind it stand
causes, what was being handled meanwhile, and the members of groups, one line each and indented below their group::

    could not compile
    caused by ExceptionGroup: unhandled errors in a TaskGroup (2 sub-exceptions)
      - ValueError: bad layout
      - OSError: [Errno 28] No space left on device

Exceptions are users' objects: whatever one raises while it is asked, it is told as one without a text.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcnb.protocol.messages import Raised
from rpcnb.values import plain, type_name

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["format_cell", "report", "text_of"]

_MOST = 20  # exceptions that are told behind one
_LONGEST = 1000  # characters that are told of each of them
_FRAMES = 20  # frames likewise
_ROOMS = ("/rpcnb/protocol/", "/rpcnb/runtime/", "/rpcnb/cells/", "rpcnb/server/jobprocess.py")
_TRACEBACK = 1 << 16  # characters of a traceback


class _Words(NamedTuple):
    """What an exception says: its text and notes, what stands behind it, and what it raised while it was asked."""

    text: str
    behind: list[tuple[str, BaseException]]
    broken: str = ""


def _ask(error: BaseException) -> _Words:
    try:
        notes = [str(note) for note in getattr(error, "__notes__", None) or ()]
        return _Words("\n".join([plain(str(error)), *map(plain, notes)]), list(_behind(error)))
    except BaseException as broken:  # also SystemExit: a text does not end the server
        return _Words("", [], f"without a text: {type_name(broken)} while making it")


def _behind(error: BaseException) -> Iterator[tuple[str, BaseException]]:
    """Yield what stands behind an exception, and how."""
    context = error.__context__
    if error.__cause__ is not None:
        yield "caused by ", error.__cause__
    elif context is not None and not error.__suppress_context__ and not _was_ours(context):
        yield "while handling ", context
    members = getattr(error, "exceptions", None)  # Python 3.10 has no groups, packages have their own
    if isinstance(members, (tuple, list)):
        yield from (("- ", member) for member in members if isinstance(member, BaseException))


def _was_ours(error: BaseException) -> bool:
    """Tell whether we were handling an exception, of another call, say; a function's own was caught in its frames."""
    trace = error.__traceback__
    return trace is not None and _is_ours(trace.tb_frame.f_code.co_filename)


def _is_ours(filename: str) -> bool:
    """Tell whether a frame is of what performs requests, which says nothing to who called."""
    return any(room in filename.replace("\\", "/") for room in _ROOMS)


def _chain(words: _Words, seen: set[int], depth: int = 0) -> Iterator[tuple[str, BaseException]]:
    """Yield a line, and whose it is, for everything that stands behind an exception; each once."""
    for how, error in words.behind:
        if id(error) in seen:
            continue
        seen.add(id(error))
        said, inner = _ask(error), depth + (how == "- ")
        name = type_name(error)
        line = f"{name} {said.broken}" if said.broken else f"{name}: {said.text}" if said.text else name
        line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
        indent = "  " * inner
        yield indent + how + line.replace("\n", f"\n{indent}  "), error
        yield from _chain(said, seen, inner)


def _lines(error: BaseException, words: _Words) -> Iterator[tuple[str, BaseException | None]]:
    for count, line in enumerate(_chain(words, {id(error)})):
        if count == _MOST:
            yield "... and more", None
            return
        yield line


def text_of(error: BaseException) -> str:
    """Return an exception's text, and a line for each that stands behind it; empty if it has neither."""
    words = _ask(error)
    return "\n".join([words.broken or words.text, *(line for line, _ in _lines(error, words))])


def report(error: BaseException, traced: bool = True) -> Raised:
    """Return the reply that reports an exception: text, class, and where it and those behind it were raised.

    Where it was raised takes 1 ms to find out; it is left out where nobody gets it (``traced=False``).
    """
    words, name = _ask(error), type_name(error)
    text = [f"{name} {words.broken}" if words.broken else words.text or name]
    trace = [_frames(error, None)] if traced else []
    for line, other in _lines(error, words):
        text.append(line)
        if traced:
            trace.append(f"{line}\n" + ("" if other is None else _frames(other, -_FRAMES)))
    return Raised("\n".join(text), name, _bounded("".join(trace)))


def _bounded(trace: str) -> str:
    return trace if len(trace) <= _TRACEBACK else f"{trace[:_TRACEBACK]}\n... and more\n"


def _frames(error: BaseException, limit: int | None) -> str:
    """Return where an exception was raised, without our own frames."""
    try:
        frames = traceback.extract_tb(error.__traceback__, limit)
        return "".join(traceback.format_list([frame for frame in frames if not _is_ours(frame.filename)]))
    except BaseException:  # a source that cannot be read, say
        return ""


def format_cell(error: BaseException) -> str:
    """Return an exception of a cell and those behind it as Python shows them, without our frames; the end if long."""
    try:
        trace = error.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<"):  # a cell's name
            trace = trace.tb_next
        shown = traceback.TracebackException(type(error), error, trace)
        _drop_ours(shown)
        text = "".join(shown.format())
    except BaseException as broken:
        return f"{type_name(error)} without a traceback: {type_name(broken)} while making it\n"
    return text if len(text) <= _TRACEBACK else f"...\n{text[-_TRACEBACK:]}"


def _drop_ours(shown: Any) -> None:
    """Take our own frames out of a formatted exception and out of those behind it."""
    todo = [shown]
    while todo:
        one = todo.pop()
        one.stack = traceback.StackSummary.from_list([frame for frame in one.stack if not _is_ours(frame.filename)])
        behind = (one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ()))
        todo += [other for other in behind if other is not None]
