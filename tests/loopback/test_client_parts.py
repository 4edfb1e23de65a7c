"""Files in parts: large uploads and downloads stream from and to disk, can be cancelled, and are not sent twice."""

from __future__ import annotations

import asyncio
import functools
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.protocol.codes import Limits
from rpcnb.transport.shaper import Shaper

Serve = Callable[..., Any]
SIZE = (9 << 20) + 7


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = np.random.default_rng(3).bytes(SIZE)
    (tmp_path / "big.bin").write_bytes(data)
    return data


@pytest.fixture
def session(serve: Serve) -> Iterator[rpcnb.Session]:
    with rpcnb.connect(serve().address) as opened:
        yield opened


def test_u3_large_files_go_there_and_back(session: rpcnb.Session, tmp_path: Path, content: bytes) -> None:
    session.upload(tmp_path / "big.bin")
    assert session.listdir() == ["big.bin"]
    assert session.download("big.bin") == content
    assert session.download("big.bin", tmp_path / "back.bin") == b""
    assert (tmp_path / "back.bin").read_bytes() == content
    session.upload(b"small", "small")
    session.download("small", tmp_path / "small")
    assert (tmp_path / "small").read_bytes() == b"small"
    session.upload(b"", "none")
    session.download("none", tmp_path / "none")
    assert (tmp_path / "none").read_bytes() == b""


def test_u3_an_unchanged_file_is_not_sent_again(session: rpcnb.Session, tmp_path: Path, content: bytes) -> None:
    session.upload(tmp_path / "big.bin")

    def sent() -> int:
        links = [session._link, *(session._lanes.links() if session._lanes is not None else [])]
        return sum(link.wire.bytes_sent for link in links)

    before = sent()
    session.upload(tmp_path / "big.bin")
    assert sent() - before < SIZE // 100
    (tmp_path / "big.bin").write_bytes(content[:-1] + b"x")
    session.upload(tmp_path / "big.bin")
    assert bytes(session.download("big.bin")[-1:]) == b"x"


def test_u3_memory_does_not_grow_with_the_file(session: rpcnb.Session, tmp_path: Path) -> None:
    path = tmp_path / "huge.bin"
    with open(path, "wb") as file:
        for _ in range(256):
            file.write(os.urandom(1 << 20))
    session.upload(b"warm", "warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    session.upload(path)
    session.download("huge.bin", tmp_path / "again.bin")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 64 << 20  # both ends are in this process
    assert (tmp_path / "again.bin").stat().st_size == 256 << 20


def test_stock_servers_get_and_give_files_in_one_packet(serve: Serve, tmp_path: Path, content: bytes) -> None:
    with rpcnb.connect(serve().address, extensions=False) as session:
        session.upload(tmp_path / "big.bin", "x")
        assert session.download("x") == content
        session.download("x", tmp_path / "back.bin")
        assert (tmp_path / "back.bin").read_bytes() == content


class FullDisk:
    """A file on a disk that is full after the first piece."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, data: Any) -> int:
        if self.written:
            raise OSError(28, "No space left on device")
        self.written += len(data)
        return len(data)


@pytest.mark.parametrize("twin", ["rpcnb", "stock"])
def test_u2_a_full_disk_here_is_an_error_and_the_session_goes_on(
    serve: Serve, tmp_path: Path, content: bytes, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    with rpcnb.connect(serve().address, extensions=twin == "rpcnb") as session:
        session.upload(tmp_path / "big.bin", "x")
        real = open

        def full(name: Any, *args: Any, **options: Any) -> Any:
            return nullcontext(FullDisk()) if str(name).endswith(".part") else real(name, *args, **options)

        monkeypatch.setattr("builtins.open", full)
        with pytest.raises(OSError, match="No space left"):
            session.download("x", tmp_path / "back.bin")
        monkeypatch.undo()
        assert not (tmp_path / "back.bin").exists()
        session.download("x", tmp_path / "back.bin")
        assert (tmp_path / "back.bin").read_bytes() == content


def test_a_streamed_download_in_one_packet_can_be_given_up(serve: Serve, tmp_path: Path, content: bytes) -> None:
    server = serve()
    loop = server.io_loop.asyncio_loop
    shaper = Shaper(("127.0.0.1", server.port), 20e6, 0.001)
    asyncio.run_coroutine_threadsafe(shaper.start("127.0.0.1", 0), loop).result(10)
    with rpcnb.connect("127.0.0.1", shaper.port, extensions=False) as session:
        session.upload(tmp_path / "big.bin", "x")
        transfer: Any = session.submit(session.download, "x", tmp_path / "down")
        eventually(functools.partial(has_moved, transfer), "bytes", 20)
        assert transfer.total == SIZE
        assert transfer.cancel()
        with pytest.raises(CancelledError):
            transfer.result(timeout=10)
        assert session.listdir() == ["x"], "the rest was received and dropped"
    assert sorted(os.listdir(tmp_path)) == ["big.bin"]
    loop.call_soon_threadsafe(shaper.close)


def test_refusals_leave_nothing(serve: Serve, tmp_path: Path, content: bytes) -> None:
    with rpcnb.connect(serve(limits=Limits(upload_quota=1 << 20)).address) as session:
        with pytest.raises(errors.RemoteError, match="upload_quota"):
            session.upload(tmp_path / "big.bin")
        with pytest.raises(errors.RemoteError, match="file name"):
            session.upload(tmp_path / "big.bin", "../big.bin")
        with pytest.raises(errors.RemoteError, match="no such file"):
            session.download("nothing", tmp_path / "nothing")
        assert session.listdir() == []
        assert sorted(os.listdir(tmp_path)) == ["big.bin"]
        session.upload(b"later", "later")


def test_a_file_that_shrinks_meanwhile_is_an_error(
    session: rpcnb.Session, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    class Grown:
        st_size = SIZE + 1

    monkeypatch.setattr(os, "fstat", lambda descriptor: Grown() if descriptor > 2 else real(descriptor))
    with pytest.raises(errors.CopyMismatch, match="has shrunk"):
        session.upload(tmp_path / "big.bin")
    monkeypatch.undo()
    assert session.listdir() == []


def has_moved(transfer: Any) -> bool:
    """Tell whether bytes have moved."""
    return bool(transfer.moved)


def test_a_cancelled_upload_leaves_nothing_under_its_name(serve: Serve, tmp_path: Path, content: bytes) -> None:
    server = serve()
    loop = server.io_loop.asyncio_loop
    shaper = Shaper(("127.0.0.1", server.port), 5e6, 0.001)
    asyncio.run_coroutine_threadsafe(shaper.start("127.0.0.1", 0), loop).result(10)
    with rpcnb.connect("127.0.0.1", shaper.port) as session:
        for operation, args in (
            (session.upload, (tmp_path / "big.bin", "up")),
            (session.download, ("there", tmp_path / "down")),
        ):
            if operation == session.download:
                session.upload(tmp_path / "big.bin", "there")
            transfer: Any = session.submit(operation, *args)
            eventually(functools.partial(has_moved, transfer), "bytes", 20)
            assert transfer.cancel()
            with pytest.raises(CancelledError):
                transfer.result(timeout=10)
        assert "up" not in session.listdir()
        assert sorted(os.listdir(tmp_path)) == ["big.bin"]
        session.upload(tmp_path / "big.bin", "up")
        assert session.download("up") == content
    loop.call_soon_threadsafe(shaper.close)


def test_awaited_sessions_stream_too(serve: Serve, tmp_path: Path, content: bytes) -> None:
    server = serve()

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            await session.upload(tmp_path / "big.bin")
            await session.download("big.bin", tmp_path / "back.bin")
            assert (tmp_path / "back.bin").read_bytes() == content

    asyncio.run(main())
