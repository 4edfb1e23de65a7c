"""One server: ``python -m benchmarks.server_process KIND [PORT]``; prints its port.

Kinds: ``raw``, ``stock``, ``ours``; ``web``, ``proxy``, ``behind PORT`` (a proxy's); ``busy`` and ``short`` (the main
thread computes in pure Python, at Python's own switch interval and at a shorter one), ``numpy`` (it computes in numpy).
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import threading
from typing import Any

BUSY = ("busy", "short", "numpy")


def _raw_session(sock: socket.socket) -> None:
    """Echo protocol: 8-byte length; 0: ping of 24 bytes, answered by 32; n > 0: take n; n < 0: give -n bytes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(bytearray(1))
    ping, pong = bytearray(24), bytes(32)
    while True:
        count = sock.recv_into(ping)
        if not count:
            return
        (n,) = struct.unpack_from("<q", ping)
        if n == 0:
            sock.sendall(pong)
            continue
        if len(memory) < abs(n):
            memory = memoryview(bytearray(abs(n)))
        if n > 0:
            left = n
            while left:
                left -= sock.recv_into(memory[n - left : n])
            sock.sendall(pong)
        else:
            sock.sendall(memory[:-n])


def _raw() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_raw_session, args=(sock,), daemon=True).start()


def add(*args: Any) -> int:
    """The measured function: does nothing with any arguments."""
    return 1


def register_stock() -> None:
    """Register the measured function in the stock server's session process."""
    import tvm

    tvm.register_global_func("bench.add", add, override=True)


def _stock() -> None:
    from tvm import rpc

    server = rpc.Server("127.0.0.1", 9400, 9999, silent=True, server_init_callback=register_stock)
    print(server.port, flush=True)
    sys.stdin.read()
    server.terminate()


def _ours(kind: str = "ours") -> None:
    import rpcnb

    if kind == "proxy":
        with rpcnb.Proxy(port=0, silent=True) as proxy:
            print(proxy.port, flush=True)
            sys.stdin.read()
        return
    rpcnb.register_func("bench.add", add)

    @rpcnb.register_func("bench.async")
    async def add_later(*args: Any) -> int:
        return 1

    @rpcnb.register_func("bench.sleep")
    async def sleep() -> None:
        await asyncio.sleep(0.1)

    @rpcnb.register_func("bench.hop")
    async def hop() -> int:
        return await asyncio.get_running_loop().run_in_executor(None, add)

    if kind == "behind":
        server = rpcnb.Server("127.0.0.1", int(sys.argv[2]), key="bench", is_proxy=True, silent=True)
    elif kind in ("busy", "numpy"):
        server = rpcnb.Server(port=0, silent=True)
    else:  # 0.5 ms: as `rpcnb serve` does
        interval = 0.0003 if kind == "short" else 0.0005
        server = rpcnb.Server(port=0, silent=True, web_port=0 if kind == "web" else None, switch_interval=interval)
    print(server.web_port or server.port, flush=True)
    if kind in BUSY:
        _compute(in_numpy=kind == "numpy")
    sys.stdin.read()
    server.close()


def _compute(in_numpy: bool) -> None:
    """Keep the main thread busy until the process is killed."""
    import numpy as np

    matrix = np.ones((256, 256))
    while True:
        if in_numpy:
            matrix @ matrix


if __name__ == "__main__":
    if sys.argv[1] == "raw":
        _raw()
    elif sys.argv[1] == "stock":
        _stock()
    else:
        _ours(sys.argv[1])
