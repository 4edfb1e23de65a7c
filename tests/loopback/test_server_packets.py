"""Packets over sockets that are huge, pipelined, broken or for the wrong thing."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from conftest import eventually
from rawpeer import RawClient, packet

import rpcnb
from rpcnb.protocol.codes import Code, Limits, TypeIndex
from rpcnb.protocol.messages import CallFunc, CopyFromRemote, CopyToRemote, Message, Shutdown, Syscall
from rpcnb.runtime.registry import Registry
from rpcnb.values import CPU, DType, Pointer, TensorMeta

Serve = Callable[..., Any]
BYTE = DType(1, 8)


def function_handle(client: RawClient, name: str) -> int:
    client.send(packet(Syscall(Code.GET_GLOBAL_FUNC, (name,))))
    reply = client.packet()
    assert struct.unpack("<iii", reply[:12]) == (Code.RETURN, 1, TypeIndex.OPAQUE), reply
    handle: int = struct.unpack("<Q", reply[12:])[0]
    return handle


def int_result(reply: bytes) -> int:
    code, count, _, kind, _, value = struct.unpack("<iiiqiq", reply)
    assert (code, count, kind) == (Code.RETURN, 2, TypeIndex.INT), reply
    return int(value)


LENGTHS = [3, Limits().call + 1, 2**31, 2**63 - 1, 2**64 - 1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("code", [Code.CALL_FUNC, Code.GET_GLOBAL_FUNC, Code.COPY_TO_REMOTE, Code.RETURN, 99])
def test_f4_packets_of_impossible_lengths_end_their_connection_only(
    serve: Serve, caplog: pytest.LogCaptureFixture, length: int, code: int
) -> None:
    server = serve()
    with rpcnb.connect(server.address) as other:
        other.call("rpc.test.addone", 1)
        before = psutil.Process().memory_info().rss
        with RawClient((server.host, server.port)) as client:
            client.start()
            client.send(struct.pack("<Q", length) + struct.pack("<i", code) + bytes(60))
            client.sock.settimeout(0.3)
            client.is_closed()  # or answered and skipping
            assert psutil.Process().memory_info().rss - before < 32 << 20
        assert other.call("rpc.test.addone", 2) == 3
    eventually(lambda: server.sessions == 0, "no session left")
    caplog.clear()  # one line at most for the broken connection


def test_f4_a_packet_of_no_bytes_is_ignored(serve: Serve) -> None:
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        client.send(bytes(8) * 3)
        assert function_handle(client, "rpc.test.addone")


def test_f4_many_pieces_of_a_huge_bytes_argument_are_bounded_by_what_arrives(serve: Serve) -> None:
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        handle = function_handle(client, "testing.echo")
        before = psutil.Process().memory_info().rss
        total = 1 << 30
        body = struct.pack("<iQi", Code.CALL_FUNC, handle, 1) + struct.pack("<iIQ", 66, 66, total)
        client.send(struct.pack("<Q", len(body) + total) + body + bytes(1 << 20))
        time.sleep(0.1)  # lets the server read; nothing is judged by it but that little was allocated
        assert psutil.Process().memory_info().rss - before < 64 << 20
    eventually(lambda: server.sessions == 0, "no session left")


def test_f5_an_argument_count_beyond_the_limit_is_answered(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        handle = function_handle(client, "testing.echo")
        body = struct.pack("<iQi", Code.CALL_FUNC, handle, 2**31 - 1)
        client.send(struct.pack("<Q", len(body)) + body)
        reply = client.packet()
        assert struct.unpack("<i", reply[:4]) == (Code.EXCEPTION,)
        assert b"args=" in reply or b"argument" in reply, reply
        assert function_handle(client, "testing.echo") == handle
    caplog.clear()


def test_pipelined_requests_are_answered_in_order(serve: Serve, registry: Registry) -> None:
    registry.register("plain", lambda x: x)
    registry.register("loop", lambda x: x, run="loop")

    async def later(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    registry.register("later", later)
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        handles = [function_handle(client, name) for name in ("plain", "later", "loop")]
        client.send(b"".join(packet(CallFunc(handles[index % 3], (index,))) for index in range(300)))
        assert [int_result(client.packet()) for _ in range(300)] == list(range(300))


@pytest.mark.parametrize("kind", ["coroutine", "callback"])
def test_requests_behind_a_parked_one_wait_and_are_then_answered(serve: Serve, registry: Registry, kind: str) -> None:
    release = threading.Event()
    parked = threading.Event()

    async def wait(x: int) -> int:
        parked.set()
        while not release.is_set():  # noqa: ASYNC110  # set by a thread
            await asyncio.sleep(0.001)
        return x

    def call_back(done: Any, x: int) -> None:
        parked.set()
        threading.Thread(target=lambda: (release.wait(10), done(x))).start()

    if kind == "coroutine":
        registry.register("wait", wait)
    else:
        registry.register("wait", call_back, callback=True)
    registry.register("plain", lambda x: x)
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        parking, plain = function_handle(client, "wait"), function_handle(client, "plain")
        client.send(packet(CallFunc(parking, (1,))) + b"".join(packet(CallFunc(plain, (n,))) for n in range(50)))
        assert parked.wait(10)
        client.send(packet(CallFunc(parking, (51,))) + packet(CallFunc(plain, (52,))))
        client.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.receive(1)
        client.sock.settimeout(10)
        release.set()
        got = [int_result(client.packet()) for _ in range(53)]
    assert got == [1, *range(50), 51, 52]


def test_requests_for_more_than_the_buffer_behind_a_parked_one_do_not_stall(serve: Serve, registry: Registry) -> None:
    release = threading.Event()

    async def wait() -> int:
        while not release.is_set():  # noqa: ASYNC110  # set by a thread
            await asyncio.sleep(0.001)
        return 7

    registry.register("wait", wait)
    registry.register("length", lambda data: len(data))
    server = serve(limits=Limits(input_buffered=1 << 16))
    with RawClient((server.host, server.port)) as client:
        client.start()
        parking, length = function_handle(client, "wait"), function_handle(client, "length")
        calls = [packet(CallFunc(length, (bytes(20000 + n),))) for n in range(300)]
        sender = threading.Thread(target=client.send, args=(packet(CallFunc(parking)) + b"".join(calls),))
        sender.start()
        release.set()
        assert int_result(client.packet()) == 7
        assert [int_result(client.packet()) for _ in calls] == [20000 + n for n in range(300)]
        sender.join(10)


def test_replies_that_nobody_reads_do_not_fill_the_memory(serve: Serve, registry: Registry) -> None:
    blob = bytes(1 << 20)
    made = []

    def make() -> bytes:
        made.append(1)
        return blob

    registry.register("blob", make)
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        handle = function_handle(client, "blob")
        client.send(packet(CallFunc(handle)) * 200)
        eventually(lambda: len(made) >= 4, "some replies")
        count = -1
        while count != len(made):  # until it stops making more
            count = len(made)
            time.sleep(0.1)
        assert count < 60
        for _ in range(200):
            assert len(client.packet()) > len(blob)
    assert len(made) == 200


def test_copies_that_lie_about_their_size_are_answered(serve: Serve) -> None:
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        client.send(packet(Syscall(Code.DEV_ALLOC_DATA, (CPU, 64, 64, BYTE))))
        reply = client.packet()
        data = struct.unpack("<Q", reply[12:])[0]
        bad: list[Message] = [
            CopyFromRemote(TensorMeta(data, CPU, (64,), BYTE), 65),
            CopyFromRemote(TensorMeta(data, CPU, (1 << 60,), BYTE), 1 << 60),
            CopyFromRemote(TensorMeta(data, CPU, (64,), BYTE, 1), 64),
            CopyFromRemote(TensorMeta(data, CPU, (64,), BYTE, (1 << 64) - 1), 64),
            CopyFromRemote(TensorMeta(data + 1, CPU, (64,), BYTE), 64),
            CopyToRemote(TensorMeta(data, CPU, (65,), BYTE), 65, bytes(65)),
            CopyToRemote(TensorMeta(data, CPU, (64,), BYTE, 8), 64, bytes(64)),
            CopyToRemote(TensorMeta(0, CPU, (64,), BYTE), 64, bytes(64)),
        ]
        for message in bad:
            client.send(packet(message))
            assert struct.unpack("<i", client.packet()[:4]) == (Code.EXCEPTION,), message
        client.send(packet(CopyToRemote(TensorMeta(data, CPU, (64,), BYTE), 64, bytes(range(64)))))
        assert struct.unpack("<i", client.packet()[:4]) == (Code.RETURN,)
        client.send(packet(CopyFromRemote(TensorMeta(data, CPU, (64,), BYTE), 64)))
        assert client.packet()[4:] == bytes(range(64))


def test_s11_invented_handles_end_the_session_at_their_limit(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(limits=Limits(bad_handles=20))
    with RawClient((server.host, server.port)) as client:
        client.start()
        answered = 0
        try:
            for number in range(40):
                client.send(packet(CallFunc(0x1234567 + number)))
                assert struct.unpack("<i", client.packet()[:4]) == (Code.EXCEPTION,)
                answered += 1
        except (EOFError, ConnectionError):
            pass
        assert answered in (19, 20)
    eventually(lambda: server.sessions == 0, "no session left")
    assert any("never issued" in record.getMessage() for record in caplog.records)
    caplog.clear()


def test_s11_stale_handles_do_not_count(serve: Serve) -> None:
    server = serve(limits=Limits(bad_handles=5))
    with RawClient((server.host, server.port)) as client:
        client.start()
        handle = function_handle(client, "testing.echo")
        client.send(packet(Syscall(Code.FREE_HANDLE, (Pointer(handle),))))
        client.packet()
        for _ in range(30):
            client.send(packet(CallFunc(handle)))
            assert b"was freed before" in client.packet()


def test_a_shutdown_ends_the_session_and_what_follows_is_ignored(serve: Serve) -> None:
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        client.send(packet(Shutdown()) + packet(Syscall(Code.GET_GLOBAL_FUNC, ("x",))))
        assert client.is_closed()
    eventually(lambda: server.sessions == 0, "no session left")
