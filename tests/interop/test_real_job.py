"""The real job: stock TVM compiles, a board without TVM runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from conftest import eventually

import rpcnb
from rpcnb.client.session import Session

if TYPE_CHECKING:
    from stock_peer import Peer

pytest_plugins = ("stock_peer",)
pytestmark = [pytest.mark.stock, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent.parent
SIZE = 512
TOKEN = "board-token"
JOBS = ("matmul", "parallel", "conv")


# -- in the child with stock TVM -------------------------------------------------------------------------------------


def compile_jobs(folder: str) -> list[str]:
    """Compile the three jobs as shared libraries and as archives; returns the files."""
    from stock_peer import tvm

    module = tvm()
    te = module.te
    files = []

    def export(name: str, function: Any) -> None:
        function = function.with_attr("global_symbol", name)
        executable = module.compile(module.IRModule({name: function}), target="llvm")
        for suffix in ("so", "tar"):
            path = f"{folder}/{name}.{suffix}"
            executable.export_library(path)
            files.append(path)

    left = te.placeholder((SIZE, SIZE), name="left")
    right = te.placeholder((SIZE, SIZE), name="right")
    k = te.reduce_axis((0, SIZE), name="k")
    product = te.compute((SIZE, SIZE), lambda i, j: te.sum(left[i, k] * right[k, j], axis=k), name="product")
    plain = te.create_prim_func([left, right, product])
    export("matmul", plain)

    schedule = module.s_tir.Schedule(plain)
    block = schedule.get_sblock("product")
    i, j, inner = schedule.get_loops(block)
    schedule.reorder(i, inner, j)
    schedule.parallel(i)
    schedule.decompose_reduction(block, inner)
    export("parallel", schedule.mod["main"])

    image = te.placeholder((1, 16, 34, 34), name="image")
    weight = te.placeholder((32, 16, 3, 3), name="weight")
    tir = module.tirx
    padded = te.compute(
        (1, 16, 36, 36),
        lambda n, c, h, w: tir.if_then_else(
            tir.all(h >= 1, h < 35, w >= 1, w < 35), image[n, c, h - 1, w - 1], tir.const(0, "float32")
        ),
        name="padded",
    )
    rc, ry, rx = te.reduce_axis((0, 16)), te.reduce_axis((0, 3)), te.reduce_axis((0, 3))
    conv = te.compute(
        (1, 32, 34, 34),
        lambda n, o, h, w: te.sum(padded[n, rc, h + ry, w + rx] * weight[o, rc, ry, rx], axis=[rc, ry, rx]),
        name="conv",
    )
    export("conv", te.create_prim_func([image, weight, conv]))
    return files


def run_as_stock(port: int, folder: str, suffix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """Upload, run and time every job from a stock client; returns results and timings."""
    from stock_peer import tvm

    module = tvm()
    session = module.rpc.connect("127.0.0.1", port, f"board -token={TOKEN}")
    device = session.cpu()
    found = {}
    for name in JOBS:
        inputs, shape = arrays[name]
        session.upload(f"{folder}/{name}.{suffix}")
        function = session.load_module(f"{name}.{suffix}")
        remote = [module.runtime.tensor(array, device) for array in inputs]
        result = module.runtime.empty(shape, "float32", device)
        function[name](*remote, result)
        timing = function.time_evaluator(name, device, number=2, repeat=2)(*remote, result)
        found[name] = (result.numpy(), list(timing.results))
    return found


# -- the board -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def compiled(stock: Peer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the compiled jobs."""
    folder = tmp_path_factory.mktemp("compiled")
    files = stock.run(compile_jobs, str(folder))
    assert len(files) == 2 * len(JOBS)
    return folder


@pytest.fixture(scope="session")
def board_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with rpcnb and apache-tvm-ffi, and without apache-tvm; ``RPCNB_BOARD_PYTHON`` names one."""
    python = os.environ.get("RPCNB_BOARD_PYTHON")
    if not python:
        folder = tmp_path_factory.mktemp("board") / "venv"
        venv.create(folder, with_pip=True)
        python = str(folder / "bin" / "python")
        install = [python, "-m", "pip", "install", "-q", "apache-tvm-ffi>=0.1.12", "numpy", "tornado"]
        subprocess.run(install, check=True, timeout=240)
        purelib = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        Path(purelib, "rpcnb-here.pth").write_text(f"{ROOT}\n")
    return python


@pytest.fixture(scope="module")
def start_board(board_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Start ``rpcnb serve`` in the board's environment; returns its port."""
    boards: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> int:
        ready = tmp_path_factory.mktemp("ready") / "ready.json"
        command = [board_python, "-m", "rpcnb", "serve", "--port", "0", "--silent", "--ready-file", str(ready)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        boards.append(subprocess.Popen([*command, *options], env=environment, stdin=subprocess.DEVNULL))
        eventually(lambda: ready.exists() or boards[-1].poll() is not None, "the ready file", 30)
        assert boards[-1].poll() is None
        port: int = json.loads(ready.read_text())["port"]
        return port

    yield start
    for board in boards:
        assert board.poll() is None, "a board's server has died"
        board.terminate()
    for board in boards:
        assert board.wait(10) == 0


@pytest.fixture(scope="module")
def board(start_board: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Port of a board whose clients are trusted by a token."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN)
    return start_board("--key", "board", "--token-file", str(file))


def connect(port: int) -> Session:
    session: Session = rpcnb.connect("127.0.0.1", port, key="board", token=TOKEN)
    return session


def job_arrays() -> dict[str, tuple[list[np.ndarray[Any, Any]], tuple[int, ...]]]:
    """Inputs and the output's shape of each job."""
    random = np.random.default_rng(1)
    square = [random.random((SIZE, SIZE), "float32") for _ in range(2)]
    image = [random.random((1, 16, 34, 34), "float32"), random.random((32, 16, 3, 3), "float32")]
    return {"matmul": (square, (SIZE, SIZE)), "parallel": (square, (SIZE, SIZE)), "conv": (image, (1, 32, 34, 34))}


def expected(name: str, inputs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Compute a job with numpy."""
    if name != "conv":
        product: np.ndarray[Any, Any] = inputs[0] @ inputs[1]
        return product
    image, weight = inputs
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
    total = np.zeros((1, 32, 34, 34), "float32")
    for y in range(3):
        for x in range(3):
            total += np.einsum("nchw,oc->nohw", padded[:, :, y : y + 34, x : x + 34], weight[:, :, y, x])
    return total


def test_the_board_has_no_tvm(board_python: str) -> None:
    code = "import tvm_ffi, rpcnb, importlib.util as u; raise SystemExit(u.find_spec('tvm') is not None)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    assert subprocess.run([board_python, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("suffix", ["so", "tar"])
@pytest.mark.parametrize("name", JOBS)
def test_our_client_runs_a_compiled_job_on_a_board_without_tvm(
    board: int, compiled: Path, name: str, suffix: str
) -> None:
    inputs, shape = job_arrays()[name]
    with connect(board) as session:
        session.upload(compiled / f"{name}.{suffix}")
        module = session.load_module(f"{name}.{suffix}")
        remote = [session.array(array) for array in inputs]
        result = session.empty(shape, "float32")
        module[name](*remote, result)
        np.testing.assert_allclose(result.numpy(), expected(name, inputs), rtol=1e-4)
        timing = module.time_evaluator(name, session.cpu(), number=2, repeat=3)(*remote, result)
        assert len(timing.results) == 3
        assert 0 < timing.min <= timing.mean <= timing.max < 10
        module(*remote, result)  # TVM marks the first function as main
        with pytest.raises(rpcnb.FunctionNotFound, match="no function 'absent'"):
            module["absent"]
        with pytest.raises(rpcnb.RemoteError, match=r"(?i)mismatch|expect"):
            module[name](remote[0], remote[1], session.empty((3,), "float32"))
        module[name](*inputs, result)  # arrays are uploaded for the call
        np.testing.assert_allclose(result.numpy(), expected(name, inputs), rtol=1e-4)


@pytest.mark.parametrize("suffix", ["so", "tar"])
def test_a_stock_client_runs_compiled_jobs_on_a_board_without_tvm(
    stock: Peer, board: int, compiled: Path, suffix: str
) -> None:
    arrays = job_arrays()
    found = stock.run(run_as_stock, board, str(compiled), suffix, arrays)
    for name in JOBS:
        result, timing = found[name]
        np.testing.assert_allclose(result, expected(name, arrays[name][0]), rtol=1e-4)
        assert len(timing) == 2
        assert min(timing) > 0


def test_an_archive_is_linked_on_the_board_and_downloaded(board: int, compiled: Path, tmp_path: Path) -> None:
    with connect(board) as session:
        session.upload(compiled / "matmul.tar")
        library = session.download_linked_module("matmul.tar")
        assert library[:4] == b"\x7fELF"
        (tmp_path / "linked.so").write_bytes(library)
        session.upload(tmp_path / "linked.so")
        assert session.load_module("linked.so")["matmul"] is not None


def test_two_sessions_run_a_parallel_job_at_once(board: int, compiled: Path) -> None:
    inputs, shape = job_arrays()["parallel"]
    with connect(board) as one, connect(board) as other:
        work = []
        for session in (one, other):
            session.upload(compiled / "parallel.so")
            module = session.load_module("parallel.so")
            arrays = [session.array(array) for array in inputs]
            work.append((module["parallel"], arrays, session.empty(shape, "float32")))
        import threading

        threads = [threading.Thread(target=lambda one=one: [one[0](*one[1], one[2]) for _ in range(5)]) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _, _, result in work:
            np.testing.assert_allclose(result.numpy(), expected("parallel", inputs), rtol=1e-4)


# -- libraries that cannot be loaded ---------------------------------------------------------------------------------


def one_line(board: int, file: Path | None, name: str) -> str:
    """Return the one-line text of a failing ``load_module``; the session survives it."""
    with connect(board) as session:
        if file is not None:
            session.upload(file)
        with pytest.raises(rpcnb.RemoteError) as info:
            session.load_module(name)
        assert info.value.remote_type == "LibraryError"
        assert session.call("rpc.test.addone", 41) == 42
        text: str = info.value.message
        assert "\n" not in text
        return text


def test_a_library_with_an_unfilled_slot_is_refused_naming_it(board: int, tmp_path: Path) -> None:
    source = "void* __TVMBackendRunOnce = 0; int __tvm_ffi_f(void) { return ((int (*)(void))__TVMBackendRunOnce)(); }"
    (tmp_path / "needy.c").write_text(source)
    library = tmp_path / "needy.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "needy.c")], check=True)
    text = one_line(board, library, "needy.so")
    assert text == "library needy.so calls __TVMBackendRunOnce, which this server does not provide"


def test_a_library_with_an_undefined_symbol_is_refused_naming_it(board: int, tmp_path: Path) -> None:
    (tmp_path / "open.c").write_text("extern int nobody_has_this; int* __tvm_ffi_f(void) { return &nobody_has_this; }")
    library = tmp_path / "open.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "open.c")], check=True)
    text = one_line(board, library, "open.so")
    assert text.startswith("cannot load open.so: ")
    assert "nobody_has_this" in text


@pytest.mark.parametrize("suffix", ["so", "tar", "o"])
def test_a_file_that_is_no_library_is_refused(board: int, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text.{suffix}"
    path.write_text("this is no library\n" * 10)
    assert f"text.{suffix}" in one_line(board, path, path.name)


def test_a_missing_library_is_named(board: int) -> None:
    assert one_line(board, None, "absent.so") == "cannot load absent.so: no such file; upload it first"


def test_without_trust_no_library_is_loaded(start_board: Callable[..., int], compiled: Path) -> None:
    port = start_board("--no-token")
    with rpcnb.connect("127.0.0.1", port) as session:
        session.upload(compiled / "matmul.so")
        for method in (session.load_module, session.download_linked_module):
            with pytest.raises(rpcnb.RemoteError, match="needs trust: start the server with a token") as info:
                method("matmul.so")
            assert info.value.remote_type == "AccessDenied"
        assert session.call("rpc.test.addone", 41) == 42
    port = start_board("--no-token", "--allow-native")
    with rpcnb.connect("127.0.0.1", port) as session:
        session.upload(compiled / "matmul.so")
        assert session.load_module("matmul.so")["matmul"] is not None


# -- TVM's tutorial --------------------------------------------------------------------------------------------------

CHANGED = {
    "from tvm import rpc": "import rpcnb as rpc",
    "tvm.runtime.tensor(": "rpc.tensor(",
    "tvm.runtime.empty(": "rpc.empty(",
}


def test_tvms_tutorial_runs_with_three_changed_lines(stock: Peer, board: int, tmp_path: Path) -> None:
    story = (Path(__file__).parent / "tutorial_story.py").read_text()
    ours = story
    for stock_words, our_words in CHANGED.items():
        assert sum(stock_words in line for line in story.splitlines()) == 1
        ours = ours.replace(stock_words, our_words)
    changed = [one for one, other in zip(story.splitlines(), ours.splitlines(), strict=True) if one != other]
    assert len(changed) == 3
    (tmp_path / "ours.py").write_text(ours)
    for path, key in (
        (Path(__file__).parent / "tutorial_story.py", f"board -token={TOKEN}"),
        (tmp_path / "ours.py", f"board -token={TOKEN}"),
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, str(path), "127.0.0.1", str(board), key, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "seconds per call" in done.stdout


def test_the_boards_server_has_survived(board: int) -> None:
    with connect(board) as session:
        assert session.call("rpc.test.addone", 41) == 42
    assert any(child.is_running() for child in psutil.Process().children())
