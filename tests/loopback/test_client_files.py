"""Files through a session: names stay inside, uploads are whole or not at all, the quota holds."""

from __future__ import annotations

import asyncio
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from rawpeer import RawClient, packet

import rpcnb
from rpcnb import errors
from rpcnb.protocol.codes import Code, Limits
from rpcnb.protocol.messages import Syscall
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]

REFUSED = [
    "../x",
    "/abs",
    "C:\\x",
    "\\\\srv\\s",
    "x/../../y",
    "a\0b",
    "n" * 300,
    "CON",
    "con.txt",
    "trailing.",
    "trailing ",
    "a//b",
    "",
    "..",
    "/etc/passwd",
    "~/../../etc/passwd",
]


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the servers' sessions make their directories."""
    base = tmp_path / "sessions"
    base.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    return base


@pytest.mark.parametrize("name", REFUSED)
def test_u1_names_that_could_leave_the_directory_are_refused(serve: Serve, folders: Path, name: str) -> None:
    server = serve()
    with rpcnb.connect(server.address) as session:
        session.upload(b"inside", "inside")
        if name:
            for size in (3, 1 << 17):  # in memory, and streamed to disk
                with pytest.raises(errors.RemoteError) as caught:
                    session.upload(bytes(size), name)
                assert caught.value.remote_type == "AccessDenied"
        with pytest.raises(errors.RemoteError):
            session.download(name)
        if name:
            with pytest.raises(errors.RemoteError):
                session.remove(name)
        else:
            session.remove(name)  # TVM's runners clean up so; the directory stays
        assert session.listdir() == ["inside"]
        assert session.download("inside") == b"inside"
    eventually(lambda: not os.listdir(folders), "the removal of the directory")


def test_u1_a_link_that_leads_out_is_not_followed(serve: Serve, registry: Registry, folders: Path) -> None:
    secret = folders.parent / "secret"
    secret.write_text("secret")

    def link() -> None:
        os.symlink(secret, rpcnb.workpath("link"))
        os.symlink(folders.parent, rpcnb.workpath("up"))

    registry.register("link", link)
    with rpcnb.connect(serve().address) as session:
        session.fn.link()
        for name in ("link", "up/secret"):
            with pytest.raises(errors.RemoteError, match="leads out"):
                session.download(name)
            with pytest.raises(errors.RemoteError, match="leads out"):
                session.upload(b"x", name)
        with pytest.raises(errors.RemoteError, match="leads out"):
            session.listdir("up")
    assert secret.read_text() == "secret"


def test_u1_trusted_paths_behave_as_stock(serve: Serve, tmp_path: Path) -> None:
    with rpcnb.connect(serve(trusted_paths=True).address) as session:
        session.upload(b"out", str(tmp_path / "x"))
        assert session.download(str(tmp_path / "x")) == b"out"
    assert (tmp_path / "x").read_bytes() == b"out"


def test_u1_files_come_back_as_they_went_in_both_sessions(serve: Serve, tmp_path: Path, folders: Path) -> None:
    server = serve()
    contents = [b"", b"x", os.urandom(65535), os.urandom(65537), os.urandom(3 << 20)]
    with rpcnb.connect(server.address) as session:
        for index, content in enumerate(contents):
            session.upload(content, f"sub/{index}.bin")
            assert session.download(f"sub/{index}.bin") == content
        path = tmp_path / "local.txt"
        path.write_bytes(b"by path")
        session.upload(path)
        assert session.download("local.txt") == b"by path"
        assert session.listdir("sub") == [f"{index}.bin" for index in range(len(contents))]
        session.remove("local.txt")
        session.remove("local.txt")
        assert session.listdir() == ["sub"]

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            for content in contents:
                await session.upload(content, "same")
                assert await session.download("same") == content
            assert await session.listdir() == ["same"]
            await session.remove("same")
            with pytest.raises(errors.RemoteError):
                await session.download("same")

    asyncio.run(main())
    eventually(lambda: not os.listdir(folders), "the removal of the directories")


def test_u1_sessions_do_not_see_each_others_files(serve: Serve) -> None:
    server = serve()
    with rpcnb.connect(server.address) as one, rpcnb.connect(server.address) as other:
        one.upload(b"mine", "file")
        assert other.listdir() == []
        with pytest.raises(errors.RemoteError):
            other.download("file")


def test_u2_an_upload_cut_half_way_leaves_nothing(serve: Serve, folders: Path) -> None:
    server = serve()
    with RawClient((server.host, server.port)) as client:
        client.start()
        client.send(packet(Syscall(Code.GET_GLOBAL_FUNC, ("tvm.rpc.server.upload",))))
        handle = struct.unpack("<Q", client.packet()[12:])[0]
        total = 4 << 20
        name = b"half.bin"
        body = (
            struct.pack("<iQi", Code.CALL_FUNC, handle, 2)
            + struct.pack("<iQ", 8, len(name))
            + name
            + struct.pack("<iIQ", 66, 66, total)
        )
        client.send(struct.pack("<Q", len(body) + total) + body + bytes(1 << 20))
        eventually(lambda: any(files for _, _, files in os.walk(folders)), "the upload's beginning")
        assert not list(folders.rglob("half.bin"))
    eventually(lambda: not os.listdir(folders), "the removal of the directory")
    eventually(lambda: server.sessions == 0, "no session left")


def test_u2_a_directory_in_the_way_is_a_typed_error(serve: Serve, folders: Path) -> None:
    with rpcnb.connect(serve().address) as session:
        session.upload(b"x", "folder/file")
        with pytest.raises(errors.RemoteError):
            session.upload(b"y", "folder")
        with pytest.raises(errors.RemoteError):
            session.upload(bytes(1 << 17), "folder/file/below")
        assert session.listdir() == ["folder"]
        assert session.download("folder/file") == b"x"
        assert len([path for path in folders.rglob("*") if path.is_file()]) == 1


def test_u4_the_quota_holds_and_is_given_back(serve: Serve, folders: Path) -> None:
    quota = 1 << 20
    with rpcnb.connect(serve(limits=Limits(upload_quota=quota)).address) as session:
        for _ in range(3):
            session.upload(bytes(700_000), "a")  # replaced: first the new one needs room
            with pytest.raises(errors.RemoteError, match=f"upload_quota={quota}"):
                session.upload(bytes(400_000), "b")
            assert session.listdir() == ["a"]
            session.remove("a")
        with pytest.raises(errors.RemoteError, match="upload_quota"):
            session.upload(bytes(quota + 1), "big")
        session.upload(bytes(quota), "exact")
        session.upload(b"", "none")
        assert session.listdir() == ["exact", "none"]


def test_u4_refused_names_do_not_use_up_the_quota(serve: Serve) -> None:
    with rpcnb.connect(serve(limits=Limits(upload_quota=1 << 20)).address) as session:
        for _ in range(5):
            with pytest.raises(errors.RemoteError):
                session.upload(bytes(600_000), "../x")
        session.upload(bytes(1 << 20), "x")


@pytest.mark.parametrize(
    "name", ["a;touch owned", "$(touch owned)", "`touch owned`", "a\ntouch owned", "-rf", "& owned"]
)
def test_s9_names_with_shell_words_are_just_names(serve: Serve, folders: Path, name: str) -> None:
    with rpcnb.connect(serve(allow_native=True).address) as session:
        session.upload(b"not an object", name + ".o")
        assert session.listdir() == [name + ".o"]
        for operation in (session.download_linked_module, session.load_module):
            with pytest.raises(errors.RemoteError):
                operation(name + ".o")
        assert not list(folders.rglob("owned*"))
    assert not os.path.exists("owned")
