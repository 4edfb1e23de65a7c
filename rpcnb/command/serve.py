"""``rpcnb serve``: a server in a process of its own, on a board."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rpcnb.command.until import until_signal
from rpcnb.link.hosts import VARIABLE
from rpcnb.runtime.backend import ffi_global_names
from rpcnb.runtime.registry import REGISTRY
from rpcnb.server.isolation import CAN_ISOLATE, Isolation
from rpcnb.server.modules import load_modules
from rpcnb.server.server import Server
from rpcnb.transport.address import is_loopback, outside_address, parse_address, parse_pair, show_address
from rpcnb.transport.loopthread import call_in_loop
from rpcnb.transport.runfiles import publish, write_atomically
from rpcnb.transport.terminal import printable
from rpcnb.transport.tlsfiles import Tls

if TYPE_CHECKING:
    import argparse

    from rpcnb.cells.runners import Runner
    from rpcnb.command.until import Stop

__all__ = ["serve"]

# A process of our own: another thread gets the interpreter within half a millisecond (performance.md 7).
_SWITCH_INTERVAL = 0.0005


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    with until_signal() as stop:
        return _serve_until(stop, options)


def _serve_until(stop: Stop, options: argparse.Namespace) -> int:
    if options.through_proxy:
        options.proxy = show_address(options.host, options.port)
    isolation = _isolation(options)
    loaded: frozenset[str] = frozenset()
    runner = None
    if isolation is None:
        loaded = load_modules(_modules(options), before=ffi_global_names())
        if options.allow_exec:
            from rpcnb.cells.runners import MainThread

            runner = MainThread()  # this thread has nothing else to do
    server = _make_server(options, loaded, runner, isolation)
    shaped = None
    published: Path | None = None
    try:
        port = server.port
        if options.link:
            shaped, port = _shape(server, options)
        published = publish(port, _content(options, server, port, secret=True))
        if options.until_eof:
            threading.Thread(target=_await_end_of_input, args=(stop,), name="rpcnb-input", daemon=True).start()
        if options.ready_file:
            write_atomically(Path(options.ready_file), _content(options, server, port, secret=False))
        if not options.silent:
            _announce(options, server, port)
        if runner is None:
            stop.wait()
        else:
            runner.run(stop.wait)
    finally:
        if shaped is not None:
            call_in_loop(server.io_loop, shaped.close)
        server.close()
        if published is not None:
            published.unlink(missing_ok=True)
    return 0


def _await_end_of_input(stop: Stop) -> None:
    """Stop when the standard input has ended, also because the process at its other end was killed."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    stop.set()


def _modules(options: argparse.Namespace) -> list[str]:
    """Return what is imported for its functions."""
    return [*options.load, *(["rpcnb.command.demo:register_demo"] if options.demo else [])]


def _isolation(options: argparse.Namespace) -> Isolation | None:
    """Return how sessions are isolated; None where they share one process."""
    if options.isolate and options.shared_state:
        raise ValueError("--isolate and --shared-state exclude each other")
    if options.shared_state or options.no_fork or not (options.isolate or CAN_ISOLATE):
        wanted = {"--memory": options.memory, "--cpu-time": options.cpu_time, "--preload": options.preload}
        for name, value in wanted.items():
            if value:
                raise ValueError(f"{name} is for sessions that have processes of their own; leave out --shared-state")
        return None
    memory = None if options.memory is None else parse_size(options.memory)
    return Isolation(_modules(options), options.preload, False, memory, options.cpu_time, options.session)


def parse_size(text: str) -> int:
    """Return the bytes of ``512M`` or ``2G``.

    Raises:
        ValueError: It is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise ValueError(f"expected a size such as 512M or 2G, got {text!r}")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))


def _make_server(
    options: argparse.Namespace, ffi_names: frozenset[str], runner: Runner | None, isolation: Isolation | None
) -> Server:
    token: str | bool | None = None
    given = os.environ.pop(VARIABLE, None)  # functions that are served need not see it
    if options.token_file:
        token = Path(options.token_file).read_text().strip()
    elif given and not options.no_token:
        token = given.strip()
    if options.no_token:
        if token is not None:
            raise ValueError("--no-token and a token exclude each other")
        token = False
    session = None
    if options.session and isolation is None:
        entry = REGISTRY.get(options.session)
        if entry is None:
            raise LookupError(
                f"no session constructor is registered as {options.session!r}; load its module with --load"
            )
        session = entry.call
    if options.link and (options.tracker or options.proxy):
        raise ValueError("--link shapes the connections of clients that dial here; leave out --tracker and --proxy")
    if options.proxy and options.tracker and not options.through_proxy:
        raise ValueError("a server behind a proxy is registered by the proxy; leave --tracker out")
    proxy = parse_address(options.proxy) if options.proxy else None
    tracker = parse_pair(options.tracker, 9190) if options.tracker else None
    loopback = is_loopback(options.host)
    return Server(
        options.proxy or (options.host if not options.link else "127.0.0.1"),
        proxy.port if proxy is not None else 0 if options.link else options.port,
        options.port_end,
        proxy is not None,
        tracker,
        key=options.key,
        load_library=options.load_library,
        runtime=options.runtime,
        custom_addr=options.custom_addr,
        silent=True,
        token=True if token is None and (loopback or options.link or proxy is not None) else token,
        session=session,
        max_sessions=options.max_sessions,
        allow_native=options.allow_native,
        expose_ffi=options.expose_ffi,
        trusted_paths=options.trusted_paths,
        insecure=options.insecure,
        ffi_names=ffi_names,
        web_port=options.web_port,
        allow_origin=options.allow_origin,
        trust_tracker=options.trust_tracker,
        allow_exec=runner or bool(options.allow_exec),
        isolate=isolation or False,
        tls=_tls(options),
        plain_port=options.plain_port,
        audit=options.audit,
        switch_interval=_SWITCH_INTERVAL,
    )


def _tls(options: argparse.Namespace) -> bool | Tls:
    """Return how the port is encrypted; False where it is not."""
    if options.tls_key and not options.tls_cert:
        raise ValueError("--tls-key is the key of a certificate: give --tls-cert FILE too")
    if not (options.tls or options.tls_cert or options.tls_ca):
        return False
    if options.link:
        raise ValueError("--link shapes a plain connection; leave out --tls")
    return Tls(options.tls_cert, options.tls_key, options.tls_ca)


def _shape(server: Server, options: argparse.Namespace) -> tuple[Any, int]:
    """Put a shaped relay in front of the server."""
    import asyncio

    from rpcnb.transport.shaper import Shaper, parse_link

    if not is_loopback(options.host) and options.no_token and not options.insecure:
        raise ValueError(f"a server on {options.host} without a token is open to everybody; --insecure allows it")
    rate, latency = parse_link(options.link)
    shaper = Shaper(("127.0.0.1", server.port), rate, latency)
    loop = server.io_loop.asyncio_loop
    last: OSError | None = None
    for port in range(options.port, max(options.port_end, options.port + 1)) if options.port else (0,):
        try:
            asyncio.run_coroutine_threadsafe(shaper.start(options.host, port), loop).result(10)
            return shaper, shaper.port
        except OSError as error:  # noqa: PERF203  # each port may be taken
            last = error
    assert last is not None
    raise last


def _content(options: argparse.Namespace, server: Server, port: int, *, secret: bool) -> dict[str, Any]:
    content = server.whereabouts
    if options.proxy:
        content["proxy"] = options.proxy  # others may wait at the same port: the key tells them apart
    else:
        content |= {"host": options.host, "port": port}  # of the shaped relay, where there is one
    if options.demo:
        content["kind"] = "demo"
    return {**content, "token": server.token} if secret else content


def _announce(options: argparse.Namespace, server: Server, port: int) -> None:
    """Say where it listens, and what to paste."""
    host = server.host if options.proxy else options.custom_addr or outside_address(options.host)
    address = show_address(host, port)
    if server.fingerprint is not None:
        address = f"rpcs://{address}/{quote(options.key)}#{server.fingerprint}"
    if options.tracker:
        address = f"tracker://{options.tracker}/{options.key}"
    key, named = (
        (f" --key {options.key}", f", key={options.key!r}") if options.key and "://" not in address else ("", "")
    )
    where = f"behind the proxy {options.proxy}" if options.proxy else f"on {show_address(options.host, port)}"
    lines = [f"rpcnb serves {where}, key {options.key!r}"]
    if options.tracker:
        lines.append(f"  tracker:    {options.tracker} hands it out, {server.max_sessions} at a time")
    if server.web_port is not None:
        lines.append(f"  WebSocket:  ws://{show_address(host, server.web_port)}/ws")
    if server.token is None:
        lines.append("  no token:   whoever can reach this port may call its functions")
    else:
        own = "; this user's own clients here find it by themselves" if is_loopback(host) else ""
        lines.append(f"  token:      {server.token}{own}")
        if not options.trust_tracker:
            named += f", token={server.token!r}"
    lines += [
        f"  notebook:   %load_ext rpcnb, then %rpc_connect {address}{key}        (asks for the token where it must)",
        f"  Python:     rpcnb.connect({address!r}{named})",
    ]
    plain = port if server.fingerprint is None else server.plain_port
    if server.token is not None and not options.tracker and plain is not None:
        lines.append(f"  stock TVM:  rpc.connect({host!r}, {plain}, key={f'{options.key} -token={server.token}'!r})")
    if options.tracker and (server.token is None or options.trust_tracker):
        tracker = parse_pair(options.tracker, 9190)
        lines.append(f"  stock TVM:  rpc.connect_tracker{tracker!r}.request({options.key!r})")
    if server.fingerprint is None and not options.proxy and not is_loopback(options.host):
        lines.append("  encryption: none: who listens on the way hears everything; --tls, or ssh, hides it")
    sys.stdout.write(printable("\n".join(lines)) + "\n")
    sys.stdout.flush()


def ready(path: Path) -> dict[str, Any] | None:
    """Read a ready file; None while it is not there."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content
