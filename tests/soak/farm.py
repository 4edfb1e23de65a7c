"""A large farm, and one whose tracker dies often (robustness T6, T4): python tests/soak/farm.py."""

from __future__ import annotations

import logging
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from typing import Any

import psutil

import rpcnb
from rpcnb.farm.messages import GREETING, encode_frame
from rpcnb.runtime.registry import Registry
from rpcnb.transport.loopthread import LoopThread

BOARDS, WAITING = 1000, 500
SERVERS, KILLS = 50, 20


def raw(port: int, *requests: Any) -> socket.socket:
    """Open a connection and ask."""
    sock = socket.create_connection(("127.0.0.1", port), 30)
    sock.sendall(GREETING + b"".join(map(encode_frame, requests)))
    return sock


def read(sock: socket.socket, count: int) -> bytes:
    """Read exactly so much."""
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, "the tracker hung up"
        data += more
    return data


def reply(sock: socket.socket) -> bytes:
    """Read one reply."""
    return read(sock, struct.unpack("<i", read(sock, 4))[0])


def large() -> None:
    """T6: a thousand boards, five hundred clients that wait, and how long a request takes meanwhile."""
    code = "import rpcnb, time\nt = rpcnb.Tracker(port=0, silent=True)\nprint(t.port, flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    boards = []
    for number in range(BOARDS):
        info = {"key": "server:k", "addr": [None, number + 1]}
        boards.append(raw(port, [5, info], [3, "k", [number + 1, f"k:{number}"], None]))
    for board in boards:
        read(board, 4)
        reply(board)
        reply(board)
    waiting = [raw(port, [4, "other", "", 1, {"rpcnb": "1.0"}]) for _ in range(WAITING)]
    times = []
    client = raw(port)
    read(client, 4)
    for number in range(2000):
        start = time.perf_counter()
        client.sendall(encode_frame([4, "k", "", 1]))
        reply(client)
        times.append(time.perf_counter() - start)
        board = boards[number % BOARDS]
        board.sendall(encode_frame([3, "k", [1, f"k:again{number}"], None]))
        reply(board)
    times.sort()
    memory = psutil.Process(process.pid).memory_info().rss / 2**20
    p99 = times[len(times) * 99 // 100]
    sys.stdout.write(
        f"T6: {BOARDS} boards, {WAITING} waiting clients: request p50 {statistics.median(times) * 1e3:.2f} ms, "
        f"p99 {p99 * 1e3:.2f} ms, worst {times[-1] * 1e3:.1f} ms, tracker's memory {memory:.0f} MiB"
    )
    for sock in (*boards, *waiting, client):
        sock.close()
    process.kill()
    process.wait()


def mortal() -> None:
    """T4: boards whose tracker is killed again and again are all back each time."""
    logging.disable(logging.WARNING)
    tracker = rpcnb.Tracker(port=0, silent=True)
    port = tracker.port
    loop = LoopThread("boards")
    servers = [
        rpcnb.Server(
            port=0, key="k", tracker_addr=("127.0.0.1", port), registry=Registry(), silent=True, loop=loop.io_loop
        )
        for _ in range(SERVERS)
    ]
    back = []
    for _ in range(KILLS):
        tracker.close()
        time.sleep(random.random() * 2)
        start = time.monotonic()
        tracker = rpcnb.Tracker(port=port, port_end=port + 1, silent=True)
        while (tracker.tracking.summary()["queue_info"].get("k") or {}).get("free") != SERVERS:
            time.sleep(0.01)
            assert time.monotonic() - start < 30, tracker.tracking.summary()["queue_info"]
        back.append(time.monotonic() - start)
    sys.stdout.write(f"T4: {SERVERS} boards, tracker killed {KILLS} times: all back after at most {max(back):.1f} s")
    for server in servers:
        server.close()
    tracker.close()
    loop.stop()
    assert threading.active_count() < 20


if __name__ == "__main__":
    large()
    mortal()
