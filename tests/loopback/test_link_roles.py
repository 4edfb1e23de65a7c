"""Who drives a link, and how long a turn is: faults that a review found, each with the test that showed it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from rawpeer import RawClient, packet
from test_server_packets import function_handle

import rpcnb
from rpcnb import errors
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import CallFunc, Syscall
from rpcnb.runtime.registry import Registry
from rpcnb.values import CPU

Serve = Callable[..., Any]


def test_a_resumed_operation_is_driven_when_the_pump_leaves(serve: Serve, registry: Registry) -> None:
    registry.register("add", lambda a, b: a + b)
    with rpcnb.connect(serve().address) as session:
        add = session.get_function("add")
        fill = session._link.wire.fill

        def slowly() -> None:  # so that both replies lie there when the pump looks
            time.sleep(0.01)
            fill()

        session._link.wire.fill = slowly
        for _ in range(10):
            session._ops._helpers.clear()
            job = session.submit(session.call, "add", 1, 2)  # two steps: look up, call
            assert add(3, 4, timeout=10) == 7
            done, _ = concurrent.futures.wait([job], timeout=5)
            assert done == {job}


def test_a_time_limit_wakes_a_waiter_that_pumps_in_another_thread(serve: Serve, registry: Registry) -> None:
    async def later() -> None:
        await asyncio.sleep(2)

    registry.register("later", later)
    outcomes: list[Any] = []
    with rpcnb.connect(serve().address) as session:
        job = session.get_function("later").submit(timeout=0.1)

        def wait() -> None:
            start = time.monotonic()
            try:
                job.result()
            except errors.DeadlineExceeded:
                outcomes.append(time.monotonic() - start)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(10)
    assert outcomes
    assert outcomes[0] < 1.5


def test_sleepers_are_woken_though_one_reply_settles_two(serve: Serve, registry: Registry) -> None:
    registry.register("echo", lambda value: value)
    wrong: list[Any] = []
    with rpcnb.connect(serve().address) as session:
        echo = session.get_function("echo")
        fill = session._link.wire.fill

        def slowly() -> None:  # replies pile up, so that one look settles several
            time.sleep(0.002)
            fill()

        session._link.wire.fill = slowly

        def work(start: int) -> None:
            try:
                wrong.extend(value for value in range(start, start + 60) if echo(value, timeout=20) != value)
            except errors.RpcError as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
    assert not wrong


def test_a_burst_behind_a_parked_request_does_not_hold_up_other_sessions(serve: Serve, registry: Registry) -> None:
    async def later() -> int:
        await asyncio.sleep(0.3)
        return 1

    registry.register("later", later)
    registry.register("quick", lambda: 1, run="loop")
    server = serve()
    with RawClient((server.host, server.port)) as client, rpcnb.connect(server.address) as session:
        client.start()
        quick = session.get_function("quick")
        small = packet(Syscall(Code.DEV_SET_DEVICE, (CPU,)))
        count = (1 << 19) // len(small)
        burst = packet(CallFunc(function_handle(client, "later"))) + small * count
        servant = next(iter(server._connections)).servant
        before = servant.ordinal

        def send() -> None:
            with contextlib.suppress(OSError):  # the test's end closes the socket
                client.send(burst)

        def receive() -> None:
            with contextlib.suppress(OSError):
                while client.sock.recv(1 << 16):
                    pass

        threads = [threading.Thread(target=one) for one in (send, receive)]
        for thread in threads:
            thread.start()
        eventually(lambda: servant.parked is not None)
        answered = 0
        while servant.ordinal < before + count:
            assert quick(timeout=20) == 1
            answered += servant.parked is None
        assert answered > 10, answered  # it was one or two, in the only pause: every turn of the loop lets others in
    for thread in threads:
        thread.join(10)


def test_a_no_token_beside_a_token_is_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from rpcnb.command.main import main

    file = tmp_path / "token"
    file.write_text("abc")
    assert main(["serve", "--port", "0", "--no-token", "--token-file", str(file)]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_a_device_has_tvms_attributes(serve: Callable[..., Any]) -> None:
    from rpcnb.client.operations import _ATTRIBUTES

    with rpcnb.connect(serve().address) as session:
        device = session.cpu()
        assert device.exist is True
        assert session.cuda(7).exist is False
        for name in _ATTRIBUTES:
            assert getattr(device, name, "missing") != "missing", name
