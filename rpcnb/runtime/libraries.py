"""Compiled libraries, through the small ``apache-tvm-ffi`` alone; stock TVM is not needed on the server.

A library compiled by TVM calls back for workspaces and parallel loops through data slots named ``__TVMBackend...``.
They are null unless someone has registered the symbols, and calling through null ends the process: so callbacks are
registered before a library is loaded, and every slot is looked at afterwards (design.md 4; all tried).
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.errors import LibraryError
from rpcnb.runtime.completion import call_cancelled
from rpcnb.runtime.current import cancelled
from rpcnb.runtime.libraryfile import check_library, check_object
from rpcnb.runtime.served import Module
from rpcnb.values import Device, DType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["ffi_global_names", "find_ffi_global", "link_library", "load_libraries", "load_library"]

_SLOT = re.compile(rb"\0(__TVM[A-Za-z0-9_]+)(?=\0)")
_LIBRARY_SUFFIXES = (".so", ".dylib", ".dll")
_LOOK = 0.1  # seconds between two looks whether somebody still waits for a compiler

# TVMBackend* of TVM's c_backend_api.h.
_LAMBDA = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
_FREE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_BARRIER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


class _ParallelEnv(ctypes.Structure):
    """TVMParallelGroupEnv."""

    _fields_ = (("sync_handle", ctypes.c_void_p), ("num_task", ctypes.c_int32))


def _ffi() -> Any:
    try:
        import tvm_ffi
    except ImportError:
        raise LibraryError("loading compiled libraries needs apache-tvm-ffi: pip install 'rpcnb[tvm]'") from None
    return tvm_ffi


class _Backend:
    """The callbacks of compiled code, kept alive for the life of the process."""

    def __init__(self) -> None:
        self._workspaces: dict[int, Any] = {}
        self._lock = threading.Lock()
        workers = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="rpcnb-parallel")
        self._local = threading.local()
        self._barriers: dict[int, threading.Barrier] = {}
        self.callbacks = {
            b"TVMBackendAllocWorkspace": _ALLOC(self._allocate),
            b"TVMBackendFreeWorkspace": _FREE(self._free),
            b"TVMBackendParallelLaunch": _LAUNCH(self._launch),
            b"TVMBackendParallelBarrier": _BARRIER(self._barrier),
        }

    def _allocate(self, device_type: int, device_id: int, nbytes: int, code: int, bits: int) -> int | None:
        try:
            block = ctypes.create_string_buffer(nbytes + 64)
        except (MemoryError, OverflowError):
            return None
        address = ctypes.addressof(block)
        address += -address % 64
        with self._lock:
            self._workspaces[address] = block
        return address

    def _free(self, device_type: int, device_id: int, pointer: int | None) -> int:
        with self._lock:
            self._workspaces.pop(pointer or 0, None)
        return 0

    def _launch(self, function: int, closure: int | None, tasks: int) -> int:
        """Run ``tasks`` parallel tasks (0: one per CPU); nested launches run one after the other."""
        count = tasks or self._workers
        run = _LAMBDA(function)
        environment = _ParallelEnv(None, count)
        address = ctypes.addressof(environment)

        def task(index: int) -> int:
            self._local.inside = True
            try:
                return int(run(index, address, closure))
            finally:
                self._local.inside = False

        if count == 1 or getattr(self._local, "inside", False) or count > self._workers:
            # More tasks than threads would wait for each other at a barrier; TVM asks for at most the default.
            return max((abs(run(index, address, closure)) for index in range(count)), default=0)
        self._barriers[address] = threading.Barrier(count)
        try:
            futures = [self._pool.submit(task, index) for index in range(1, count)]
            results = [task(0), *(future.result() for future in futures)]
        finally:
            del self._barriers[address]
        return -1 if any(results) else 0

    def _barrier(self, task: int, environment: int) -> int:
        barrier = self._barriers.get(environment)
        if barrier is not None:
            barrier.wait()
        return 0


@cache
def _install_backend() -> _Backend | None:
    """Register the callbacks unless TVM's own runtime is in this process."""
    if "tvm" in sys.modules:
        return None
    backend = _Backend()
    library = ctypes.CDLL(_ffi().libinfo.find_libtvm_ffi())
    register = library.TVMFFIEnvModRegisterContextSymbol
    register.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    for name, callback in backend.callbacks.items():
        for symbol in (name, b"__" + name):
            if register(symbol, ctypes.cast(callback, ctypes.c_void_p)) != 0:
                raise LibraryError(f"apache-tvm-ffi refused the symbol {symbol.decode()}")
    return backend


_pinned: dict[Path, FFIModule] = {}  # the FFI keeps every library loaded as long as the process lives


def load_library(path: Path, pin: Callable[[Path], Path] | None = None) -> Module:
    """Load a compiled library.

    Args:
        path: A shared library, or an object file or tar archive that is linked first.
        pin: Gives the file's present content a path of its own: the loader takes one path for one library, for ever.
            None for a file that stays what it is.

    Raises:
        LibraryError: No such file, not a library, or one that needs more than this server has.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise LibraryError(f"cannot load {path.name}: no such file; upload it first")
    ffi = _ffi()
    if path.suffix not in _LIBRARY_SUFFIXES:
        path = link_library(path)
    check_library(path)
    pinned = path if pin is None else pin(path)
    module = _pinned.get(pinned)
    if module is not None:
        return module
    check_library(pinned, path.name)  # it may have been uploaded anew between
    _install_backend()
    try:
        loaded = ffi.load_module(str(pinned), keep_module_alive=True)
    except Exception as error:
        words = str(error).splitlines()[0].replace(str(pinned), str(path))
        raise LibraryError(f"cannot load {path.name}: {words}") from None
    _check_slots(path, pinned)
    module = FFIModule(loaded)
    if pinned != path:
        _pinned[pinned] = module
    return module


def _check_slots(path: Path, pinned: Path) -> None:
    """Refuse a library with a callback slot that nobody has filled."""
    library = ctypes.CDLL(str(pinned))
    empty = []
    for name in sorted(set(_SLOT.findall(pinned.read_bytes()))):
        text = name.decode()
        try:
            slot = ctypes.c_void_p.in_dll(library, text)
        except ValueError:
            continue  # a string, not a symbol
        if not slot.value:
            empty.append(text)
    if empty:
        raise LibraryError(f"library {path.name} calls {', '.join(empty)}, which this server does not provide")


def link_library(path: Path) -> Path:
    """Link an object file or a tar of object files into a shared library beside it; libraries pass as they are.

    Raises:
        LibraryError: No compiler, or it failed; the text holds its last words.
    """
    if path.suffix in _LIBRARY_SUFFIXES:
        return path
    target = path.with_name(path.name + ".so")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".link-") as folder:
        objects = [path]
        if path.suffix == ".tar":
            objects = _extract(path, Path(folder))
        for one in objects:
            check_object(one, "" if one is path else path.name)
        compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++", "cc"))), None)
        if compiler is None:
            raise LibraryError("linking needs a C++ compiler on the server (g++, clang++ or $CXX)")
        sources = [str(one) for one in objects]
        linked = f"{folder}/linked.so"  # a library that is loaded from the target stays whole
        failed = _run_compiler([compiler, "-shared", "-fPIC", "-O2", "-o", linked, *sources])
        if failed is not None:
            last = failed.strip().splitlines()[-1:] or ["no message"]
            raise LibraryError(f"cannot link {path.name}: {last[0]}")
        os.replace(linked, target)
    return target


def _run_compiler(command: list[str]) -> str | None:
    """Run a compiler, as long as somebody waits for what it makes; returns what it says if it fails."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            while True:
                try:
                    _, said = process.communicate(timeout=_LOOK)
                except subprocess.TimeoutExpired:  # noqa: PERF203  # it looks ten times a second
                    if cancelled():
                        raise call_cancelled() from None
                else:
                    return said if process.returncode else None
        finally:
            if process.poll() is None:
                _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and what it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:  # pragma: no cover  # Windows
        process.kill()


def _extract(path: Path, folder: Path) -> list[Path]:
    """Take the plain files of an archive into ``folder`` under names of our own."""
    objects = []
    try:
        with tarfile.open(path) as archive:
            for index, member in enumerate(archive.getmembers()):
                suffix = Path(member.name).suffix
                source = archive.extractfile(member) if member.isfile() else None
                if source is not None and suffix in (".o", ".c", ".cc", ".cpp", ".S"):
                    target = folder / f"{index}{suffix}"
                    target.write_bytes(source.read())
                    objects.append(target)
    except tarfile.TarError as error:
        raise LibraryError(f"cannot read {path.name}: {str(error).splitlines()[0].rstrip(':')}") from None
    if not objects:
        raise LibraryError(f"archive {path.name} holds no object files")
    return objects


class FFIModule(Module):
    """A module of apache-tvm-ffi."""

    def __init__(self, module: Any) -> None:
        super().__init__(kind=module.kind)
        self.module = module

    def get_function(self, name: str, query_imports: bool = False) -> Callable[..., Any] | None:
        """Return a function of the library, or of one imported into it."""
        found = self.module.get_function(name, query_imports) if self._has(name, query_imports) else None
        if found is not None:
            return _wrap(found)
        return super().get_function(name, query_imports)

    def _has(self, name: str, query_imports: bool) -> bool:
        try:
            return self.module.get_function(name, query_imports) is not None
        except AttributeError:
            return False

    def import_module(self, child: Module) -> None:
        """Import a module; compiled ones are joined in the library itself, so that its code finds them."""
        if isinstance(child, FFIModule):
            self.module.import_module(child.module)
        else:
            super().import_module(child)


def ffi_global_names() -> frozenset[str]:
    """Return the names of apache-tvm-ffi's globals; none where it has not been imported."""
    ffi = sys.modules.get("tvm_ffi")
    if ffi is None:
        return frozenset()
    listing = ffi.get_global_func("ffi.FunctionListGlobalNamesFunctor")()
    return frozenset(str(listing(index)) for index in range(listing(-1)))


def load_libraries(paths: Iterable[str]) -> frozenset[str]:
    """Load libraries at an operator's wish; returns the names of the FFI globals that they registered."""
    _ffi()  # its own globals are there once it is imported
    before = ffi_global_names()
    for path in paths:
        load_library(Path(path))
    return ffi_global_names() - before


def find_ffi_global(name: str) -> Callable[..., Any] | None:
    """Return a global function of apache-tvm-ffi, or None."""
    try:
        ffi = _ffi()
    except LibraryError:
        return None
    found = ffi.get_global_func(name, allow_missing=True)
    return None if found is None else _wrap(found)


def _wrap(function: Any) -> Callable[..., Any]:
    """Call an FFI function with our values and return ours."""

    def call(*args: Any) -> Any:
        return _from_ffi(function(*[_to_ffi(arg) for arg in args]))

    return call


def _to_ffi(value: Any) -> Any:
    kind = type(value)
    if kind in (int, float, str, bytes, bool, type(None)):
        return value
    ffi = _ffi()
    if kind.__module__ == "numpy":
        return _tensor(ffi, value)
    if isinstance(value, DType):
        return ffi.dtype(str(value))
    if isinstance(value, Device):
        return ffi.device(value.name, value.index)
    if isinstance(value, FFIModule):
        return value.module
    if isinstance(value, int):
        return ctypes.c_void_p(int(value))
    return value


def _tensor(ffi: Any, array: Any) -> Any:
    try:
        return ffi.from_dlpack(array)
    except (BufferError, TypeError, ValueError, RuntimeError):
        pass
    if not array.flags.writeable:
        return ffi.from_dlpack(array.copy())
    raise LibraryError(f"an array of type {array.dtype} cannot be passed to compiled code")


def _from_ffi(value: Any) -> Any:
    ffi = _ffi()
    if isinstance(value, ffi.Tensor):
        import numpy as np

        return np.from_dlpack(value)
    if isinstance(value, ffi.Function):
        return _wrap(value)
    if isinstance(value, ffi.Module):
        return FFIModule(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return bytes(value)
    return value
