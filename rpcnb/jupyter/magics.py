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
from urllib.parse import quote

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from rpcnb.errors import CellError, KeyMismatch, RpcError
from rpcnb.jupyter.serving import kernel_server, paste_lines, serve, share_lines, stop_serving
from rpcnb.jupyter.sessions import BOOK
from rpcnb.link.hosts import Host, remember_host
from rpcnb.protocol.secret import TOKEN_ON_LINE, Secret, hidden
from rpcnb.transport.address import parse_address, show_address
from rpcnb.transport.certificates import config_directory
from rpcnb.transport.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.client.session import Session
    from rpcnb.server.server import Server

__all__ = ["RpcMagics", "describe", "plain_errors", "say"]


def say(text: str) -> None:
    """Print a line under the cell."""
    sys.stdout.write(f"{printable(text)}\n")


def describe(session: Session) -> str:
    """Return a session's peer, key and kind, and what a stock server lacks."""
    key = f", key {session.server_key}" if session.server_key else ""
    kind = "rpcnb" if session.is_rpcnb else "stock TVM: no overlapping calls, no remote cancel, no cells, no tracebacks"
    return f"{session.peer}{key} ({kind})"


def plain_errors(function: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Show help for ``-h``, and errors as one line without a traceback."""

    @wraps(function)
    def call(self: Any, line: str) -> Any:
        if any(word == "--token" or word.startswith("--token=") for word in line.split()):
            raise UsageError(TOKEN_ON_LINE)
        if line.split()[:1] in (["-h"], ["--help"]):
            say(function.__doc__ or "")
            return None
        try:
            return function(self, line)
        except CellError:
            raise  # it shows the remote traceback
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # where we waited is nothing to the user
        except (RpcError, LookupError, ValueError, OSError) as error:
            raise UsageError(printable(str(error).splitlines()[0])) from None

    return call


@magics_class
class RpcMagics(Magics):  # type: ignore[misc]  # IPython is untyped here
    """Magics for sessions with remote devices."""

    NAMES = ("rpc_connect", "rpc_close", "rpc_sessions", "rpc_functions", "rpc_serve")

    @line_magic  # IPython expands {port} in its line
    @plain_errors
    @magic_arguments()
    @argument(
        "address", nargs="?", default=None, help="a known name, HOST:PORT, a URL (rpc, rpcs, tracker...), or demo"
    )
    @argument("--key", default="", help="key that the server serves")
    @argument("--token-file", help="file that holds the server's token")
    @argument("--plain-token", action="store_true", help="send it in clear, to an rpcnb older than proofs")
    @argument("--via", metavar="HOST:PORT", help="go on to the address from this server")
    @argument("--timeout", type=float, default=10.0, help="seconds for connecting")
    @argument("--session-timeout", type=float, default=0, help="seconds after which the server ends the session")
    @argument("--new", action="store_true", help="open another session although one is open")
    @argument("--as", dest="name", help="name of the session, also bound as a variable")
    @argument("--trust-output", action="store_true", help="show its HTML and JavaScript as this kernel's own")
    @argument("--remember", metavar="NAME", help="keep address and token under this name, in a file of yours")
    def rpc_connect(self, line: str) -> Session | None:
        """Connect to a remote device: ``%rpc_connect HOST:PORT``, or ``%rpc_connect demo`` without any device."""
        options = parse_argstring(self.rpc_connect, line)
        if options.name is not None and not options.name.isidentifier():
            raise UsageError(f"--as expects a variable's name, got {options.name!r}")
        token = Secret(Path(options.token_file).expanduser().read_text().strip()) if options.token_file else None
        address, key, onward = options.address or _default_address(), options.key, None
        if options.via:
            inner = parse_address(address, None, key)
            address, key, onward = options.via, "", ["rpc.Connect", inner.host, inner.port, inner.key]

        def open_session(token: str | None) -> tuple[Session, str]:
            return BOOK.connect(
                address,
                key=key,
                name=options.name,
                new=options.new,
                token=token,
                timeout=options.timeout,
                session_timeout=options.session_timeout,
                session_constructor_args=onward,
                plain_token=options.plain_token,
                trust_output=options.trust_output or None,
            )

        try:
            session, word = open_session(token or BOOK.tokens.get(address))
        except KeyMismatch:
            asked = _ask_token(address)
            if asked is None:
                raise
            session, word = open_session(asked)
            BOOK.tokens[address] = asked
            options.remember = options.remember or _ask_name(session)
        if options.trust_output:
            session.trust_output = True
        to = "" if word == "reconnected" else "to "
        say(f"{word} {to}{describe(session)}{f', via {options.via}' if options.via else ''}")
        if options.remember:
            known = token or hidden(BOOK.tokens.get(address, "")) or Secret("")
            remember_host(Host(options.remember, address, key, known, trust_output=options.trust_output))
            say(f"from now on %rpc_connect {options.remember} is enough ({config_directory() / 'hosts.toml'})")
        if options.name:
            self.shell.user_ns[options.name] = session
        return session

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("name", nargs="?", default=None, help="name of the session; the current one by default")
    @argument("--session", help="the same")
    @argument("--all", action="store_true", help="close all, and stop the demo board")
    def rpc_close(self, line: str) -> None:
        """Close a session, or all of them; the server releases what it held."""
        options = parse_argstring(self.rpc_close, line)
        closed = BOOK.close_all() if options.all else BOOK.close(options.name or options.session)
        say(f"closed {', '.join(closed)}" if closed else "no session was open")

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("--session", help="only this one")
    def rpc_sessions(self, line: str) -> None:
        """List the open sessions; the current one is marked."""
        options = parse_argstring(self.rpc_sessions, line)
        current = BOOK.current
        if current is None:
            say("no session is open; connect with %rpc_connect HOST:PORT or %rpc_connect demo")
        for lost in BOOK.lost:
            say(f"! {lost.name}: {lost.peer}, lost; %rpc_connect opens it again")
        for session in BOOK.sessions.values() if options.session is None else [BOOK.find(options.session)]:
            say(f"{'*' if session is current else ' '} {session.name}: {session.peer}, {session.state}")

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("pattern", nargs="?", default="*", help="such as demo.*")
    @argument("--session", help="name of the session; the current one by default")
    def rpc_functions(self, line: str) -> None:
        """List the functions of a session's server."""
        options = parse_argstring(self.rpc_functions, line)
        names = fnmatch.filter(BOOK.find(options.session).list_functions(), options.pattern)
        for name in names or [f"no function matches {options.pattern}"]:
            say(name)

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("--port", type=int, default=0, help="port to listen on; any free one by default")
    @argument("--key", default="", help="key that clients must name")
    @argument("--host", default="127.0.0.1", help="address to listen on; only this machine by default")
    @argument("--web-port", type=int, help="listen for WebSockets too; 0 for any free port")
    @argument("--allow-origin", action="append", default=[], metavar="NAME", help="host name of a hub; repeatable")
    @argument("--no-token", action="store_true", help="let anybody in who can reach the port")
    @argument("--allow-native", action="store_true", help="let clients load compiled code without a token")
    @argument("--allow-exec", action="store_true", help="let clients run source here (%%%%rpc): full trust")
    @argument("--share", action="store_true", help="print the line that a colleague pastes")
    @argument("--run", choices=("thread", "kernel"), default="thread", help="where plain functions run")
    @argument("--max-sessions", type=int, help="sessions at once")
    @argument("--switch-interval", type=float, metavar="S", help="0.0003: quick answers beside a busy main thread")
    @argument("--stop", action="store_true", help="end the server")
    def rpc_serve(self, line: str) -> Server | None:
        """Make this kernel a device: serve the functions that its cells register."""
        options = parse_argstring(self.rpc_serve, line)
        if options.stop:
            say("stopped serving" if stop_serving() else "this kernel does not serve")
            return None
        before = kernel_server()
        clients = before.sessions if before is not None else 0
        server = serve(
            options.port,
            options.key,
            options.host,
            share=options.share,
            web_port=options.web_port,
            allow_origin=options.allow_origin,
            token=not options.no_token,
            allow_native=options.allow_native,
            allow_exec=options.allow_exec,
            run=options.run,
            max_sessions=options.max_sessions,
            switch_interval=options.switch_interval,
        )
        if before is not None and before is not server:
            say(f"stopped {before.address} with {clients} session{'' if clients == 1 else 's'}: its words were others")
        for text in [*paste_lines(server), *(share_lines(server) if options.share else ())]:
            say(text)
        return server


def _ask_token(address: str) -> str | None:
    """Ask for a server's token, once per kernel and address; never where nobody can answer."""
    if os.environ.get("RPCNB_NONINTERACTIVE") == "1" or address in BOOK.asked:
        return None
    BOOK.asked.add(address)
    try:
        return hidden(getpass.getpass(f"token of {address}: ").strip() or None)
    except (EOFError, NotImplementedError):  # a front end without input
        return None


def _ask_name(session: Session) -> str:
    """Ask under which name a server and its token are to be kept; empty for not at all."""
    try:
        return input(f"keep the token of {session.peer} for next time? Its name, or nothing: ").strip()
    except (EOFError, NotImplementedError, RuntimeError, OSError):  # a front end without input
        return ""


def _default_address() -> str:
    """Return this kernel's server, else the newest one of this user, else the demo board."""
    from rpcnb.transport.runfiles import list_servers

    own = kernel_server()
    if own is not None:
        return f"rpc://{own.address}/{quote(own.key)}"
    board = BOOK.board.pid if BOOK.board is not None else 0
    for server in list_servers():
        if server.get("pid") != board and not server.get("proxy"):
            scheme, pin = ("rpcs", f"#{server['fingerprint']}") if server.get("fingerprint") else ("rpc", "")
            where = show_address(server["host"], server["port"])
            return f"{scheme}://{where}/{quote(str(server.get('key') or ''))}{pin}"
    return "demo"
