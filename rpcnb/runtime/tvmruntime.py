"""TVM's own runtime without TVM: ``libtvm_runtime`` is 3 MB, the compiler beside it 260.

It brings Relax's virtual machine, device APIs, TVM's thread pool, its random numbers and sorting. It registers itself
with apache-tvm-ffi when the system's loader loads it; the Python package ``tvm`` is never imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import shutil
import sys
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from rpcnb.errors import LibraryError
from rpcnb.runtime.backend import ffi, ffi_global_names, runtime_is_loaded

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["AUTO", "NEVER", "copy_runtime", "find_runtime", "load_runtime", "runtime_is_loaded", "runtime_names"]

log = logging.getLogger(__name__)

AUTO, NEVER = "auto", "none"
_STEM = "tvm_runtime"
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_PREFIX = "" if sys.platform == "win32" else "lib"
_MAIN = f"{_PREFIX}{_STEM}{_SUFFIX}"
_HOW = "pip install apache-tvm, or take it out of its wheel: rpcnb runtime FOLDER --from apache_tvm-*.whl"

_lock = threading.Lock()
_names: frozenset[str] = frozenset()


def runtime_names() -> frozenset[str]:
    """Return what a runtime that was loaded here has registered."""
    return _names


def find_package() -> Path | None:
    """Return the folder of an installed apache-tvm; None if there is none. Nothing is imported."""
    spec = importlib.util.find_spec("tvm")
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    return next(map(Path, places), None)


def find_runtime() -> Path | None:
    """Return the runtime of an installed apache-tvm; None if there is none. Nothing is imported."""
    place = find_package()
    for folder in (place / "lib", place) if place is not None else ():
        if (folder / _MAIN).is_file():
            return folder / _MAIN
    return None


def load_runtime(where: str = AUTO) -> frozenset[str]:
    """Load the runtime, once for the process; returns the names of the functions that it has registered.

    Args:
        where: ``auto``: beside an installed apache-tvm; else a path of ``libtvm_runtime.so`` or of its folder.

    Raises:
        LibraryError: There is none, or it cannot be loaded.
    """
    global _names
    with _lock:
        ffi()  # its library must be there first
        if runtime_is_loaded():
            return _names
        path = find_runtime() if where == AUTO else Path(where)
        if path is None:
            raise LibraryError(f"there is no runtime of TVM beside an installed apache-tvm; {_HOW}")
        path = path / _MAIN if path.is_dir() else path
        if not path.is_file():
            raise LibraryError(f"there is no runtime of TVM at {path}; {_HOW}")
        before = ffi_global_names()
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise LibraryError(f"cannot load {path.name}: {error}") from None
        if not runtime_is_loaded():
            raise LibraryError(f"{path.name} is no runtime of TVM, or one for another apache-tvm-ffi")
        for part in sorted(path.parent.glob(f"{_PREFIX}{_STEM}_*{_SUFFIX}")):
            try:
                ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:  # noqa: PERF203  # of a GPU that is not here
                log.debug("%s is not loaded: %s", part.name, error)
        _names = ffi_global_names() - before
        return _names


def _parts(source: Path) -> Iterator[tuple[str, Path | None]]:
    """Yield the names of a runtime's files, in a wheel or in the folder of one."""
    if source.is_dir():
        yield from ((path.name, path) for path in source.glob(f"{_PREFIX}{_STEM}*{_SUFFIX}"))
    else:
        with zipfile.ZipFile(source) as wheel:
            yield from ((name, None) for name in wheel.namelist() if _is_part(Path(name).name))


def _is_part(name: str) -> bool:
    return name.startswith(f"{_PREFIX}{_STEM}") and name.endswith((".so", ".dylib", ".dll"))


def copy_runtime(target: Path, wheel: Path | None = None) -> list[Path]:
    """Copy the runtime's files, of an installed apache-tvm or out of a wheel, which may be another machine's.

    Raises:
        LibraryError: There are none.
    """
    if wheel is not None:
        source = wheel
    else:
        found = find_runtime()
        if found is None:
            raise LibraryError(f"no apache-tvm is installed here; {_HOW}")
        source = found.parent
    try:
        parts = list(_parts(source))
    except (OSError, zipfile.BadZipFile) as error:
        raise LibraryError(f"cannot read {source}: {error}") from None
    if not parts:
        raise LibraryError(f"{source.name} holds no runtime of TVM")
    target.mkdir(parents=True, exist_ok=True)
    made = []
    for name, path in parts:
        out = target / Path(name).name
        if path is not None:
            shutil.copyfile(path, out)
        else:
            with zipfile.ZipFile(source) as opened, opened.open(name) as inside, open(out, "wb") as file:
                shutil.copyfileobj(inside, file)
        made.append(out)
    return sorted(made)
