"""Parse the command line and run a command.

Exit codes: 0 done; 1 the operation failed (a remote error, a file); 2 wrong usage; 3 no connection; 130 interrupted.
Errors are one line on standard error, without a traceback.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ConnectFailed, IsolationFailed, RpcError
from rpcnb.protocol.secret import TOKEN_ON_LINE, Secret
from rpcnb.transport.terminal import PrintableFormatter, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

DONE, FAILED, USAGE, NO_CONNECTION, INTERRUPTED = 0, 1, 2, 3, 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rpcnb",
        description="Drive remote devices: TVM's RPC with an event-driven server.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage, 3 no connection, 130 interrupted",
    )
    from rpcnb import __version__

    parser.add_argument("--version", action="version", version=f"rpcnb {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _serve_options(commands.add_parser("serve", help="serve this machine's functions, memory and files"))
    servers = commands.add_parser("servers", help="list the running servers of this user")
    servers.add_argument("--json", action="store_true", help="print JSON")
    call = commands.add_parser("call", help="call a remote function")
    _peer_options(call)
    call.add_argument("name", metavar="NAME", help="function, such as demo.add")
    call.add_argument("args", nargs="*", metavar="ARG", help="numbers, True, None or text")
    functions = commands.add_parser("functions", help="list a server's functions")
    _peer_options(functions)
    functions.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'demo.*'")
    _tracker_options(commands.add_parser("tracker", help="hand out boards by key"))
    _proxy_options(commands.add_parser("proxy", help="join clients with servers that dial out, TCP or WebSocket"))
    devices = commands.add_parser("devices", help="list the boards of a tracker")
    where = "tracker (default: TVM_TRACKER_HOST and TVM_TRACKER_PORT, else this machine's at 9190)"
    devices.add_argument("address", metavar="HOST:PORT", nargs="?", default=None, help=where)
    devices.add_argument("--json", action="store_true", help="print JSON")
    devices.add_argument("--stock", action="store_true", help="print what tvm.exec.query_rpc_tracker prints")
    devices.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    devices.add_argument("--timeout", type=float, default=10.0, metavar="S", help="seconds for an answer")
    runtime = commands.add_parser("runtime", help="copy TVM's runtime (5 MB) for a board: rpcnb serve --runtime FOLDER")
    runtime.add_argument("folder", metavar="FOLDER", help="where to put it")
    what = "of apache-tvm, also of another machine; by default the one that is installed here"
    runtime.add_argument("--from", dest="wheel", metavar="WHEEL", help=what)
    commands.add_parser("demo", help="show the whole story in the terminal: a demo board, calls, copies, a wait")
    return parser


def _peer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "address", metavar="HOST:PORT", help="server, rpc://host:port/key, tracker://host:port/key or ws://host:port/ws"
    )
    parser.add_argument("--key", default="", help="key that the server serves")
    parser.add_argument("--token-file", metavar="FILE", help="file that holds the server's token")
    parser.add_argument("--plain-token", action="store_true", help="send it in clear, to an rpcnb older than proofs")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="seconds for connecting and calling")


def _serve_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=9090, help="first port to try, 0 for any")
    add("--port-end", type=int, default=9199, help="last port to try, exclusive")
    add("--key", default="", help="key that clients must name")
    add("--token-file", metavar="FILE", help="file that holds the token (default: a fresh token)")
    add("--no-token", action="store_true", help="let anybody in who can reach the port")
    add("--insecure", action="store_true", help="allow --no-token beyond this machine")
    add("--allow-native", action="store_true", help="let clients load compiled code without a token")
    add("--allow-exec", action="store_true", help="let clients run Python source here (%%%%rpc): full trust")
    add("--expose-ffi", action="store_true", help="let clients call every global function of apache-tvm-ffi")
    add("--trusted-paths", action="store_true", help="let file names leave the session's directory, as stock TVM does")
    add("--custom-addr", metavar="HOST", help="address under which others reach this machine")
    add("--load", action="append", default=[], metavar="MODULE_OR_FILE", help="import before serving; repeatable")
    add("--load-library", metavar="PATHS", help="compiled libraries to load, with : between them")
    add(
        "--runtime",
        metavar="auto|PATH|none",
        help="load TVM's runtime, for Relax models and GPUs, of an installed apache-tvm or this file; "
        "by default when a library needs it",
    )
    add("--session", metavar="NAME", help="registered session constructor that serves clients")
    add("--isolate", action="store_true", help="a process for each session (the default on Linux)")
    add("--shared-state", action="store_true", help="one process for all: where a module owns the hardware, or a state")
    add("--preload", action="append", default=[], metavar="MODULE", help="import once, for all processes; no threads")
    add("--memory", metavar="SIZE", help="what a session's process may use, for example 2G")
    add("--cpu-time", type=float, metavar="S", help="processor seconds that a session's process may use")
    add("--max-sessions", type=int, metavar="N", help="sessions at once")
    add("--tracker", metavar="HOST:PORT", help="let this tracker hand it out")
    add("--trust-tracker", action="store_true", help="who comes from the tracker (or proxy) needs no token")
    add("--proxy", metavar="HOST:PORT", help="dial out to this proxy (or ws://...) instead of listening")
    add("--web-port", type=int, metavar="N", help="listen for WebSockets too, at ws://HOST:N/ws; 0 for any port")
    _origin_option(parser)
    add("--tls", action="store_true", help="encrypt, with a certificate of its own that is made at the first time")
    add("--tls-cert", metavar="FILE", help="encrypt, with this certificate")
    add("--tls-key", metavar="FILE", help="private key of --tls-cert, if it is not in there")
    add("--tls-ca", metavar="FILE", help="ask clients for certificates that these authorities have signed")
    add("--plain-port", type=int, metavar="N", help="with --tls: listen without it too, for stock TVM; 0 for any port")
    add("--audit", metavar="FILE", help="note each session, call, upload and refusal in this file, without values")
    add("--ready-file", metavar="PATH", help="write host, port, pid and key as JSON when listening")
    add("--until-eof", action="store_true", help="end when the standard input ends: with the process that holds it")
    add("--demo", action="store_true", help="serve the demo board's functions")
    add("--link", metavar="RATE,LATENCY", help="shape the link, for example 10M,20ms")
    add("--silent", action="store_true", help="print errors only")
    add("--no-fork", action="store_true", help=argparse.SUPPRESS)  # TVM's; here it is --shared-state
    add("--through-proxy", action="store_true", help=argparse.SUPPRESS)  # TVM's: --host and --port are the proxy's


def _origin_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="NAME",
        help="host name (of a hub, say) under which browsers may reach the WebSocket; repeatable",
    )


def _service_options(parser: argparse.ArgumentParser, port: int) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=port, help="first port to try, 0 for any")
    add("--port-end", type=int, default=9199, help="last port to try, exclusive")
    add("--insecure", action="store_true", help="allow to listen beyond this machine")
    add("--ready-file", metavar="PATH", help="write host, port and pid as JSON when listening")
    add("--silent", action="store_true", help="print errors only")


def _tracker_options(parser: argparse.ArgumentParser) -> None:
    _service_options(parser, 9190)


def _proxy_options(parser: argparse.ArgumentParser) -> None:
    _service_options(parser, 9090)
    add = parser.add_argument
    add("--web-port", type=int, metavar="N", help="listen for WebSockets too, at ws://HOST:N/ws; 0 for any port")
    _origin_option(parser)
    add("--tracker", default="", metavar="HOST:PORT", help="let this tracker hand out the servers that wait here")
    add("--client-timeout", type=float, default=600.0, metavar="S", help="seconds a client waits for its server")
    add("--server-timeout", type=float, default=600.0, metavar="S", help="seconds a server waits for its client")
    add("--index-page", metavar="FILE", help="HTML page to serve at the web port")
    add("--resource", action="append", default=[], metavar="FOLDER:FILE", help="file to serve there; repeatable")


def _read_token(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path) as file:
        return Secret(file.read().strip())


def _argument(text: str) -> Any:
    """Read an argument as a Python literal, else as text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float, str, bytes, type(None))) else text


def _connect(options: argparse.Namespace) -> Any:
    from rpcnb.client.opening import connect

    token = _read_token(options.token_file)
    return connect(
        options.address, key=options.key, token=token, timeout=options.timeout, plain_token=options.plain_token
    )


def _call(options: argparse.Namespace) -> int:
    with _connect(options) as session:
        function = session.get_function(options.name)
        result = function(*map(_argument, options.args), timeout=options.timeout)
        if hasattr(result, "numpy"):
            result = result.numpy()
        if result is not None:
            _print(result if isinstance(result, str) else repr(result))
    return DONE


def _functions(options: argparse.Namespace) -> int:
    import fnmatch

    with _connect(options) as session:
        for name in fnmatch.filter(session.list_functions(), options.pattern):
            _print(name)
    return DONE


def _runtime(options: argparse.Namespace) -> int:
    from rpcnb.runtime.tvmruntime import copy_runtime

    for path in copy_runtime(Path(options.folder), None if options.wheel is None else Path(options.wheel)):
        _print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return DONE


def _servers(options: argparse.Namespace) -> int:
    from rpcnb.transport.address import show_address
    from rpcnb.transport.runfiles import list_servers

    found = [{key: value for key, value in server.items() if key != "token"} for server in list_servers()]
    if options.json:
        _print(json.dumps(found))
        return DONE
    if not found:
        _print("no server of this user is running; start one with: rpcnb serve")
    for server in found:
        address = show_address(str(server.get("host")), int(server.get("port", 0)))
        if server.get("fingerprint"):
            address = f"rpcs://{address}#{server['fingerprint']}"
        _print(f"{address:24} key {server.get('key')!r:12} pid {server.get('pid')}")
    return DONE


def _print(text: str) -> None:
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()


def _take_token(words: list[str], at: int, own: bool) -> list[str]:
    """Take a token from the words of a script, which has no history; returns the words without it.

    Of this process's own line (``own``) it is taken out for good, also of the list of processes: it begins anew.
    """
    word, _, token = words[at].partition("=")
    end = at + 1
    if not token and words[at] == word:
        token, end = (words[end], end + 1) if end < len(words) else ("", end)
    sys.stderr.write(f"rpcnb: {TOKEN_ON_LINE}\n")
    sys.stderr.flush()
    reading, writing = os.pipe()
    os.write(writing, token.encode())
    os.close(writing)
    kept = [*words[:at], "--token-file", f"/dev/fd/{reading}", *words[end:]]
    if own:
        os.set_inheritable(reading, True)
        os.execv(sys.executable, [*sys.orig_argv[: -len(words)], *kept])
    return kept


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; a pattern or arguments may stand behind options, where argparse itself does not look for them."""
    parser = _parser()
    words = [*(sys.argv[1:] if argv is None else argv)]
    at = next((at for at, word in enumerate(words) if word == "--token" or word.startswith("--token=")), None)
    if at is not None:
        if words[:1] != ["serve"] or any(one is not None and one.isatty() for one in (sys.stdin, sys.stdout)):
            parser.error(TOKEN_ON_LINE)
        words = _take_token(words, at, argv is None)
    options, extra = parser.parse_known_args(words)
    if extra and not any(word.startswith("--") for word in extra):
        if options.command == "call":
            options.args += extra
            extra = []
        elif options.command == "functions" and len(extra) == 1 and options.pattern == "*":
            options.pattern, extra = extra[0], []
    if extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parse(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    level = logging.ERROR if getattr(options, "silent", False) else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])
    try:
        if options.command == "serve":
            from rpcnb.command.serve import serve

            return serve(options)
        if options.command in ("tracker", "proxy", "devices"):
            from rpcnb.command import farm

            run: Callable[[argparse.Namespace], int] = getattr(farm, options.command)
            return run(options)
        if options.command == "demo":
            from rpcnb.command.story import tell

            return tell()
        commands = {"call": _call, "functions": _functions, "servers": _servers, "runtime": _runtime}
        return commands[options.command](options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return DONE
    except ConnectFailed as error:
        return _fail(error, NO_CONNECTION)
    except IsolationFailed as error:
        return _fail(error, USAGE)
    except (RpcError, OSError) as error:
        return _fail(error, FAILED)
    except (ValueError, ImportError, TypeError, LookupError, SyntaxError) as error:
        return _fail(error, USAGE)


def _fail(error: BaseException, code: int) -> int:
    lines = str(error).splitlines() or [type(error).__name__]
    sys.stderr.write(f"rpcnb: {printable(lines[0])}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
