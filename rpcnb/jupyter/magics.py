"""The magics: a line is parsed, then the public API is called.

Each has a plain Python twin: ``%rpc_connect`` is :func:`rpcnb.connect`, ``%rpc_close`` is ``session.close()``.
"""

from __future__ import annotations

import fnmatch
import getpass
import os
import sys
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from rpcnb.errors import KeyMismatch, RpcError
from rpcnb.jupyter.sessions import BOOK

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.session.session import Session

__all__ = ["RpcMagics"]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _plain_errors(function: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Show help for ``-h``, and errors as one line without a traceback."""

    @wraps(function)
    def call(self: Any, line: str) -> Any:
        if line.split()[:1] in (["-h"], ["--help"]):
            _say(function.__doc__ or "")
            return None
        try:
            return function(self, line)
        except (RpcError, LookupError, ValueError, OSError) as error:
            raise UsageError(str(error).splitlines()[0]) from None

    return call


@magics_class
class RpcMagics(Magics):  # type: ignore[misc]  # IPython is untyped here
    """Magics for sessions with remote devices."""

    NAMES = ("rpc_connect", "rpc_close", "rpc_sessions", "rpc_functions")

    @no_var_expand
    @line_magic
    @_plain_errors
    @magic_arguments()
    @argument("address", nargs="?", default=None, help="HOST:PORT, rpc://HOST:PORT/KEY, or demo for a demo board")
    @argument("--key", default="", help="key that the server serves")
    @argument("--token-file", help="file that holds the server's token")
    @argument("--timeout", type=float, default=10.0, help="seconds for connecting")
    @argument("--session-timeout", type=float, default=0, help="seconds after which the server ends the session")
    @argument("--new", action="store_true", help="open another session although one is open")
    @argument("--as", dest="name", help="name of the session, also bound as a variable")
    def rpc_connect(self, line: str) -> Session | None:
        """Connect to a remote device: ``%rpc_connect HOST:PORT``, or ``%rpc_connect demo`` without any device."""
        options = parse_argstring(self.rpc_connect, line)
        if options.name is not None and not options.name.isidentifier():
            raise UsageError(f"--as expects a variable's name, got {options.name!r}")
        token = Path(options.token_file).read_text().strip() if options.token_file else None
        address = options.address or _default_address()

        def open_session(token: str | None) -> tuple[Session, bool]:
            return BOOK.connect(
                address,
                key=options.key,
                name=options.name,
                new=options.new,
                token=token,
                timeout=options.timeout,
                session_timeout=options.session_timeout,
            )

        try:
            session, fresh = open_session(token or BOOK.tokens.get(address))
        except KeyMismatch:
            asked = _ask_token(address)
            if asked is None:
                raise
            session, fresh = open_session(asked)
            BOOK.tokens[address] = asked
        kind = "rpcnb" if session.is_rpcnb else "stock TVM"
        key = f", key {session.server_key}" if session.server_key else ""
        _say(f"{'connected to' if fresh else 'still connected to'} {session.peer}{key} ({kind})")
        if options.name:
            self.shell.user_ns[options.name] = session
            return None
        return session

    @no_var_expand
    @line_magic
    @_plain_errors
    @magic_arguments()
    @argument("name", nargs="?", default=None, help="name of the session; the current one by default")
    @argument("--all", action="store_true", help="close all, and stop the demo board")
    def rpc_close(self, line: str) -> None:
        """Close a session, or all of them; the server releases what it held."""
        options = parse_argstring(self.rpc_close, line)
        closed = BOOK.close_all() if options.all else BOOK.close(options.name)
        _say(f"closed {', '.join(closed)}" if closed else "no session was open")

    @no_var_expand
    @line_magic
    @_plain_errors
    @magic_arguments()
    def rpc_sessions(self, line: str) -> None:
        """List the open sessions; the current one is marked."""
        parse_argstring(self.rpc_sessions, line)
        current = BOOK.current
        if current is None:
            _say("no session is open; connect with %rpc_connect HOST:PORT or %rpc_connect demo")
        for session in BOOK.sessions.values():
            _say(f"{'*' if session is current else ' '} {session.name}: {session.peer}, {session.state}")

    @no_var_expand
    @line_magic
    @_plain_errors
    @magic_arguments()
    @argument("pattern", nargs="?", default="*", help="such as demo.*")
    @argument("--session", help="name of the session; the current one by default")
    def rpc_functions(self, line: str) -> None:
        """List the functions of a session's server."""
        options = parse_argstring(self.rpc_functions, line)
        for name in fnmatch.filter(BOOK.find(options.session).list_functions(), options.pattern):
            _say(name)


def _ask_token(address: str) -> str | None:
    """Ask for a server's token, once per kernel and address; never where nobody can answer."""
    if os.environ.get("RPCNB_NONINTERACTIVE") == "1" or address in BOOK.asked:
        return None
    BOOK.asked.add(address)
    try:
        return getpass.getpass(f"token of {address}: ").strip() or None
    except (EOFError, NotImplementedError):  # a front end without input
        return None


def _default_address() -> str:
    """Return the newest server of this user, or the demo board."""
    from rpcnb.net.runfiles import list_servers

    for server in list_servers():
        return f"{server['host']}:{server['port']}"
    return "demo"
