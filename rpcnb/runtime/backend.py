"""What compiled code calls back for: workspaces, parallel loops, barriers; and how its functions are measured.

A library compiled by TVM has slots named ``__TVMBackend...`` for these. ``backend.c`` fills them, built once where the
server has a C compiler; the same in Python elsewhere, which costs 330 us per parallel loop instead of a few. Where
TVM's own runtime is loaded, it does all that.

Source:
    TVM's c_backend_api.h; apache-tvm-ffi's c_api.h (``TVMFFIAny``, ``TVMFFIObject``) and c_env_api.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.errors import LibraryError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "Backend",
    "CompiledBackend",
    "PythonBackend",
    "compiler",
    "ffi",
    "ffi_global_names",
    "find_global",
    "install_backend",
    "measuring_backend",
    "processors",
    "runtime_is_loaded",
]

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("backend.c")
_COMPILING = 60.0  # seconds
_CACHE = 64 << 20  # bytes: more than caches have
_NAMES = ("AllocWorkspace", "FreeWorkspace", "ParallelLaunch", "ParallelBarrier")

_LAMBDA = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
_FREE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_BARRIER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)

# TVMFFIAny: a type's index, four bytes of nothing, eight of the value.
_INT, _FLOAT = struct.Struct("<iIq"), struct.Struct("<iId")


class _ParallelEnv(ctypes.Structure):
    """TVMParallelGroupEnv."""

    _fields_ = (("sync_handle", ctypes.c_void_p), ("num_task", ctypes.c_int32))


def ffi() -> Any:
    """Return the package apache-tvm-ffi.

    Raises:
        LibraryError: It is not installed.
    """
    try:
        import tvm_ffi
    except ImportError:
        raise LibraryError("loading compiled libraries needs apache-tvm-ffi: pip install 'rpcnb[tvm]'") from None
    return tvm_ffi


def find_global(name: str) -> Any:
    """Return a global function of apache-tvm-ffi, or None."""
    return ffi().get_global_func(name, allow_missing=True)


def runtime_is_loaded() -> bool:
    """Tell whether TVM's runtime is in this process, however it came."""
    return find_global("runtime.config_threadpool") is not None


def _ffi_library() -> Any:
    return ctypes.CDLL(ffi().libinfo.find_libtvm_ffi())


def ffi_global_names() -> frozenset[str]:
    """Return the names of apache-tvm-ffi's globals; none where it has not been imported."""
    package = sys.modules.get("tvm_ffi")
    if package is None:
        return frozenset()
    listing = package.get_global_func("ffi.FunctionListGlobalNamesFunctor")()
    return frozenset(str(listing(index)) for index in range(listing(-1)))


def compiler() -> str | None:
    """Return the C++ or C compiler of this machine: ``$CXX``, or what there is."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++", "cc"))), None)


def processors() -> int:
    """Return how many processors this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Backend:
    """What compiled code calls back for.

    Attributes:
        symbols: Addresses of what it calls, by name.
        threads: How many run a parallel loop.
    """

    symbols: dict[str, int]
    threads: int

    def measured(self, function: Any, args: Sequence[Any]) -> Callable[[int], float]:
        """Return what calls a function of the FFI so often, and returns the seconds of that."""
        once = tuple(args)

        def measure(number: int) -> float:
            start = time.perf_counter()
            deque(starmap(function, repeat(once, number)), maxlen=0)
            return time.perf_counter() - start

        return measure

    def flush(self, arrays: Sequence[Any]) -> None:
        """Push NumPy arrays out of the processor's caches."""
        source, target = _large_buffers()
        target[...] = source


@cache
def _large_buffers() -> tuple[Any, Any]:
    import numpy as np

    return np.ones(_CACHE, np.uint8), np.zeros(_CACHE, np.uint8)


class PythonBackend(Backend):
    """In Python; kept alive for the life of the process."""

    def __init__(self) -> None:
        self._workspaces: dict[int, Any] = {}
        self._lock = threading.Lock()
        self.threads = processors()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="rpcnb-parallel")
        self._local = threading.local()
        self._barriers: dict[int, threading.Barrier] = {}
        self._callbacks = (
            _ALLOC(self._allocate), _FREE(self._free), _LAUNCH(self._launch), _BARRIER(self._barrier),
        )  # fmt: skip
        self.symbols = dict(zip(_NAMES, map(_address, self._callbacks), strict=True))

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
        """Run ``tasks`` parallel tasks (0: one per thread); nested launches run one after the other."""
        count = tasks or self.threads
        run = _LAMBDA(function)
        environment = _ParallelEnv(None, count)
        address = ctypes.addressof(environment)

        def task(index: int) -> int:
            self._local.inside = True
            try:
                return int(run(index, address, closure))
            finally:
                self._local.inside = False

        if count == 1 or getattr(self._local, "inside", False) or count > self.threads:
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


class CompiledBackend(Backend):
    """``backend.c``, built.

    Args:
        path: The library.
    """

    def __init__(self, path: Path) -> None:
        # For all to see: a library that was linked against TVM's runtime by name finds these.
        self._library = library = ctypes.CDLL(str(path), mode=getattr(ctypes, "RTLD_GLOBAL", 0))
        self._ffi = _ffi_library()
        self.symbols = {name: _address(getattr(library, f"TVMBackend{name}")) for name in _NAMES}
        self._call, self._release = _address(self._ffi.TVMFFIFunctionCall), _address(self._ffi.TVMFFIObjectDecRef)
        library.rpcnb_configure.argtypes = [ctypes.c_int, ctypes.c_void_p]
        library.rpcnb_repeat.restype = ctypes.c_int64
        library.rpcnb_repeat.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_double),
        ]
        library.rpcnb_flush.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.threads = processors()

    @property
    def threads(self) -> int:
        """How many run a parallel loop."""
        return int(self._library.rpcnb_threads())

    @threads.setter
    def threads(self, count: int) -> None:
        self._library.rpcnb_configure(count, _address(self._ffi.TVMFFIErrorSetRaisedFromCStr))

    def measured(self, function: Any, args: Sequence[Any]) -> Callable[[int], float]:
        """Return what calls a function of the FFI so often, and returns the seconds of that."""
        try:
            packed = b"".join(map(_packed, args))
        except TypeError:  # a text, say, which costs more than the loop
            return super().measured(function, args)
        kept = tuple(args)  # whose addresses are in there
        handle, count, seconds = function.__chandle__(), len(kept), ctypes.c_double()
        library, call, release = self._library, self._call, self._release

        def measure(number: int) -> float:
            done = library.rpcnb_repeat(call, release, handle, packed, count, number, ctypes.byref(seconds))
            if done < number:
                function(*kept)  # raises, once more, what it has raised
                raise RuntimeError(f"the function failed in call {done + 1} of {number}")
            return seconds.value

        return measure

    def flush(self, arrays: Sequence[Any]) -> None:
        """Push NumPy arrays out of the processor's caches."""
        if not all(self._library.rpcnb_flush(array.ctypes.data, array.nbytes) for array in arrays):
            super().flush(arrays)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _packed(value: Any) -> bytes:
    """Return an argument as a ``TVMFFIAny``.

    Raises:
        TypeError: It is none of the common kinds.
    """
    kind = type(value)
    if value is None:
        return _INT.pack(0, 0, 0)
    if kind is bool:
        return _INT.pack(2, 0, value)
    if kind is int:
        return _INT.pack(1, 0, value)
    if kind is float:
        return _FLOAT.pack(3, 0, value)
    handle: int | None = value.__chandle__() if hasattr(kind, "__chandle__") else None
    if not handle:
        raise TypeError
    # An object's own index stands 8 bytes inside of it.
    return struct.pack("<iIQ", ctypes.c_int32.from_address(handle + 8).value, 0, handle)


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpcnb"


def _is_ours(path: Path) -> bool:
    """Tell whether nobody else can have written there."""
    found = path.stat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


def build(folder: Path | None = None) -> Path | None:
    """Build ``backend.c`` unless that was done before; returns the library, None where that cannot be done.

    Args:
        folder: Where it is kept, ``~/.cache/rpcnb`` by default.
    """
    with_what = compiler()
    if with_what is None or os.name == "nt":
        return None
    source = _SOURCE.read_bytes()
    facts = f"{platform.machine()} {platform.system()} {struct.calcsize('P')}".encode()
    try:
        folder = _cache_directory() if folder is None else folder
        path = folder / f"backend-{hashlib.sha256(source + facts).hexdigest()[:16]}.so"
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        if path.exists() and _is_ours(folder) and _is_ours(path):
            return path
        if not _is_ours(folder):
            return None
        with tempfile.TemporaryDirectory(dir=folder) as here:
            made = Path(here) / "backend.so"
            # As C, also by a C++ compiler.
            command = [with_what, "-x", "c", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(made), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILING, stdin=subprocess.DEVNULL)
            made.chmod(0o600)
            os.replace(made, path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
        log.info("parallel loops and workspaces of compiled code are slow: backend.c could not be built: %s", error)
        return None
    return path


@cache
def measuring_backend() -> Backend:
    """Return what measures functions: what is installed; where TVM's runtime fills the slots, the loop alone."""
    found = install_backend()
    path = build() if found is None else None
    if path is not None:
        with contextlib.suppress(OSError, AttributeError):
            found = CompiledBackend(path)
    return found or Backend()


@cache
def install_backend() -> Backend | None:
    """Fill the slots of compiled code from now on; None where TVM's own runtime is in this process and does it."""
    if runtime_is_loaded():
        return None
    backend: Backend | None = None
    path = build()
    if path is not None:
        with contextlib.suppress(OSError, AttributeError):  # of another machine, say: a shared home directory
            backend = CompiledBackend(path)
    backend = backend or PythonBackend()
    register = _ffi_library().TVMFFIEnvModRegisterContextSymbol
    register.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    for name, address in backend.symbols.items():
        # The slots' names only: a library may have a function of the bare name, and be written over.
        symbol = f"__TVMBackend{name}"
        if register(symbol.encode(), address) != 0:
            raise LibraryError(f"apache-tvm-ffi refused the symbol {symbol}")
    return backend
