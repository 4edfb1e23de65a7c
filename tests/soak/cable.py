"""C5: the cable is cut, every packet is dropped both ways. Linux, as root: python tests/soak/cable.py.

Client and board are in network namespaces of their own, with a virtual cable between them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import rpcnb

INSIDE = "RPCNB_CABLE_INSIDE"


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def inside(pid: int, *command: str) -> list[str]:
    """Return a command that runs in the network of another process."""
    return ["nsenter", "-t", str(pid), "-n", *command]


def plug(pid: int, into: str) -> None:
    """Put the far end of the cable in (``up``) or pull it out (``down``)."""
    subprocess.run(inside(pid, "ip", "link", "set", "vb", into), check=True)


def after(start: float, condition: Any, limit: float = 90.0) -> float:
    """Return when a condition came about, in seconds after ``start``."""
    while not condition():
        if time.monotonic() - start > limit:
            raise AssertionError(f"nothing within {limit} s")
        time.sleep(0.05)
    return time.monotonic() - start


def main() -> int:
    """Cut, and see what everybody notices when."""
    if os.environ.get(INSIDE) != "1":
        environment = {**os.environ, INSIDE: "1"}
        return subprocess.run(["unshare", "-n", sys.executable, __file__], env=environment, check=False).returncode
    with subprocess.Popen(["unshare", "-n", "sleep", "600"]) as far, tempfile.TemporaryDirectory() as folder:
        time.sleep(0.5)  # until it has its own network
        for words in (
            ["ip", "link", "add", "name", "va", "type", "veth", "peer", "name", "vb"],
            ["ip", "link", "set", "vb", "netns", str(far.pid)],
            ["ip", "addr", "add", "10.99.0.1/24", "dev", "va"],
            ["ip", "link", "set", "va", "up"],
            inside(far.pid, "ip", "addr", "add", "10.99.0.2/24", "dev", "vb"),
        ):
            subprocess.run(words, check=True)
        plug(far.pid, "up")
        file = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "rpcnb", "serve", "--demo", "--port", "0", "--host", "10.99.0.2"]
        command += ["--no-token", "--insecure", "--silent", "--ready-file", str(file)]
        with subprocess.Popen(inside(far.pid, *command)) as board:
            while not file.exists():
                time.sleep(0.05)
            try:
                story("10.99.0.2:{port}".format(**json.loads(file.read_text())), far.pid)
            finally:
                board.terminate()
                far.kill()
    return 0


def story(address: str, far: int) -> None:
    """Cut the cable under four sessions."""
    idle = rpcnb.connect(address)
    stocklike = rpcnb.connect(address, extensions=False)
    waiting, limited = rpcnb.connect(address), rpcnb.connect(address)
    for session in (idle, stocklike, waiting, limited):
        session.fn.demo.add(1, 2)
    pending = waiting.get_function("demo.sleep").submit(3600)
    sleep = limited.get_function("demo.sleep")
    time.sleep(0.5)
    plug(far, "down")
    start = time.monotonic()
    raised: list[BaseException] = []

    def call() -> None:
        try:
            sleep(3600, timeout=3)
        except rpcnb.RpcError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    say(f"a call with timeout=3: {type(raised[0]).__name__} after {time.monotonic() - start:.1f} s")
    assert isinstance(raised[0], rpcnb.DeadlineExceeded)
    assert time.monotonic() - start < 3.5
    seconds = after(start, lambda: waiting.state in ("unresponsive", "lost"))
    say(f"a session with a call on the way: {waiting.state} after {seconds:.1f} s")
    seconds = after(start, pending.done)
    say(f"its call: {type(pending.exception()).__name__} after {seconds:.1f} s")
    assert seconds < 65
    for name, session in (("idle", idle), ("idle, as to a stock server", stocklike)):
        seconds = after(start, lambda: session.state == "lost")  # noqa: B023
        say(f"a session that is {name}: lost after {seconds:.1f} s")
        assert seconds < 65
    plug(far, "up")
    idle.reconnect()
    assert idle.fn.demo.add(2, 3) == 5
    say("the cable is whole again: the session was opened again, and answers")
    for session in (idle, stocklike, waiting, limited):
        session.close()


if __name__ == "__main__":
    sys.exit(main())
