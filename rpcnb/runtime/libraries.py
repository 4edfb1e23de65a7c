"""Compiled libraries, through the small ``apache-tvm-ffi`` alone; stock TVM is not needed on the server.

A library compiled by TVM calls back for workspaces and parallel loops through data slots named ``__TVMBackend...``.
They are null unless someone has registered the symbols, and calling through null ends the process: so callbacks are
registered before a library is loaded, and every slot is looked at afterwards (design.md 4; all tried).
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcnb.errors import CopyMismatch, LibraryError
from rpcnb.runtime.backend import (
    compiler,
    ffi,
    ffi_global_names,
    find_global,
    install_backend,
    measuring_backend,
    runtime_is_loaded,
)
from rpcnb.runtime.completion import call_cancelled
from rpcnb.runtime.current import cancelled
from rpcnb.runtime.devices import DeviceTensor
from rpcnb.runtime.libraryfile import check_library, check_object, undefined_symbols
from rpcnb.runtime.served import Module
from rpcnb.runtime.tvmruntime import NEVER, find_package, find_runtime, load_runtime
from rpcnb.values import Device, DType, is_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rpcnb.runtime.environment import Environment

__all__ = ["find_ffi_global", "link_library", "load_at_start", "load_library"]

_SLOT = re.compile(rb"\0(__TVM[A-Za-z0-9_]+)(?=\0)")
_MISSING = re.compile(
    r"undefined symbol: (\w+)|(\S+): cannot open shared object file|created using \{(\S+)\} but a loader"
)
_LINKERS = re.compile(r"\S*\bld(\.\w+)?:")
_HEADER = re.compile(r"fatal error: '?([\w./+-]+)'?(?:: No such file| file not found)")
_HOW = "start the server with --runtime auto, or with --runtime and the path of libtvm_runtime.so"
_WHERE = "pip install apache-tvm there, or take that out of its wheel: rpcnb runtime FOLDER --from WHEEL"
_LACKS = ", but the runtime that is loaded here does not have it: is it of another version?"
_LIBRARY_SUFFIXES = (".so", ".dylib", ".dll")
# What the linker makes itself, and functions that every version of libc has once. An object that leaves open only these
# and the names of TVM becomes the same library without a compiler, whose start takes most of the time.
_PLAIN = frozenset({b"_GLOBAL_OFFSET_TABLE_", b"memset", b"memmove"})
_CPU = 1  # DLPack's number
_LOOK = 0.1  # seconds between two looks whether somebody still waits for a compiler

_pinned: dict[Path, FFIModule] = {}  # the FFI keeps every library loaded as long as the process lives


def load_library(path: Path, pin: Callable[[Path], Path] | None = None, runtime: str = NEVER) -> Module:
    """Load a compiled library; with the TVM runtime that is installed here, if it needs that.

    Args:
        path: A shared library, or an object file or tar archive that is linked first.
        pin: Gives the file's present content a path of its own: the loader takes one path for one library, for ever.
            None for a file that stays what it is.
        runtime: The environment's (:class:`~rpcnb.runtime.environment.Environment`).

    Raises:
        LibraryError: No such file, not a library, or one that needs more than this server has.
    """
    try:
        return _load(path, pin)
    except _NeedsRuntime as error:
        if runtime_is_loaded():
            raise LibraryError(f"{error}{_LACKS}") from None
        if runtime or find_runtime() is None:
            raise LibraryError(f"{error}; {_HOW if runtime == NEVER else _WHERE}") from None
        load_runtime()
    try:
        return _load(path, pin)
    except _NeedsRuntime as error:
        raise LibraryError(f"{error}{_LACKS}") from None


class _NeedsRuntime(LibraryError):
    """A library needs TVM's runtime, which is not loaded."""


def _load(path: Path, pin: Callable[[Path], Path] | None) -> Module:
    path = Path(path).absolute()
    if not path.is_file():
        raise LibraryError(f"cannot load {path.name}: no such file; upload it first")
    package = ffi()
    if path.suffix not in _LIBRARY_SUFFIXES:
        path = link_library(path)
    check_library(path)
    pinned = path if pin is None else pin(path)
    module = _pinned.get(pinned)
    if module is not None:
        return module
    check_library(pinned, path.name)  # it may have been uploaded anew between
    install_backend()
    try:
        # All that it needs must be there now (RTLD_NOW): a call of what is missing would end the process.
        ctypes.CDLL(str(pinned))
        loaded = package.load_module(str(pinned), keep_module_alive=True)
    except Exception as error:
        words = str(error).splitlines()[0].replace(str(pinned), str(path))
        missing = _MISSING.search(words)
        if missing is None:
            raise LibraryError(f"cannot load {path.name}: {words}") from None
        needs = next(filter(None, missing.groups()))
        if "tvm" in needs.lower() or "relax" in needs:
            raise _NeedsRuntime(f"cannot load {path.name}: it needs {needs}, of TVM's runtime") from None
        raise LibraryError(f"cannot load {path.name}: it needs {needs}, which this server does not have") from None
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
        command = compiler()
        if command is None:
            raise LibraryError("linking needs a C++ compiler on the server (g++, clang++ or $CXX)")
        sources = [str(one) for one in objects]
        linked = f"{folder}/linked.so"  # a library that is loaded from the target stays whole
        linker = _plain_linker(objects)
        failed = None if linker is None else _run([linker, "-shared", "--eh-frame-hdr", "-o", linked, *sources])
        if linker is None or failed is not None:
            includes = [f"-I{folder}" for folder in _headers()] if any(one.suffix != ".o" for one in objects) else []
            failed = _run([command, "-shared", "-fPIC", "-O2", *includes, "-o", linked, *sources])
        if failed is not None:
            raise LibraryError(f"cannot link {path.name}: {_why(failed.replace(f'{folder}/', ''))}")
        os.replace(linked, target)
    return target


def _headers() -> list[Path]:
    """Return the folders of the headers that sources made by TVM include: what is here of them."""
    from tvm_ffi.libinfo import find_include_path

    found = [Path(find_include_path())]
    tvm = find_package()
    return [*found, tvm / "include"] if tvm is not None else found


def _why(failed: str) -> str:
    """Return the line of a compiler's words that says most."""
    header = _HEADER.search(failed)
    if header is not None:
        return (
            f"its source needs {header[1]}, which is not here: send it compiled (export_library('x.so')), "
            "or pip install apache-tvm there"
        )
    lines = failed.strip().splitlines() or ["no message"]
    return next((line for line in lines if " error: " in line or _LINKERS.match(line)), lines[-1])


def _plain_linker(objects: list[Path]) -> str | None:
    """Return the linker if it can do without a compiler, which knows where other libraries are."""
    if sys.platform != "linux" or "CXX" in os.environ:
        return None
    for one in objects:
        names = undefined_symbols(one)
        if names is None or not all(name.startswith(b"TVM") or name in _PLAIN for name in names):
            return None
    return shutil.which("ld")


def _run(command: list[str]) -> str | None:
    """Run a compiler or a linker, as long as somebody waits for what it makes; returns its words if it fails."""
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
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        why = str(error).splitlines()[0].rstrip(":.")
        raise LibraryError(f"cannot read {path.name}: {why}; upload it again") from None
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
            return FFIFunction(found)
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


def load_at_start(environment: Environment, paths: Iterable[str]) -> None:
    """Load what the operator wishes: TVM's runtime, and libraries whose FFI globals may be called then.

    Raises:
        LibraryError: Something cannot be loaded.
    """
    if environment.runtime not in ("", NEVER):
        load_runtime(environment.runtime)
    paths = list(paths)
    if paths:
        ffi()  # its own globals are there once it is imported
        before = ffi_global_names()
        for path in paths:
            load_library(Path(path), runtime=environment.runtime)
        environment.ffi_names |= ffi_global_names() - before


def find_ffi_global(name: str) -> FFIFunction | None:
    """Return a global function of apache-tvm-ffi, or None."""
    try:
        found = find_global(name)
    except LibraryError:
        return None
    return None if found is None else FFIFunction(found)


class FFIFunction:
    """A function of apache-tvm-ffi, called with our values; returns ours."""

    __slots__ = ("function",)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return _from_ffi(self.function(*[_to_ffi(arg) for arg in args]))

    def measured(self, args: tuple[Any, ...]) -> Callable[[int], float]:
        """Return what calls it so often, and returns the seconds of that: of the function, not of our values."""
        return measuring_backend().measured(self.function, [_to_ffi(arg) for arg in args])


def _to_ffi(value: Any) -> Any:
    kind = type(value)
    if kind in (int, float, str, bytes, bool, type(None)):
        return value
    package = ffi()
    if is_array(value):
        return _tensor(package, value)
    if isinstance(value, DeviceTensor):
        from rpcnb.runtime.tvmdevices import to_ffi_tensor

        return to_ffi_tensor(value)
    if isinstance(value, DType):
        return package.dtype(str(value))
    if isinstance(value, Device):
        return package.device(value.name, value.index)
    if isinstance(value, FFIModule):
        return value.module
    if isinstance(value, FFIFunction):
        return value.function
    if isinstance(value, int):
        return ctypes.c_void_p(int(value))
    return value


def _tensor(package: Any, array: Any) -> Any:
    """Return an array as compiled code takes it: its own memory, unless that is read-only or has a byte per int4."""
    from rpcnb.runtime.dlpack import Exported

    tensor = getattr(array, "tensor", None)
    if tensor is None:
        try:
            return package.from_dlpack(array)
        except (BufferError, TypeError, ValueError, RuntimeError):
            pass
        with contextlib.suppress(CopyMismatch):
            tensor = DeviceTensor.of_array(array) if array.dtype.isnative else None
        if tensor is None:
            raise LibraryError(f"an array of type {array.dtype} cannot be passed to compiled code")
    return package.from_dlpack(Exported(tensor.bytes(), tensor.meta.dtype, tensor.meta.shape))


def _from_ffi(value: Any) -> Any:
    package = ffi()
    if isinstance(value, package.Tensor):
        from rpcnb.runtime.dlpack import from_dlpack

        if value.device.dlpack_device_type() != _CPU:
            from rpcnb.runtime.tvmdevices import from_ffi_tensor

            return from_ffi_tensor(value)
        return from_dlpack(value)
    if isinstance(value, package.Function):
        return FFIFunction(value)
    if isinstance(value, package.Module):
        return FFIModule(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return bytes(value)
    return value
