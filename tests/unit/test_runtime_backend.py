"""What compiled code calls back for, in C and in Python, and how its functions are measured."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpcnb.errors import LibraryError
from rpcnb.runtime import backend as module
from rpcnb.runtime.backend import Backend, CompiledBackend, PythonBackend, build, find_global, install_backend

Task = Callable[[int, int, "int | None"], int]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledBackend:
    path = build(tmp_path_factory.mktemp("cache"))
    assert path is not None, "there is no compiler"
    return CompiledBackend(path)


@pytest.fixture(params=["compiled", "python"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    monkeypatch.setattr(module, "processors", lambda: 2)
    if request.param == "python":
        made = PythonBackend()
        yield made
        made._pool.shutdown()
        return
    found: CompiledBackend = request.getfixturevalue("compiled")
    found.threads = 2
    yield found


def test_as_many_threads_run_as_were_asked_for(backend: Backend) -> None:
    assert backend.threads == 2
    backend.threads = 1
    assert backend.threads == 1
    backend.threads = 2


def function(backend: Backend, name: str, kind: Any) -> Any:
    return kind(backend.symbols[name])


def launch(backend: Backend, task: Task, tasks: int) -> int:
    held = module._LAMBDA(task)
    address = ctypes.cast(held, ctypes.c_void_p).value
    return int(function(backend, "ParallelLaunch", module._LAUNCH)(address, None, tasks))


def barrier(backend: Backend, index: int, environment: int) -> int:
    return int(function(backend, "ParallelBarrier", module._BARRIER)(index, environment))


def test_workspaces_are_aligned_and_used_again(backend: Backend) -> None:
    allocate = function(backend, "AllocWorkspace", module._ALLOC)
    free = function(backend, "FreeWorkspace", module._FREE)
    for _ in range(3):
        blocks = [allocate(1, 0, 100 * (index + 1), 2, 32) for index in range(8)]
        assert len({block % 64 for block in blocks}) == 1
        assert all(block % 64 == 0 for block in blocks)
        for index, block in enumerate(blocks):
            ctypes.memset(block, 7, 100 * (index + 1))
        for block in blocks:
            assert free(1, 0, block) == 0
    assert free(1, 0, None) == 0
    assert allocate(1, 0, 1 << 62, 2, 32) is None


def test_the_workspace_of_a_loop_is_the_one_before(compiled: CompiledBackend) -> None:
    allocate = function(compiled, "AllocWorkspace", module._ALLOC)
    free = function(compiled, "FreeWorkspace", module._FREE)
    first = allocate(1, 0, 1 << 20, 2, 32)
    free(1, 0, first)
    assert allocate(1, 0, 1 << 20, 2, 32) == first
    free(1, 0, first)
    small = allocate(1, 0, 64, 2, 32)
    assert small != first, "it is much too large"
    free(1, 0, small)
    assert allocate(2, 0, 64, 2, 32) is None, "of another device"


def test_tasks_run_in_parallel_and_meet_at_the_barrier(backend: Backend) -> None:
    seen: list[tuple[int, int]] = []

    def task(index: int, environment: int, closure: int | None) -> int:
        assert module._ParallelEnv.from_address(environment).num_task == 2
        for _ in range(20):  # neither goes on alone
            barrier(backend, index, environment)
            seen.append((index, threading.get_native_id()))
            barrier(backend, index, environment)
        return 0

    assert launch(backend, task, 0) == 0
    assert [{index for index, _ in seen[at : at + 2]} for at in range(0, 40, 2)] == [{0, 1}] * 20
    assert len({thread for _, thread in seen}) == 2


def test_many_launches_from_many_threads(backend: Backend) -> None:
    counts = [0] * 8

    def work(number: int) -> None:
        def task(index: int, environment: int, closure: int | None) -> int:
            counts[number * 2 + index] += 1
            return 0

        for _ in range(50):
            assert launch(backend, task, 2) == 0

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [50] * 8


def test_a_launch_after_a_pause_wakes_who_sleeps(backend: Backend) -> None:
    for pause in (0.0, 0.05, 0.0, 0.05):
        threading.Event().wait(pause)
        seen: list[int] = []
        assert launch(backend, lambda index, environment, closure, seen=seen: seen.append(index) or 0, 2) == 0  # type: ignore[misc]
        assert sorted(seen) == [0, 1]


def test_a_task_that_fails_fails_the_launch(backend: Backend) -> None:
    assert launch(backend, lambda index, environment, closure: -index, 2) == -1
    assert launch(backend, lambda index, environment, closure: 3, 1) == 3


def test_nested_and_oversized_launches_run_one_after_the_other(backend: Backend) -> None:
    names: list[int] = []

    def inner(index: int, environment: int, closure: int | None) -> int:
        names.append(threading.get_native_id())
        return barrier(backend, index, environment)

    def outer(index: int, environment: int, closure: int | None) -> int:
        return launch(backend, inner, 2)

    assert launch(backend, outer, 2) == 0
    assert len(names) == 4
    names.clear()
    assert launch(backend, inner, 5) == 0
    assert names == [threading.get_native_id()] * 5


def test_where_affinity_is_unknown_the_cpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert module.processors() == 1


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(compiled: CompiledBackend) -> None:
    compiled.threads = 2
    assert launch(compiled, lambda index, environment, closure: 0, 2) == 0
    child = os.fork()
    if not child:
        seen: list[int] = []
        launch(compiled, lambda index, environment, closure: seen.append(index) or 0, 2)  # type: ignore[func-returns-value]
        os._exit(len(seen))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


# -- building and registering --------------------------------------------------------------------------------------


def test_it_is_built_once_and_only_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "cache")
    assert path is not None
    before = path.stat()
    assert build(tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    path.chmod(0o666)
    again = build(tmp_path / "cache")
    assert again == path
    assert path.stat().st_ino != before.st_ino, "others may have written there"
    (tmp_path / "cache").chmod(0o777)
    assert build(tmp_path / "cache") is None
    monkeypatch.setenv("CXX", "/bin/false")
    assert build(tmp_path / "other") is None
    monkeypatch.setattr(module, "compiler", lambda: None)
    assert build(tmp_path / "other") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert module._cache_directory() == tmp_path / "xdg" / "rpcnb"


@pytest.mark.parametrize("status", [0, 1])
def test_slots_are_registered_and_never_bare_names(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[bytes] = []

    class Register:
        def __call__(self, symbol: bytes, pointer: int) -> int:
            assert pointer
            registered.append(symbol)
            return status

    module.ffi()  # which loads its own library, once
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(TVMFFIEnvModRegisterContextSymbol=Register()))
    monkeypatch.setattr(module, "find_global", lambda name: None)
    monkeypatch.setattr(module, "build", lambda: None)
    install = install_backend.__wrapped__
    if status:
        with pytest.raises(LibraryError, match="apache-tvm-ffi refused the symbol __TVMBackendAllocWorkspace"):
            install()
        return
    made = install()
    assert isinstance(made, PythonBackend)
    assert sorted(registered) == [
        b"__TVMBackendAllocWorkspace",
        b"__TVMBackendFreeWorkspace",
        b"__TVMBackendParallelBarrier",
        b"__TVMBackendParallelLaunch",
    ]
    made._pool.shutdown()


def test_what_was_built_for_another_machine_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"\x7fELF" + b"\0" * 60)
    monkeypatch.setattr(module, "build", lambda: wrong)
    monkeypatch.setattr(module, "find_global", lambda name: None)
    made = install_backend.__wrapped__()
    assert isinstance(made, PythonBackend)
    made._pool.shutdown()


def test_tvms_own_runtime_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_global", lambda name: object())
    assert install_backend.__wrapped__() is None


def test_beside_tvms_own_runtime_the_loop_that_measures_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = module.measuring_backend.__wrapped__
    installed = Backend()
    monkeypatch.setattr(module, "install_backend", lambda: installed)
    assert find() is installed
    monkeypatch.setattr(module, "install_backend", lambda: None)
    assert isinstance(find(), CompiledBackend)
    monkeypatch.setattr(module, "build", lambda: None)
    assert type(find()) is Backend
    (tmp_path / "wrong.so").write_bytes(b"no library")
    monkeypatch.setattr(module, "build", lambda: tmp_path / "wrong.so")
    assert type(find()) is Backend


def test_without_the_ffi_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(LibraryError, match=r"pip install 'rpcnb\[tvm\]'"):
        module.ffi()


# -- measuring -----------------------------------------------------------------------------------------------------


def test_a_function_is_called_so_often(backend: Backend) -> None:
    import tvm_ffi

    seen: list[tuple[Any, ...]] = []
    counted = tvm_ffi.convert(lambda *args: seen.append(args))
    tensor = tvm_ffi.from_dlpack(np.arange(3.0))
    for args in ((1, 2.5, True, None), (tensor,), ("text", b"bytes"), ()):
        seen.clear()
        seconds = backend.measured(counted, args)(7)
        assert seconds > 0
        assert len(seen) == 7
        assert len(seen[0]) == len(args)
    seen.clear()
    backend.measured(counted, (1, 2.5, True, None))(1)
    assert seen == [(1, 2.5, True, None)]


def test_what_a_measured_function_returns_is_released(backend: Backend) -> None:
    echo = find_global("testing.echo")
    import tvm_ffi

    tensor = tvm_ffi.from_dlpack(np.zeros(1000))
    count = ctypes.c_uint32.from_address(tensor.__chandle__())
    before = count.value
    backend.measured(echo, (tensor,))(1000)
    assert count.value <= before + 1, "references to it"


def test_caches_are_flushed_and_nothing_is_lost(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHE", 1 << 16)
    arrays = [np.arange(1000.0), np.arange(3)[1:], np.zeros(0)]
    backend.flush(arrays)
    assert [array.sum() for array in arrays] == [499500, 3, 0]


@pytest.mark.parametrize("knows", [0, 1])
def test_where_the_processor_knows_no_way_caches_are_filled_with_something_else(
    compiled: CompiledBackend, monkeypatch: pytest.MonkeyPatch, knows: int
) -> None:
    arrays = [np.arange(1000.0), np.arange(3)]
    flushed: list[tuple[int, int]] = []

    def flush(start: int, nbytes: int) -> int:
        flushed.append((start, nbytes))
        return knows

    filled: list[Any] = []
    monkeypatch.setattr(compiled, "_library", SimpleNamespace(rpcnb_flush=flush))
    monkeypatch.setattr(Backend, "flush", lambda self, arrays: filled.append(arrays))
    compiled.flush(arrays)
    assert flushed == [(one.ctypes.data, one.nbytes) for one in arrays][: 1 + knows]
    assert filled == ([] if knows else [arrays])


def test_a_measured_function_that_fails_raises_what_it_raises(backend: Backend) -> None:
    import tvm_ffi

    def fail(x: int) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        backend.measured(tvm_ffi.convert(fail), (1,))(5)
    seen: list[int] = []

    def fail_once(x: int) -> None:
        seen.append(x)
        if len(seen) == 3:
            raise ValueError("once")

    with pytest.raises((ValueError, RuntimeError), match=r"once|failed in call 3 of 5"):
        backend.measured(tvm_ffi.convert(fail_once), (1,))(5)


CROWDED = """
import ctypes, os, sys
from pathlib import Path
from rpcnb.runtime import backend as module

def workers():
    return {int(name) for name in os.listdir("/proc/self/task")} - before

made = module.CompiledBackend(Path(sys.argv[1]))
made.threads = 2
held = module._LAMBDA(lambda task, env, closure: 0)
address = ctypes.cast(held, ctypes.c_void_p).value
launch = module._LAUNCH(made.symbols["ParallelLaunch"])
one, other = sorted(os.sched_getaffinity(0))[:2]
before = {int(name) for name in os.listdir("/proc/self/task")}
os.sched_setaffinity(0, {one})
launch(address, None, 2)  # the worker is made here, and may run nowhere else
(worker,) = workers()
assert os.sched_getaffinity(worker) == {one}
for _ in range(1000):
    os.sched_setaffinity(0, {one})
    os.sched_setaffinity(0, {one, other})
    assert launch(address, None, 2) == 0
    if os.sched_getaffinity(worker) == {other}:
        break
else:
    sys.exit("the worker stays where the launching thread is")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells where threads run")
def test_a_worker_leaves_the_cpu_of_the_thread_that_launches(tmp_path: Path) -> None:
    """It would wait there until the system moves it: 0.4 to 1 ms for each launch, in half of all sessions."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one CPU")
    path = build(tmp_path)
    done = subprocess.run([sys.executable, "-c", CROWDED, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
