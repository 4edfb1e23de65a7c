"""Compiled libraries: the pieces here, whole libraries in processes of their own (loading is process-wide)."""

from __future__ import annotations

import asyncio
import ctypes
import gzip
import os
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest
from conftest import eventually

from rpcnb.errors import LibraryError
from rpcnb.runtime import backend, libraries
from rpcnb.runtime.current import CALL
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.libraries import (
    FFIModule,
    find_ffi_global,
    link_library,
    load_library,
)
from rpcnb.runtime.served import Module
from rpcnb.values import Device, DType, Pointer

# One exported function, and slots as TVM's code generator leaves them: null until somebody fills them.
SOURCE = """
#include <stdint.h>
typedef struct { int32_t t, z; union { int64_t i; double d; void* p; }; } A;
typedef struct { void* sync; int32_t count; } Env;
EXTRA
int __tvm_ffi_inc(void* s, A* a, int n, A* r) { r->t = 1; r->z = 0; r->i = a[0].i + 1; return 0; }
"""
SLOTS = """
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
int (*__TVMBackendFreeWorkspace)(int, int, void*);
int (*__TVMBackendParallelLaunch)(int (*)(int, Env*, void*), void*, int);
int (*__TVMBackendParallelBarrier)(int, Env*);
static int64_t total[64];
static int body(int task, Env* env, void* closure) {
  total[task] = *(int64_t*)closure * env->count;
  return __TVMBackendParallelBarrier(task, env);
}
int __tvm_ffi_work(void* s, A* a, int n, A* r) {
  int64_t* x = __TVMBackendAllocWorkspace(1, 0, 8, 0, 64);
  if (!x || (uintptr_t)x % 64) return -1;
  *x = a[0].i;
  if (__TVMBackendParallelLaunch(body, x, 0)) return -1;
  r->t = 1; r->z = 0; r->i = total[0];
  return __TVMBackendFreeWorkspace(1, 0, x);
}
"""
NULL_SLOT = 'void* (*__TVMBackendNobodyHasThis)(int);\nconst char* text = "x\\0__TVMIsOnlyText";'

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None and os.environ.get("CI") != "true", reason="needs a compiler"
)


def compile_to(target: Path, extra: str = "", *flags: str) -> Path:
    source = target.with_suffix(".c")
    source.write_text(SOURCE.replace("EXTRA", extra))
    subprocess.run(["gcc", *(flags or ("-shared",)), "-fPIC", "-O1", "-o", str(target), str(source)], check=True)
    return target


def in_a_process(path: Path, lines: str, **environment: str) -> str:
    """Run ``lines`` with ``path`` and ``load_library`` in a process of its own; returns its last line."""
    program = f"from pathlib import Path\nfrom rpcnb.runtime.libraries import *\npath = Path({str(path)!r})\n{lines}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=50,
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


# -- whole libraries -------------------------------------------------------------------------------------------------


def test_names_of_the_ffi_and_what_loading_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ffi.Shape" in backend.ffi_global_names() or "tvm_ffi" not in sys.modules
    loaded: list[Path] = []

    def load(path: Path, runtime: str) -> None:
        backend.ffi().register_global_func("rpcnb.test.added", lambda: 7)
        loaded.append(path)

    monkeypatch.setattr(libraries, "load_library", load)
    try:
        environment = Environment(ffi_names=frozenset({"before"}))
        libraries.load_at_start(environment, ["a.so"])
        assert environment.ffi_names == {"before", "rpcnb.test.added"}
    finally:
        backend.ffi().remove_global_func("rpcnb.test.added")
    assert loaded == [Path("a.so")]
    monkeypatch.delitem(sys.modules, "tvm_ffi")
    assert backend.ffi_global_names() == frozenset()


def test_a_library_is_loaded_and_its_function_called(tmp_path: Path) -> None:
    path = compile_to(tmp_path / "m.so")
    lines = "module = load_library(path)\nprint(module.get_function('inc')(41), module.get_function('nope'))"
    assert in_a_process(path, lines) == "42 None"


def test_workspaces_and_parallel_loops_run_without_tvm(tmp_path: Path) -> None:
    path = compile_to(tmp_path / "m.so", SLOTS)
    cores = len(os.sched_getaffinity(0))
    assert in_a_process(path, "print(load_library(path).get_function('work')(7))") == str(7 * cores)


def test_a_library_that_is_uploaded_again_runs_beside_the_one_before(tmp_path: Path) -> None:
    for number in (1, 2):
        extra = (
            f"int __tvm_ffi_version(void* s, A* a, int n, A* r) {{ r->t = 1; r->z = 0; r->i = {number}; return 0; }}"
        )
        compile_to(tmp_path / f"{number}.so", extra)
    lines = """
from rpcnb.runtime.files import SessionFiles
files, modules = SessionFiles(), []
for number in (1, 2, 1, 1):
    files.write("m.so", path.with_name(f"{number}.so").read_bytes())
    modules.append(load_library(files.path("m.so"), files.pin))
print([one.get_function("version")() for one in modules], modules[0] is modules[2] is modules[3], files.listdir(""))
files.close()
"""
    assert in_a_process(tmp_path / "m.so", lines) == "[1, 2, 1, 1] True ['m.so']"


def test_what_is_refused_after_it_was_pinned_has_its_own_name(
    ffi: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "install_backend", lambda: None)
    path = compile_to(tmp_path / "m.so")
    (tmp_path / "other").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LibraryError, match=r"^cannot load m\.so: it is an ELF .* whose end is missing"):
        load_library(path, lambda path: tmp_path / "other")
    assert ffi.loaded == []


def test_a_library_with_a_slot_that_nobody_fills_is_refused_by_name(tmp_path: Path) -> None:
    path = compile_to(tmp_path / "m.so", NULL_SLOT)
    assert in_a_process(path, "load_library(path)").endswith(
        "library m.so calls __TVMBackendNobodyHasThis, which this server does not provide"
    )


def test_an_object_file_is_linked_and_loaded(tmp_path: Path) -> None:
    path = compile_to(tmp_path / "m.o", "", "-c")
    assert in_a_process(path, "print(load_library(path).get_function('inc')(1))") == "2"


# -- loading, in pieces ----------------------------------------------------------------------------------------------


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"cannot load m\.so: no such file; upload it first"):
        load_library(tmp_path / "m.so")


def test_without_the_ffi_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.so").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(LibraryError, match=r"needs apache-tvm-ffi: pip install 'rpcnb\[tvm\]'"):
        load_library(tmp_path / "m.so")
    assert find_ffi_global("ffi.Shape") is None


class FakeModule:
    """A module of the FFI, as far as it is used."""

    kind = "library"

    def __init__(self, functions: dict[str, Any] | None = None, raises: bool = False) -> None:
        self.functions = functions or {}
        self.raises = raises
        self.imported: list[Any] = []

    def get_function(self, name: str, query_imports: bool) -> Any:
        if self.raises and name not in self.functions:
            raise AttributeError(name)
        return self.functions.get(name)

    def import_module(self, child: Any) -> None:
        self.imported.append(child)


@pytest.fixture
def ffi(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for tvm_ffi that loads anything."""
    loaded: list[tuple[str, bool]] = []

    def load_module(path: str, keep_module_alive: bool) -> FakeModule:
        loaded.append((path, keep_module_alive))
        return FakeModule()

    libinfo = SimpleNamespace(find_libtvm_ffi=lambda: "libtvm_ffi")
    fake = SimpleNamespace(loaded=loaded, load_module=load_module, libinfo=libinfo)
    monkeypatch.setattr(libraries, "ffi", lambda: fake)
    return fake


def test_a_file_is_linked_registered_loaded_and_checked_by_its_absolute_path(
    ffi: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(libraries, "install_backend", lambda: order.append(f"backend before {len(ffi.loaded)}"))
    path = compile_to(tmp_path / "m.o", NULL_SLOT.split("\n")[1], "-c")
    monkeypatch.chdir(tmp_path)
    module = load_library(Path("m.o"))
    assert isinstance(module, FFIModule)
    assert ffi.loaded == [(str(path) + ".so", True)]
    assert order == ["backend before 0"]
    null = compile_to(tmp_path / "null.so", NULL_SLOT)
    with pytest.raises(LibraryError, match="calls __TVMBackendNobodyHasThis, which this server does not provide"):
        load_library(null)


def test_a_library_that_lacks_a_function_is_refused_before_it_is_called(
    ffi: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "install_backend", lambda: None)
    path = compile_to(tmp_path / "m.so", "int nobody_has(int); int ask(void) { return nobody_has(1); }")
    with pytest.raises(
        LibraryError, match=r"^cannot load m\.so: it needs nobody_has, which this server does not have$"
    ):
        load_library(path)
    assert ffi.loaded == []


def test_a_library_that_needs_tvms_runtime_gets_it_or_says_what_to_do(
    ffi: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "install_backend", lambda: None)
    path = compile_to(tmp_path / "m.so", "int TVMOfTheRuntime(int); int ask(void) { return TVMOfTheRuntime(1); }")
    needs = r"^cannot load m\.so: it needs TVMOfTheRuntime, of TVM's runtime; "
    monkeypatch.setattr(libraries, "find_runtime", lambda: None)
    with pytest.raises(LibraryError, match=needs + "start the server with --runtime auto"):
        load_library(path)
    with pytest.raises(LibraryError, match=needs + "pip install apache-tvm there"):
        load_library(path, runtime="")
    runtime = compile_to(tmp_path / "runtime.so", "int TVMOfTheRuntime(int x) { return x; }")
    monkeypatch.setattr(libraries, "find_runtime", lambda: runtime)
    monkeypatch.setattr(libraries, "load_runtime", lambda: ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL))
    with pytest.raises(LibraryError, match=needs):
        load_library(path, runtime="none")
    assert isinstance(load_library(path, runtime=""), FFIModule)
    assert ffi.loaded == [(str(path), True)]


def test_a_file_that_is_no_library_is_refused_with_the_loaders_words(
    ffi: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, keep_module_alive: bool) -> None:
        raise RuntimeError("file too short\nand a long story")

    ffi.load_module = refuse
    monkeypatch.setattr(libraries, "install_backend", lambda: None)
    (tmp_path / "t.so").write_bytes(b"no library")
    with pytest.raises(LibraryError, match=r"^cannot load t\.so: it is a text file; expected .* here$"):
        load_library(tmp_path / "t.so")
    with pytest.raises(LibraryError, match=r"^cannot load m\.so: file too short$"):
        load_library(compile_to(tmp_path / "m.so"))


def test_a_slot_that_is_filled_passes(tmp_path: Path) -> None:
    filled = "static int x; void* __TVMBackendFilled = &x;"
    path = compile_to(tmp_path / "m.so", filled)
    libraries._check_slots(path, path)


# -- linking ---------------------------------------------------------------------------------------------------------


def test_libraries_pass_as_they_are() -> None:
    for suffix in (".so", ".dylib", ".dll"):
        assert link_library(Path("m" + suffix)) == Path("m" + suffix)


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
        folder = tarfile.TarInfo("folder.o")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    return path


def test_an_archive_is_linked_under_names_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    data = compile_to(tmp_path / "m.o", "", "-c").read_bytes()
    path = archive(tmp_path / "lib.tar", {"../../evil.o": data, "readme.txt": b"text"})
    linked = link_library(path)
    assert linked == tmp_path / "lib.tar.so"
    assert ctypes.CDLL(str(linked))["__tvm_ffi_inc"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["lib.tar", "lib.tar.so", "m.c", "m.o"]
    assert not (tmp_path.parent.parent / "evil.o").exists()


@pytest.mark.parametrize(
    ("extra", "plain"),
    [
        ("", True),
        ("int TVMFFIHas(void); int asks(void) { return TVMFFIHas(); }", True),
        ("void* memset(void*, int, unsigned long); void* clears(void* p, long n) { return memset(p, 0, n); }", True),
        ("float expf(float); float grows(float x) { return expf(x); }", False),  # where it is a compiler knows
        ("_Thread_local int mine; int* one(void) { return &mine; }", False),
    ],
)
def test_objects_that_need_only_tvm_are_linked_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str, plain: bool
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    ran: list[str] = []
    run = libraries._run

    def note_and_run(command: list[str]) -> str | None:
        ran.append(Path(command[0]).name)
        return run(command)

    monkeypatch.setattr(libraries, "_run", note_and_run)
    linked = link_library(compile_to(tmp_path / "m.o", extra, "-c"))
    assert ran == ["ld" if plain else Path(backend.compiler() or "").name]
    assert "TVMFFIHas" in extra or ctypes.CDLL(str(linked))["__tvm_ffi_inc"]


def test_where_the_linker_alone_fails_the_compiler_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(libraries, "_plain_linker", lambda objects: "false")
    assert ctypes.CDLL(str(link_library(compile_to(tmp_path / "m.o", "", "-c"))))["__tvm_ffi_inc"]


def test_an_object_of_a_link_time_optimizer_is_the_compilers(tmp_path: Path) -> None:
    path = compile_to(tmp_path / "m.o", "", "-c", "-flto")
    assert libraries._plain_linker([path]) is None
    assert ctypes.CDLL(str(link_library(path)))["__tvm_ffi_inc"]


def test_the_linkers_own_words_are_told(tmp_path: Path) -> None:
    (tmp_path / "bad.o").write_text("no object")
    with pytest.raises(LibraryError, match=r"cannot link bad\.o: .*ld:.*(not recognized|syntax error)"):
        link_library(tmp_path / "bad.o")


@pytest.mark.parametrize("loaded", [True, False])
def test_what_also_the_runtime_lacks_is_told(monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    def needs(path: Path, pin: Any) -> Any:
        raise libraries._NeedsRuntime("cannot load m.so: it needs TVMNope, of TVM's runtime")

    monkeypatch.setattr(libraries, "_load", needs)
    monkeypatch.setattr(libraries, "runtime_is_loaded", lambda: loaded)
    monkeypatch.setattr(libraries, "find_runtime", lambda: Path("runtime"))
    monkeypatch.setattr(libraries, "load_runtime", lambda: None)
    with pytest.raises(LibraryError, match=r"needs TVMNope.*, but the runtime that is loaded here") as told:
        load_library(Path("m.so"), runtime="")
    assert type(told.value) is LibraryError


def test_sources_find_tvms_headers(tmp_path: Path) -> None:
    source = b'#include "tvm/ffi/c_api.h"\n#include "tvm/runtime/c_backend_api.h"\nextern "C" int f(void) { return 5; }'
    assert ctypes.CDLL(str(link_library(archive(tmp_path / "m.tar", {"m.cc": source}))))["f"]() == 5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b'#include "tvm/runtime/c_backend_api.h"', "needs tvm/runtime/c_backend_api.h, which is not here: send it"),
        (b"int f(void) { return nobody; }", r"cannot link m\.tar: 0\.c:1.* error: .*nobody"),
    ],
)
def test_what_a_source_lacks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: bytes, words: str
) -> None:
    monkeypatch.setattr(libraries, "find_package", lambda: None)
    with pytest.raises(LibraryError, match=words):
        link_library(archive(tmp_path / "m.tar", {"m.c": source}))


def test_the_compiler_that_was_named_links_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    assert libraries._plain_linker([compile_to(tmp_path / "m.o", "", "-c")]) is None


def test_an_archive_without_objects_or_broken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"archive a\.tar holds no object files"):
        link_library(archive(tmp_path / "a.tar", {"readme.txt": b"text"}))
    whole = gzip.compress(archive(tmp_path / "c.tar", {"m.o": bytes(range(256)) * 64}).read_bytes())
    for damaged in (whole[:-20], whole[:40], whole[:30] + bytes(20) + whole[50:]):
        (tmp_path / "c.tar").write_bytes(damaged)
        with pytest.raises(LibraryError, match=r"cannot read c\.tar: .*; upload it again"):
            link_library(tmp_path / "c.tar")
    (tmp_path / "b.tar").write_bytes(b"no archive at all")
    with pytest.raises(LibraryError, match=r"cannot read b\.tar"):
        link_library(tmp_path / "b.tar")


def test_the_compilers_last_words_are_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.o").write_bytes(b"no object")
    with pytest.raises(LibraryError, match=r"cannot link bad\.o: .*ld"):
        link_library(tmp_path / "bad.o")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(LibraryError, match=r"cannot link bad\.o: no message"):
        link_library(tmp_path / "bad.o")


def test_a_compiler_for_which_nobody_waits_any_more_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "slow"
    pid = tmp_path / "pid"
    compiler.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {pid}.part\nmv {pid}.part {pid}\nwait\n")
    compiler.chmod(0o755)
    (tmp_path / "m.o").write_bytes(compile_to(tmp_path / "n.o", "", "-c").read_bytes())
    monkeypatch.setenv("CXX", str(compiler))

    asked = []

    class Call:
        @property
        def cancelled(self) -> bool:
            asked.append(True)
            return len(asked) > 1 and pid.exists()

    mark = CALL.set(Call())
    try:
        with pytest.raises(asyncio.CancelledError):
            link_library(tmp_path / "m.o")
    finally:
        CALL.reset(mark)
    eventually(lambda: not runs(int(pid.read_text())))
    assert not (tmp_path / "m.o.so").exists()


def runs(pid: int) -> bool:
    """Tell whether a process lives; one that has ended and is not collected does not."""
    return bool(psutil.pid_exists(pid)) and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


def test_without_a_compiler_linking_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.o").write_bytes(b"anything")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LibraryError, match="linking needs a C\\+\\+ compiler on the server"):
        link_library(tmp_path / "m.o")


# -- modules and values ----------------------------------------------------------------------------------------------


def test_a_library_module_finds_its_functions_and_those_of_imports() -> None:
    module = FFIModule(FakeModule({"f": lambda x: x + 1}, raises=True))
    other, python = FakeModule({"g": len}), Module({"h": lambda: "python"})
    module.import_module(FFIModule(other))
    module.import_module(python)
    found = module.get_function("f")
    assert found is not None
    assert found(1) == 2
    assert module.module.imported == [other]
    python_function = module.get_function("h", True)
    assert python_function is not None
    assert python_function() == "python"
    assert module.get_function("h") is None
    assert FFIModule(other).get_function("nothing", True) is None


def test_globals_of_the_ffi_are_called_with_our_values() -> None:
    echo = find_ffi_global("testing.echo")
    assert echo is not None
    assert find_ffi_global("no.such.function") is None
    for value in (None, True, 5, 2.5, "text", b"bytes", "a longer text", b"and longer bytes"):
        got = echo(value)
        assert got == value
        assert type(got) is type(value)


def test_arrays_go_in_and_come_back_without_a_copy() -> None:
    echo = find_ffi_global("testing.echo")
    assert echo is not None
    array = np.arange(6, dtype="float32").reshape(2, 3)
    back = echo(array)
    assert np.shares_memory(back, array)
    assert back.tolist() == array.tolist()
    read_only = np.frombuffer(b"abcd", np.uint8)
    assert echo(read_only).tobytes() == b"abcd"


def test_an_array_that_compiled_code_cannot_take_is_named() -> None:
    echo = find_ffi_global("testing.echo")
    assert echo is not None
    with pytest.raises(LibraryError, match="an array of type >i4 cannot be passed to compiled code"):
        echo(np.zeros(2, ">i4"))
    with pytest.raises(LibraryError, match="an array of type object cannot be passed"):
        echo(np.array([object()]))
    assert echo(np.ones(2, ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16


def test_functions_dtypes_devices_modules_and_pointers_are_translated() -> None:
    import tvm_ffi

    assert str(libraries._to_ffi(DType(2, 32, 4))) == "float32x4"
    device = libraries._to_ffi(Device(1, 0))
    assert isinstance(device, tvm_ffi.Device)
    fake = FakeModule()
    assert libraries._to_ffi(FFIModule(fake)) is fake
    pointer = libraries._to_ffi(Pointer(64))
    assert (type(pointer), pointer.value) == (ctypes.c_void_p, 64)
    thing = object()
    assert libraries._to_ffi(thing) is thing
    assert libraries._to_ffi(libraries.FFIFunction(thing)) is thing
    function = tvm_ffi.get_global_func("testing.echo")
    assert libraries._from_ffi(function)(5) == 5
    assert libraries._from_ffi(thing) is thing


def test_a_module_result_is_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        pass

    fake = SimpleNamespace(Tensor=Nothing, Function=Nothing, Module=FakeModule)
    monkeypatch.setattr(libraries, "ffi", lambda: fake)
    module = FakeModule()
    found = libraries._from_ffi(module)
    assert isinstance(found, FFIModule)
    assert found.module is module
