"""The work directory of a session, and names that must not leave it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from runtime_wire import Client

from rpcnb.errors import AccessDenied, LimitExceeded, SessionClosed
from rpcnb.protocol.codes import Limits
from rpcnb.protocol.messages import CallFunc, Raised, Return, Shutdown
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.files import SessionFiles, StoredFile, Upload, file_digest

REFUSED = [
    "../x",
    "/abs",
    "C:\\x",
    "C:x",
    "\\\\srv\\s",
    "x/../../y",
    "x/..",
    "a\0b",
    "x" * 300,
    "ü" * 128,
    "/".join(["d"] * 2049),
    "CON",
    "con.txt",
    "d/LPT1",
    "name.",
    "name ",
    "...",
    "d//e",
    "d/",
]
UPLOAD, DOWNLOAD = "tvm.rpc.server.upload", "tvm.rpc.server.download"


@pytest.fixture
def files() -> Iterator[SessionFiles]:
    files = SessionFiles(quota=1000)
    yield files
    files.close()


def left(files: SessionFiles) -> list[str]:
    return sorted(str(path.relative_to(files.root)) for path in files.root.rglob("*"))


@pytest.mark.parametrize("name", REFUSED)
def test_u1_a_name_that_could_leave_the_directory_is_refused(files: SessionFiles, name: str) -> None:
    acts: tuple[Any, ...] = (lambda: files.write(name, b"x"), lambda: files.read(name), lambda: files.remove(name))
    for act in (*acts, lambda: files.path(name), lambda: files.listdir(name)):
        with pytest.raises(AccessDenied, match="is refused; expected a relative name inside the session's directory"):
            act()
    assert left(files) == []
    assert files._used == 0


def test_u1_an_empty_name_cannot_be_written(files: SessionFiles) -> None:
    with pytest.raises(OSError, match="irectory"):
        files.write("", b"x")
    assert left(files) == []


def test_u1_a_symlink_out_of_the_directory_is_refused(files: SessionFiles, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (files.root / "out").symlink_to(tmp_path)
    (files.root / "file").symlink_to(tmp_path / "secret")
    for name in ("out/secret", "file", "out"):
        with pytest.raises(AccessDenied, match="leads out of the session's directory"):
            files.read(name)
    with pytest.raises(AccessDenied, match="leads out"):
        files.write("out/new", b"x")
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.parametrize("name", ["a", "d/e.bin", "./a", "a b", ".hidden", "console", "x" * 255, "ü"])
def test_ordinary_names_are_written_and_read(files: SessionFiles, name: str) -> None:
    files.write(name, b"data")
    assert files.read(name) == b"data"
    assert files.path(name).is_relative_to(files.root)


def test_u1_trusted_paths_reach_any_file_as_in_stock(tmp_path: Path) -> None:
    files = SessionFiles(trusted_paths=True)
    files.write(str(tmp_path / "abs"), b"1")
    files.write("../" * 20 + str(tmp_path / "up").lstrip("/"), b"2")
    assert ((tmp_path / "abs").read_bytes(), (tmp_path / "up").read_bytes()) == (b"1", b"2")
    files.close()


def test_a_missing_file_is_named(files: SessionFiles) -> None:
    with pytest.raises(FileNotFoundError, match=r"Cannot open .*nothere: no such file in the session's directory"):
        files.read("nothere")
    files.remove("nothere")


def test_listdir_names_files_sorted_without_unfinished_uploads(files: SessionFiles) -> None:
    files.write("b", b"")
    files.write("a", b"")
    files.begin_upload(3)
    assert files.listdir(".") == files.listdir("") == ["a", "b"]


def test_u4_the_quota_counts_what_is_held(files: SessionFiles) -> None:
    files.write("a", bytes(600))
    with pytest.raises(LimitExceeded, match=r"upload of 401 bytes exceeds upload_quota=1000 \(600 bytes are in use\)"):
        files.write("b", bytes(401))
    files.write("a", bytes(300))  # replaces: 600 + 300 at once, 300 after
    files.write("b", bytes(700))
    files.remove("a")
    files.write("c", bytes(300))
    assert sorted(files.listdir("")) == ["b", "c"]


class FullDisk:
    """A file on a disk that is full after ``room`` bytes."""

    def __init__(self, inner: Any, room: int) -> None:
        self._inner = inner
        self._room = room

    def write(self, data: memoryview) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count: int = self._inner.write(data[: self._room])
        self._room -= count
        return count

    def close(self) -> None:
        self._inner.close()


def test_u2_a_full_disk_leaves_nothing_under_the_final_name(
    files: SessionFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write("a", b"before")
    begin = SessionFiles.begin_upload

    def begin_full(self: SessionFiles, nbytes: int) -> Upload:
        upload = begin(self, nbytes)
        upload._file = FullDisk(upload._file, 3)  # type: ignore[assignment]  # stands in for a file
        return upload

    monkeypatch.setattr(SessionFiles, "begin_upload", begin_full)
    with pytest.raises(LimitExceeded, match="cannot store the upload: No space left on device"):
        files.write("a", b"longer than before")
    assert files.read("a") == b"before"
    assert left(files) == ["a"]
    assert files._used == 6


def test_u2_no_room_for_even_a_file_is_a_typed_error(files: SessionFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> Any:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    assert files.root
    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(LimitExceeded, match="cannot store the upload: Disk quota exceeded"):
        files.begin_upload(10)
    assert files._used == 0


def test_u2_a_name_that_may_not_be_written_leaves_no_partial_file(
    files: SessionFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", denied)
        with pytest.raises(PermissionError):
            files.write("a", b"data")
    files.write("file", b"")
    with pytest.raises(OSError, match="file"):
        files.write("file/below", b"data")
    assert left(files) == ["file"]
    assert files._used == 0


def test_an_upload_arrives_in_pieces_and_gets_its_name_at_the_end(files: SessionFiles) -> None:
    upload = files.begin_upload(6)
    upload.write(memoryview(b"abc"))
    assert files.listdir("") == []
    upload.write(memoryview(b"def"))
    stored = upload.finish()
    assert isinstance(stored, StoredFile)
    files.write("whole", stored)
    upload.abort()  # after its end: nothing
    assert files.read("whole") == b"abcdef"


def test_an_aborted_upload_leaves_nothing(files: SessionFiles) -> None:
    upload = files.begin_upload(6)
    upload.write(memoryview(b"abc"))
    upload.abort()
    upload.abort()
    assert left(files) == []
    assert files._used == 0


def test_close_removes_everything_and_unfinished_uploads() -> None:
    files = SessionFiles()
    root = files.root
    files.begin_upload(5)
    files.write("d/e", b"x")
    files.close()
    files.close()
    assert not root.exists()
    with pytest.raises(SessionClosed, match="the session is closed and its files are removed"):
        files.path("late")


def test_a_session_without_files_makes_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", None)
    SessionFiles().close()


# -- through the wire ------------------------------------------------------------------------------------------------


def test_a_large_upload_is_streamed_to_disk_and_downloaded() -> None:
    client = Client()
    data = os.urandom(300_000)
    upload = client.find(UPLOAD)
    whole = b"".join(bytes(part) for part in client.endpoint.send(CallFunc(upload, ("big", data))))
    client.feed(whole[:200_000])
    assert [path.stat().st_size > 0 for path in client.local.files.root.iterdir()] == [True]
    client.feed(whole[200_000:])
    assert client.reply() == Return((0, None))
    assert client.call(DOWNLOAD, "big")[1] == data
    client.send(Shutdown())


def test_an_upload_cut_by_the_end_of_the_session_leaves_nothing() -> None:
    client = Client()
    upload = client.find(UPLOAD)
    whole = b"".join(bytes(part) for part in client.endpoint.send(CallFunc(upload, ("big", bytes(300_000)))))
    client.feed(whole[:200_000])
    root = client.local.files.root
    client.servant.cancel()
    assert not root.exists()


def test_a_streamed_upload_beyond_the_quota_or_under_a_bad_name_is_skipped() -> None:
    client = Client(Environment(limits=Limits(upload_quota=200_000)))
    upload = client.find(UPLOAD)
    assert "upload_quota=200000" in client.error(CallFunc(upload, ("a", bytes(300_000)))).text
    assert "is refused" in client.error(CallFunc(upload, ("../a", bytes(150_000)))).text
    assert client.call(upload, "a", bytes(150_000)) == (0, None)
    assert client.local.files.listdir("") == ["a"]
    client.send(Shutdown())


def test_only_the_upload_function_gets_a_sink() -> None:
    client = Client()
    echo, upload = client.find("testing.echo"), client.find(UPLOAD)
    assert client.call(echo, bytes(100_000))[1] == bytes(100_000)
    assert isinstance(client.ask(CallFunc(upload, (bytes(100_000), "x"))), Raised)
    assert isinstance(client.ask(CallFunc(12345, ("x", bytes(100_000)))), Raised)
    assert client.local.sink_for(upload, (), 5) is None
    client.send(Shutdown())


# -- files in parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "nbytes", "part"), [(3, 1 << 40, b"3456789"), (0, -1, b""), (20, 5, b"")])
def test_a_part_of_a_file_is_at_most_what_is_there(offset: int, nbytes: int, part: bytes) -> None:
    files = SessionFiles(100)
    files.write("a", b"0123456789")
    tracemalloc.start()
    assert files.get("a", offset, nbytes) == part
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_in_parts_appears_with_its_last(tmp_path: Path) -> None:
    files = SessionFiles(100)
    files.put("a", 10, 0, b"01234")
    assert files.listdir("") == []
    files.put("a", 10, 5, b"56789")
    assert files.read("a") == b"0123456789"
    assert (files.size("a"), files.get("a", 3, 4)) == (10, b"3456")
    assert files.digest("a", 9) == ""
    assert files.digest("nothing", 9) == ""
    (tmp_path / "same").write_bytes(b"0123456789")
    assert files.digest("a", 10) == file_digest(tmp_path / "same")
    with pytest.raises(FileNotFoundError):
        files.size("nothing")
    files.close()


def test_parts_that_do_not_fit_are_refused_and_leave_nothing() -> None:
    files = SessionFiles(100)
    files.put("a", 10, 0, b"01234")
    for offset, data in ((3, b"x"), (5, b"x"), (0, b"too long by one")):
        with pytest.raises(LimitExceeded, match="does not follow"):
            files.put("a", 10, offset, data)
    files.put("b", 2, 0, b"x")
    with pytest.raises(LimitExceeded, match="does not follow"):
        files.put("b", 1 << 50, 1, bytes(1000))  # what was counted is what the first part said
    files.put("b", 50, 0, b"x")
    files.put("b", 60, 0, b"y")  # begun anew: the room of the first is free again
    with pytest.raises(LimitExceeded, match="upload_quota"):
        files.put("c", 90, 0, b"z")
    with pytest.raises(AccessDenied):
        files.put("../d", 1, 0, b"z")
    files.close()


def test_a_disk_that_is_full_ends_a_file_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = SessionFiles(100)
    files.put("a", 10, 0, b"01234")

    def full(self: object, data: memoryview) -> None:
        raise LimitExceeded("cannot store the upload: No space left on device")

    monkeypatch.setattr("rpcnb.runtime.files.Upload.write", full)
    with pytest.raises(LimitExceeded, match="No space"):
        files.put("a", 10, 5, b"56789")
    monkeypatch.undo()
    with pytest.raises(LimitExceeded, match="does not follow"):
        files.put("a", 10, 5, b"56789")
    files.close()


# -- paths for one content ---------------------------------------------------------------------------------------------


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_pinned_path_keeps_what_a_file_held_and_takes_its_room() -> None:
    files = SessionFiles(quota=1400)
    files.write("d/m.so", bytes(400))
    path = files.path("d/m.so")
    first = files.pin(path)
    assert (first.parent, inode(first)) == (path.parent, inode(path))
    assert re.fullmatch(r"\.lib-[0-9a-f]{16}-m\.so", first.name)
    files.write("d/m.so", b"x" * 400)
    second = files.pin(path)
    assert (first.read_bytes(), second.read_bytes()) == (bytes(400), b"x" * 400)
    files.write("d/m.so", bytes(400))  # the first content again
    assert files.pin(path) == first
    assert files.listdir("d") == ["m.so"]
    files.remove("d/m.so")
    with pytest.raises(LimitExceeded, match=r"\(800 bytes are in use\)"):
        files.write("rest", bytes(601))
    files.write("rest", bytes(600))
    assert left(files) == ["d", *sorted(f"d/{one.name}" for one in (first, second)), "rest"]
    files.close()


def test_where_links_cannot_be_made_a_pinned_path_is_a_copy_that_counts(
    files: SessionFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    files.write("m.so", bytes(400))
    pinned = files.pin(files.path("m.so"))
    assert pinned.read_bytes() == bytes(400)
    assert inode(pinned) != inode(files.path("m.so"))
    with pytest.raises(LimitExceeded, match=r"upload of 400 bytes exceeds upload_quota=1000 \(800 bytes are in use\)"):
        files.pin(files.path("m.so"))
    files._quota = 1200
    assert files.pin(files.path("m.so")) == pinned
    with pytest.raises(LimitExceeded, match=r"\(800 bytes are in use\)"):
        files.reserve(401)


def test_a_long_name_is_shortened_and_a_file_elsewhere_keeps_its_path(tmp_path: Path) -> None:
    files = SessionFiles(1000, trusted_paths=True)
    name = "ü" * 120 + ".so"
    files.write(name, b"x")
    assert files.pin(files.path(name)).name.endswith("ü" * 47 + ".so")
    other = tmp_path / "m.so"
    other.write_bytes(b"x")
    assert files.pin(files.path(str(other))) == other
    (files.root / "link.so").symlink_to(other)
    assert files.pin(files.path("link.so")) == files.root / "link.so"
    assert list(tmp_path.iterdir()) == [other]
    files.close()


def test_files_and_folders_are_counted_however_small_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpcnb.runtime.files._ENTRIES", 3)
    files = SessionFiles(quota=100)
    files.write("a/b/c", b"")
    with pytest.raises(LimitExceeded, match=r"3 files and folders are as many as upload_quota=100 allows"):
        files.write("d", b"")
    files.write("a/b/c", b"again")
    files.remove("a/b/c")
    files.write("a/b/d", b"")
    files.close()


def test_files_that_are_begun_and_not_finished_are_counted() -> None:
    files = SessionFiles(quota=100, most_parts=2)
    files.put("a", 2, 0, b"x")
    files.put("b", 2, 0, b"x")
    with pytest.raises(LimitExceeded, match=r"2 files are being uploaded, uploads=2; finish some"):
        files.put("c", 2, 0, b"x")
    files.put("a", 2, 1, b"x")
    files.put("c", 2, 0, b"x")
    files.close()


def test_a_forked_child_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    files = SessionFiles(quota=100)
    files.write("a", b"x")
    root = files.root
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        files.close()
    assert (root / "a").exists()
    shutil.rmtree(root)


@pytest.mark.parametrize("kind", ["many files", "a deep one", "a large one"])
def test_much_is_removed_in_a_thread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpcnb.runtime.files._LITTLE", 3)
    removing = threading.Event()
    removers: list[threading.Thread] = []

    def remove(path: str, **_: Any) -> None:
        if path == str(root):  # else one that another test has left
            removers.append(threading.current_thread())
            assert removing.wait(60)
        real(path, ignore_errors=True)

    files = SessionFiles()
    real, root = shutil.rmtree, files.root
    monkeypatch.setattr(shutil, "rmtree", remove)
    for name in {"many files": "abcd", "a deep one": ["a/b/c/d"], "a large one": ["a"]}[kind]:
        files.write(name, bytes(4 << 20) if kind == "a large one" else b"")
    files.close()  # does not wait
    removing.set()
    eventually(lambda: not root.exists(), "the end of the directory")
    (remover,) = removers
    assert remover is not threading.main_thread()
    remover.join()


def test_a_directory_that_is_gone_already_is_removed(files: SessionFiles) -> None:
    files.write("a", b"")
    shutil.rmtree(files.root)
    files.close()
