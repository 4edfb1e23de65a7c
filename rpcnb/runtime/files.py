"""A session's files: a private directory that is removed with the session, and names that cannot leave it.

Uploads appear under their name only when they are complete, and count against the session's quota.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import weakref
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.errors import AccessDenied, LimitExceeded, SessionClosed

if TYPE_CHECKING:
    from rpcnb.protocol.sequence import Buffer

__all__ = ["SessionFiles", "StoredFile", "Upload"]

_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_MAX_NAME = 255
# Files and folders of a session at most, and more where its quota is large: empty ones would fill the disk's table.
_ENTRIES, _BYTES_AN_ENTRY = 1024, 4096
_PINNED = ".lib-"  # how the names of loaded libraries begin
_HIDDEN = (_PINNED, ".upload-")
_LITTLE = 64  # files and folders, or MiB, that are removed in no time
_MOST_AT_ONCE = 16 << 20  # bytes of one part of a download
_MOST_OF_NAME = 50  # characters, of four bytes at most, that are kept of a library's name


def check_name(name: str) -> None:
    """Refuse a file name that could mean something outside its directory, on any system.

    Raises:
        AccessDenied: It could.
    """
    parts = name.split("/")
    bad = (
        not name
        or "\0" in name
        or "\\" in name
        or ":" in name
        or name.startswith("/")
        or len(name) > 4096
        or any(
            part in ("", "..")
            or len(part.encode("utf-8", "replace")) > _MAX_NAME
            or _RESERVED.fullmatch(part)
            or (part != "." and part[-1] in ". ")
            for part in parts
        )
    )
    if bad:
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise AccessDenied(f"file name {shown!r} is refused; expected a relative name inside the session's directory")


class StoredFile:
    """An uploaded file that has been received to disk and waits for its name."""

    __slots__ = ("nbytes", "path")

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes


class Upload:
    """A sink that writes a bulk upload to disk as it arrives."""

    def __init__(self, files: SessionFiles, nbytes: int) -> None:
        self._files = files
        self.nbytes = nbytes
        files.reserve(nbytes)
        self._finished = False
        try:
            descriptor, name = tempfile.mkstemp(dir=files.root, prefix=".upload-")
        except OSError as error:
            files.release(nbytes)
            raise LimitExceeded(f"cannot store the upload: {error.strerror}") from None
        self._path = Path(name)
        self._file = open(descriptor, "wb", buffering=0)  # noqa: SIM115  # closed by finish or abort

    def write(self, data: memoryview) -> None:
        """Append to the file."""
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.abort()
            raise LimitExceeded(f"cannot store the upload: {error.strerror}") from None

    def finish(self) -> Any:
        """Close the file; it gets its name when the upload function runs."""
        self._file.close()
        self._finished = True
        return StoredFile(self._path, self.nbytes)

    def abort(self) -> None:
        """Remove what was written."""
        self._file.close()
        if not self._finished:
            self._finished = True
            self._path.unlink(missing_ok=True)
            self._files.release(self.nbytes)


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the BLAKE2b digest of a file."""
    found = blake2b(digest_size=20)
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            found.update(data)
    return found.hexdigest()


def _remove_tree(path: str, owner: int) -> None:
    """Remove a directory; not in a forked child, whose end is not the session's."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _is_little(root: Path) -> bool:
    """Tell whether a directory is removed in no time."""
    entries = nbytes = 0
    folders = [str(root)]
    with contextlib.suppress(OSError):  # it is gone already, say
        while folders:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    entries += 1
                    nbytes += entry.stat(follow_symlinks=False).st_size
                    if entries > _LITTLE or nbytes > _LITTLE << 20:
                        return False
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    return True


class SessionFiles:
    """The work directory of one session; made on first use.

    Args:
        quota: Bytes that uploads may hold at once; files and folders are 1,024 at most, or one for 4 KiB of it.
        most_parts: Files that may arrive in parts at once.
        trusted_paths: Accept any path, as stock TVM does.
        directory: Where the work directory is made; the system's place for such by default.
    """

    def __init__(
        self,
        quota: int = 4 << 30,
        *,
        most_parts: int = 64,
        trusted_paths: bool = False,
        directory: str | None = None,
    ) -> None:
        self._directory = directory
        self._root: Path | None = None
        self._lock = threading.Lock()  # uploads may come on several connections
        self._quota = quota
        self._most_parts = most_parts
        self._entries: set[Path] = set()
        self._used = 0
        self._sizes: dict[Path, int] = {}
        self._trusted = trusted_paths
        self._uploads: list[Upload] = []
        self._parts: dict[str, tuple[Upload, int]] = {}  # files that arrive in parts, and how far they are
        self._closed = False

    @property
    def root(self) -> Path:
        """The directory; never the process's current one."""
        if self._closed:
            raise SessionClosed("the session is closed and its files are removed")
        with self._lock:
            if self._root is None:
                self._root = Path(tempfile.mkdtemp(prefix="rpcnb-", dir=self._directory))
                # A process that ends without closing its servers leaves no directory behind either.
                self._owner = os.getpid()
                self._remove = weakref.finalize(self, _remove_tree, str(self._root), self._owner)
            return self._root

    def keep_at(self, root: Path) -> None:
        """Have the directory at ``root``; it is not removed: somebody else does that."""
        root.mkdir(mode=0o700, exist_ok=True)
        self._root, self._owner = root, os.getpid()
        self._remove = weakref.finalize(self, _remove_tree, str(root), 0)  # nobody's: nothing is removed

    def path(self, name: str) -> Path:
        """Return where ``name`` is.

        Raises:
            AccessDenied: It would be outside the directory.
        """
        if self._trusted:
            return self.root / name
        if name not in ("", "."):
            check_name(name)
        path = self.root / name
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(os.path.realpath(self.root)):
            raise AccessDenied(f"file name {name!r} leads out of the session's directory")
        return path

    def reserve(self, nbytes: int) -> None:
        """Count ``nbytes`` against the quota.

        Raises:
            LimitExceeded: The quota is used up.
        """
        with self._lock:
            if self._used + nbytes > self._quota:
                raise LimitExceeded(
                    f"upload of {nbytes} bytes exceeds upload_quota={self._quota} ({self._used} bytes are in use)"
                )
            self._used += nbytes

    def release(self, nbytes: int) -> None:
        """Give back ``nbytes`` of the quota."""
        with self._lock:
            self._used -= nbytes

    def begin_upload(self, nbytes: int) -> Upload:
        """Return a sink for a bulk upload of ``nbytes`` bytes."""
        upload = Upload(self, nbytes)
        self._uploads = [*(one for one in self._uploads if not one._finished), upload]
        return upload

    def write(self, name: str, data: Buffer | StoredFile) -> None:
        """Make ``name`` hold ``data``: whole or not at all.

        Raises:
            AccessDenied: A name that is refused.
            LimitExceeded: No room.
        """
        stored = data if isinstance(data, StoredFile) else self._store(data)
        try:
            path = self.path(name)
            self._make_room(path)
            before = self._held_by(path)
            os.replace(stored.path, path)
        except BaseException:
            stored.path.unlink(missing_ok=True)
            self.release(stored.nbytes)
            raise
        self.release(before)
        self._sizes[path] = stored.nbytes

    def _held_by(self, path: Path) -> int:
        """Return the bytes that are free when a file's name goes: none while a pinned path has its content."""
        with contextlib.suppress(OSError):  # a function has removed it
            if path.stat().st_nlink != 1:
                return 0
        return self._sizes.get(path, 0)

    def _make_room(self, path: Path) -> None:
        """Make the folders of a file that is about to get its name; what is new is counted.

        Raises:
            LimitExceeded: There are too many files and folders.
        """
        with self._lock:
            missing = {one for one in (path, *path.parents) if one not in self._entries and not one.exists()}
            most = max(_ENTRIES, self._quota // _BYTES_AN_ENTRY)
            if len(self._entries) + len(missing) > most:
                raise LimitExceeded(
                    f"{len(self._entries)} files and folders are as many as upload_quota={self._quota} allows"
                )
            self._entries |= missing
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, total: int, offset: int, data: Buffer) -> None:
        """Write one part of a file that arrives in order; ``name`` appears with the last one.

        Raises:
            LimitExceeded: No room, or the parts do not fit together.
        """
        self.path(name)  # refused before anything is stored
        if offset == 0:
            self._drop_parts(name)
            if len(self._parts) >= self._most_parts:
                raise LimitExceeded(
                    f"{len(self._parts)} files are being uploaded, uploads={self._most_parts}; finish some"
                )
            self._parts[name] = (self.begin_upload(total), 0)
        upload, written = self._parts.get(name, (None, -1))
        if upload is None or written != offset or offset + len(data) > total or total != upload.nbytes:
            self._drop_parts(name)
            raise LimitExceeded(f"part of {len(data)} bytes at {offset} of {total} does not follow {max(written, 0)}")
        try:
            upload.write(memoryview(data))
        except LimitExceeded:
            del self._parts[name]
            raise
        if offset + len(data) < total:
            self._parts[name] = (upload, offset + len(data))
            return
        del self._parts[name]
        self.write(name, upload.finish())

    def _drop_parts(self, name: str) -> None:
        upload, _ = self._parts.pop(name, (None, 0))
        if upload is not None:
            upload.abort()

    def get(self, name: str, offset: int, nbytes: int) -> bytes:
        """Return a part of a file."""
        with open(self._existing(name), "rb") as file:
            left = os.fstat(file.fileno()).st_size - file.seek(offset)  # read() reserves what it is asked for
            return file.read(max(0, min(nbytes, left, _MOST_AT_ONCE)))

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self._existing(name).stat().st_size

    def digest(self, name: str, nbytes: int) -> str:
        """Return the BLAKE2b digest of a file if it has ``nbytes`` bytes; an empty text if not, or if there is none."""
        path = self.path(name)
        if not path.is_file() or path.stat().st_size != nbytes:
            return ""
        return file_digest(path)

    def _existing(self, name: str) -> Path:
        path = self.path(name)
        if not path.is_file():
            raise FileNotFoundError(f"Cannot open {path}: no such file in the session's directory")
        return path

    def _store(self, data: Buffer) -> StoredFile:
        upload = self.begin_upload(len(data))
        upload.write(memoryview(data))
        stored: StoredFile = upload.finish()
        return stored

    def read(self, name: str) -> bytes:
        """Return the content of ``name``."""
        return self._existing(name).read_bytes()

    def remove(self, name: str) -> None:
        """Delete ``name``; a file that is not there is no error, as in stock. The directory itself ("") stays."""
        if not name:
            return  # TVM's runners clean up with it; the directory goes with the session
        path = self.path(name)
        before = self._held_by(path)
        path.unlink(missing_ok=True)
        self._entries.discard(path)
        self._sizes.pop(path, None)
        self.release(before)

    def pin(self, path: Path) -> Path:
        """Return another path of what a file holds now, the same for the same content, in the file's own directory.

        A hard link where that is possible: it takes no room, and what is uploaded later gets another file. A file
        outside the session's directory is left alone.

        Raises:
            LimitExceeded: No room for a copy.
        """
        source = os.path.realpath(path)
        if not Path(source).is_relative_to(os.path.realpath(self.root)):
            return path
        held = path.with_name(f"{_PINNED}{secrets.token_hex(8)}")
        copied = 0
        try:
            os.link(source, held)
        except OSError:
            stored = self._store(path.read_bytes())
            copied = stored.nbytes
            os.replace(stored.path, held)
        pinned = path.with_name(f"{_PINNED}{file_digest(held)[:16]}-{path.name[-_MOST_OF_NAME:]}")
        if pinned.exists():
            held.unlink()
            self.release(copied)
        else:
            os.replace(held, pinned)
        return pinned

    def listdir(self, name: str) -> list[str]:
        """Return the names in a directory, sorted."""
        return sorted(entry.name for entry in self.path(name).iterdir() if not entry.name.startswith(_HIDDEN))

    def close(self) -> None:
        """Remove the directory and everything in it; much is removed in a thread, as who closes may be a loop."""
        self._closed = True
        for upload in self._uploads:
            upload.abort()
        root, self._root = self._root, None
        if root is None:
            return
        if _is_little(root):
            self._remove()
        else:
            self._remove.detach()
            threading.Thread(target=_remove_tree, args=(str(root), self._owner), name="rpcnb-remove").start()
