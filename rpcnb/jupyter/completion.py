"""Completion in the magics' lines: options, session names, names of remote functions. It never waits long."""

from __future__ import annotations

import re
import shlex
from concurrent.futures import CancelledError
from typing import Any

from IPython.core.completer import SimpleCompletion, context_matcher

from rpcnb.client.base import SessionBase
from rpcnb.client.session import Session
from rpcnb.errors import RpcError
from rpcnb.jupyter.panels import SECTIONS
from rpcnb.jupyter.sessions import BOOK

__all__ = ["complete", "matcher"]

_FUNCTIONS = ("rpc_functions", "rpc_timeit")
_FILES = ("rpc_upload", "rpc_download")
_FN = re.compile(r"(\w+)\.fn\.([\w.]*)$")
_PATIENCE = 0.2  # seconds
_AT_MOST = 10.0  # seconds for the names to come, for the next time
_VALUES = {"--run": ("thread", "kernel")}


def _names_of(session: SessionBase | None) -> list[str]:
    """Return the functions that a session knows; asks once, and waits a moment only: the next time they are known."""
    if session is None:
        return []
    known = session._ops.known_names()
    if known or not isinstance(session, Session) or session.state != "ready":
        return known
    asked = session.submit(session.list_functions, timeout=_AT_MOST)
    try:
        found: list[str] = asked.result(_PATIENCE)
    except (RpcError, CancelledError):
        return []
    return found


def complete(magics: dict[str, Any], text: str) -> tuple[str, list[str]] | None:
    """Complete the line up to the cursor.

    Args:
        magics: Functions of the line magics by name; their parsers tell the options.
        text: The line up to the cursor.

    Returns:
        The fragment under the cursor and what it may become; None if this is not for us.
    """
    name, _, rest = text.lstrip().partition(" ")
    name = name.lstrip("%")
    if name not in magics or not text.lstrip().startswith("%") or (not rest and not text.endswith(" ")):
        return None
    try:
        words = shlex.split(rest)
    except ValueError:
        words = rest.split()
    fragment = "" if not rest or rest[-1].isspace() else rest.split()[-1]
    before = words[-1] if words and not fragment else words[-2] if len(words) > 1 else ""
    if before == "--session" or (name == "rpc_close" and not fragment.startswith("-")):
        found = list(BOOK.sessions)
    elif before in _VALUES:
        found = list(_VALUES[before])
    elif fragment.startswith("-"):
        parser = getattr(magics[name], "parser", None)
        actions = [] if parser is None else parser._actions
        found = ["--help", *(option for action in actions for option in action.option_strings)]
        found = [option for option in found if option.startswith("--")]
    elif name in _FUNCTIONS:
        found = _names_of(BOOK.current)
    elif name == "rpc_panel":
        found = list(SECTIONS)
    elif name == "rpc_connect":
        found = ["demo", *BOOK.tokens]
    else:
        return None
    return fragment, sorted({word for word in found if word.startswith(fragment)})


def complete_names(variables: dict[str, Any], text: str) -> tuple[str, list[str]] | None:
    """Complete ``session.fn.demo.`` by the names that the session knows; IPython evaluates no properties for that."""
    found = _FN.search(text)
    session = variables.get(found[1]) if found is not None else None
    if found is None or not isinstance(session, SessionBase):
        return None
    names = _names_of(session)
    start = found[2].rpartition(".")[0]
    skip = len(start) + 1 if start else 0
    words = {name[skip:].split(".")[0] for name in names if name.startswith(found[2])}
    return found[2][skip:], sorted(words)


def matcher(shell: Any) -> Any:
    """Return a matcher for the shell's completer."""

    @context_matcher(identifier="rpcnb", priority=200)
    def match(context: Any) -> dict[str, Any]:
        magics = {
            name: function
            for kind in shell.magics_manager.magics.values()
            for name, function in kind.items()
            if name == "rpc" or name.startswith("rpc_")
        }
        line = context.line_with_cursor[: context.cursor_position]
        found = complete(magics, line) or complete_names(shell.user_ns, line)
        if found is None or (not found[1] and line.lstrip().lstrip("%").split(" ")[0] in _FILES):
            return {"completions": [], "suppress": False}
        fragment, words = found
        completions = [SimpleCompletion(text=word, type="magic") for word in words]
        return {"completions": completions, "matched_fragment": fragment, "suppress": bool(words)}

    return match
