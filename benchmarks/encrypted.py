"""Copies, calls and connections over TLS, beside a raw TLS socket of the same shape.

python -m benchmarks.encrypted [--rounds N] [--quick]
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import rpcnb
from benchmarks.isolation import _best
from benchmarks.rounds import Ratios, machine, options, save, show
from rpcnb.transport.certificates import own_certificate

TOKEN = "benchmark-of-the-encryption"
KINDS = {"one process": "--shared-state", "isolated": "--isolate"}


@contextmanager
def board(kind: str, folder: str) -> Iterator[str]:
    """Start a server that speaks TLS; yields its address."""
    secret, ready = Path(folder) / "token", Path(folder) / f"ready-{time.monotonic_ns()}"
    secret.write_text(TOKEN)
    command = [sys.executable, "-m", "rpcnb", "serve", "--tls", "--port", "0", "--silent", KINDS[kind]]
    with subprocess.Popen([*command, "--token-file", str(secret), "--ready-file", str(ready)]) as process:
        while not ready.exists():
            time.sleep(0.02)
        content = json.loads(ready.read_text())
        yield f"rpcs://127.0.0.1:{content['port']}#{content['fingerprint']}"
        process.terminate()


def serve_raw(listener: socket.socket, nbytes: int) -> None:
    """Receive ``nbytes``, answer a byte; wait for one, send as many back; again and again."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*own_certificate())
    buffer = bytearray(nbytes)
    with suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as sock:
        while _receive(sock, buffer):
            sock.sendall(b"k")
            sock.recv(1)
            sock.sendall(buffer)


def _receive(sock: ssl.SSLSocket, buffer: bytearray) -> bool:
    view, got = memoryview(buffer), 0
    while got < len(view):
        count = sock.recv_into(view[got:], min(len(view) - got, 1 << 20))
        if not count:
            return False
        got += count
    return True


@contextmanager
def raw(nbytes: int) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    """A raw pair: what sends all there, and what fetches all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = get_context("fork").Process(target=serve_raw, args=(listener, nbytes), daemon=True)
        process.start()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        data = bytearray(nbytes)
        with context.wrap_socket(socket.create_connection(listener.getsockname())) as sock:

            def up() -> None:
                sock.sendall(data)
                sock.recv(1)

            def down() -> None:
                sock.sendall(b"g")
                _receive(sock, data)

            yield up, down
        process.join(5)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(rounds: int, nbytes: int) -> Ratios:
    """Measure everything, in rounds."""
    ratios = Ratios()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["RPCNB_CONFIG_DIR"] = folder
        ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {"raw": stack.enter_context(raw(nbytes))}
        calls: dict[str, Any] = {}
        addresses = {kind: stack.enter_context(board(kind, folder)) for kind in KINDS}
        data = np.ones(nbytes // 4, "float32")
        for kind, address in addresses.items():
            session = stack.enter_context(rpcnb.connect(address, token=TOKEN))
            remote = session.empty(data.shape)
            ways[kind] = (lambda remote=remote: remote.copyfrom(data), lambda remote=remote: remote.numpy(data))
            calls[kind] = session.get_function("rpc.test.addone")
        for _ in range(rounds):
            for kind, (up, down) in ways.items():
                ratios.add(f"{kind} up", nbytes / _seconds(up))
                ratios.add(f"{kind} down", nbytes / _seconds(down))
            for kind, address in addresses.items():
                ratios.add(f"{kind} call", _best(lambda kind=kind: calls[kind](1), 500))  # type: ignore[misc]
                open_one = lambda address=address: rpcnb.connect(address, token=TOKEN).close()  # noqa: E731
                ratios.add(f"{kind} connect", _best(open_one, 5))
    return ratios


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__ or "", pin="none")
    ratios = measure(3 if chosen.quick else chosen.rounds, (16 if chosen.quick else 64) << 20)
    rows = []
    for name in (f"{kind} {way}" for way in ("up", "down") for kind in ("raw", *KINDS)):
        kind, _, way = name.rpartition(" ")
        share = ratios.ratio(name, f"raw {way}")
        rows.append([f"copy {way}", kind, f"{ratios.median(name) / 1e9:.2f} GB/s", f"{share:.2f}"])
    rows += [
        [what, kind, f"{ratios.median(f'{kind} {what}') * 1e3:.2f} ms", "-"]
        for what in ("call", "connect")
        for kind in KINDS
    ]
    print(machine(), f"rounds={chosen.rounds}")
    show("TLS (bar of copies: 0.5 of a raw TLS socket)", ("what", "server", "median", "x raw TLS"), rows)
    save(chosen.json, ratios.medians())


if __name__ == "__main__":
    main()
