"""``rpcnb demo``: the whole story in the terminal."""

from __future__ import annotations

import sys
import time

from rpcnb.client.opening import connect
from rpcnb.command.board import DemoBoard
from rpcnb.errors import RemoteError

__all__ = ["tell"]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def tell() -> int:
    """Start a demo board, use everything once, and stop it; returns the exit code."""
    import numpy as np

    _say("starting a demo board (rpcnb serve --demo) with a link of 40 MB/s and 2 ms ...")
    with DemoBoard("40M,2ms") as board, connect(board.address, key="demo") as session:
        _say(f">>> session = rpcnb.connect({board.address!r}, key='demo')\n{session}")
        _say(f">>> session.fn.demo.add(1, 2)\n{session.fn.demo.add(1, 2)}")
        _say(f">>> session.fn.demo.sensor(3)          # answers later, by a callback\n{session.fn.demo.sensor(3)}")
        x = np.random.default_rng(0).random((1024, 1024), np.float32)
        start = time.perf_counter()
        remote = session.array(x)
        seconds = time.perf_counter() - start
        _say(f">>> x = session.array(...)              # {x.nbytes >> 20} MiB in {seconds:.2f} s\n{remote}")
        product = session.fn.demo.matmul(remote, remote)
        error = float(np.abs(product.numpy() - x @ x).max())
        _say(f">>> session.fn.demo.matmul(x, x).numpy()  # differs from numpy's by {error:.1e}")
        timing = session.time_evaluator("demo.matmul", session.cpu(), number=3, repeat=3)(remote, remote)
        _say(f">>> session.time_evaluator('demo.matmul', session.cpu(), number=3, repeat=3)(x, x)\n{timing}")
        try:
            session.fn.demo.fail()
        except RemoteError as raised:
            _say(f">>> session.fn.demo.fail()\n{type(raised).__name__}: {str(raised).splitlines()[0]}")
    _say("the board has been stopped; in a notebook: %load_ext rpcnb, then %rpc_connect demo")
    return 0
