"""TVM's runtime: found without importing TVM, taken out of wheels, loaded once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpcnb.command.main import main
from rpcnb.errors import LibraryError
from rpcnb.runtime import tvmruntime
from rpcnb.runtime.tvmruntime import copy_runtime, find_runtime, load_runtime

PARTS = ("libtvm_runtime.so", "libtvm_runtime_extra.so")


def installed(monkeypatch: pytest.MonkeyPatch, place: Path | None) -> None:
    found = None if place is None else SimpleNamespace(submodule_search_locations=[str(place)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)


@pytest.fixture
def tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tvm" / "lib"
    folder.mkdir(parents=True)
    for name in (*PARTS, "libtvm_compiler.so"):
        (folder / name).write_bytes(name.encode())
    installed(monkeypatch, folder.parent)
    return folder


def test_it_is_found_beside_an_installed_tvm(tvm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_runtime() == tvm / "libtvm_runtime.so"
    installed(monkeypatch, tvm)
    assert find_runtime() == tvm / "libtvm_runtime.so"
    installed(monkeypatch, tvm / "nowhere")
    assert find_runtime() is None
    installed(monkeypatch, None)
    assert find_runtime() is None


def test_its_files_are_copied(tvm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "folder"
    assert copy_runtime(out) == [out / name for name in PARTS]
    assert (out / PARTS[0]).read_bytes() == PARTS[0].encode()
    installed(monkeypatch, None)
    with pytest.raises(LibraryError, match="no apache-tvm is installed here; pip install apache-tvm"):
        copy_runtime(out)


def test_they_are_taken_out_of_a_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "apache_tvm-0.27.0-aarch64.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_extra.so", "tvm/lib/libtvm.so", "tvm/a.py"):
            file.writestr(name, b"x" * 2_000_000)
    out = tmp_path / "out"
    assert main(["runtime", str(out), "--from", str(wheel)]) == 0
    assert capsys.readouterr().out == "".join(f"{out / name}  2.0 MB\n" for name in PARTS)
    assert sorted(path.name for path in out.iterdir()) == sorted(PARTS)


@pytest.mark.parametrize(("content", "text"), [(b"no zip", "cannot read"), (None, "holds no runtime of TVM")])
def test_what_is_no_wheel_of_tvm_is_one_line(
    tmp_path: Path, content: bytes | None, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "other.whl"
    if content is None:
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr("other.py", b"")
    else:
        wheel.write_bytes(content)
    assert main(["runtime", str(tmp_path / "out"), "--from", str(wheel)]) == 1
    said = capsys.readouterr().err
    assert text in said
    assert len(said.splitlines()) == 1


def test_what_cannot_be_loaded_is_told(tvm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvmruntime, "runtime_is_loaded", lambda: False)
    with pytest.raises(LibraryError, match=r"cannot load libtvm_runtime\.so: .*(too short|invalid ELF|file too short)"):
        load_runtime()
    with pytest.raises(LibraryError, match="there is no runtime of TVM at"):
        load_runtime(str(tmp_path / "nothing.so"))
    source, other = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int other(void) { return 1; }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    with pytest.raises(LibraryError, match=r"other\.so is no runtime of TVM, or one for another apache-tvm-ffi"):
        load_runtime(str(other))
    installed(monkeypatch, None)
    with pytest.raises(LibraryError, match="beside an installed apache-tvm; pip install apache-tvm"):
        load_runtime()
    monkeypatch.setattr(tvmruntime, "runtime_is_loaded", lambda: True)
    assert load_runtime() == tvmruntime.runtime_names()


def in_a_process(source: str) -> Any:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.stock
def test_the_real_one_is_loaded_without_tvm() -> None:
    code, out, err = in_a_process(
        "import sys\n"
        "from rpcnb.runtime.tvmruntime import *\n"
        "assert not runtime_is_loaded()\n"
        "names = load_runtime()\n"
        "assert load_runtime() == names == runtime_names()\n"
        "assert runtime_is_loaded() and 'tvm' not in sys.modules\n"
        "print('vm.builtin.make_tuple' in names, 'tvm.contrib.sort.sort' in names)\n"
    )
    assert (code, out) == (0, "True True\n"), err


@pytest.mark.stock
def test_libraries_do_not_end_a_process_in_which_tvms_runtime_is_loaded_before_or_behind() -> None:
    code, out, err = in_a_process(
        "from rpcnb.runtime.environment import Environment\n"
        "from rpcnb.runtime.libraries import load_at_start\n"
        "from rpcnb.runtime.backend import install_backend\n"
        "from rpcnb.runtime.tvmruntime import find_runtime, runtime_is_loaded\n"
        "install_backend()\n"
        "load_at_start(Environment(native=True), [str(find_runtime())])\n"
        "print(runtime_is_loaded())\n"
        "import tvm\n"
        "print(tvm.runtime.enabled('llvm'))\n"
    )
    assert (code, out) == (0, "True\nTrue\n"), err
