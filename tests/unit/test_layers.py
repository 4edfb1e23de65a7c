"""The rooms (docs/architecture.md): who imports whom, and what no module may contain (no pickle, no eval)."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rpcnb
from rpcnb import parts

ROOT = Path(rpcnb.__file__).parent
TESTS = Path(__file__).parent.parent
PURE = ("errors", "values", "events", "protocol")
NOT_PURE = frozenset({"asyncio", "numpy", "socket", "threading", "time", "tornado"})
UNSAFE_MODULES = frozenset({"marshal", "pickle", "shelve", "dill", "cloudpickle"})
UNSAFE_CALLS = frozenset({"eval", "exec", "__import__"})
# Run source and read pickles; imported only where the operator, or the user, has consented.
CONSENTED = {ROOT / "cells" / "cells.py", ROOT / "cells" / "pickles.py"}

FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("rooms", TESTS.parent / "scripts" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = _script()
ARROWS: dict[str, set[str]] = rooms.graph()
HOUSE = [room for room in rooms.ORDER if (ROOT / room).is_dir()]


def layer_of(module: str) -> str:
    layer: str = rooms.room_of(module)
    return layer


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield every module imported anywhere, those for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("module", sorted(ARROWS))
def test_a_room_imports_only_what_stands_before_it(module: str) -> None:
    room = layer_of(module)
    if room in ("", "__main__"):
        return  # the package's face, which names everything and imports nothing (below); `python -m rpcnb`
    earlier = {*rooms.ORDER[: rooms.ORDER.index(room)], room}
    if room in ("command", "jupyter"):
        earlier.add("")  # the last rooms use the public names
    if room in PURE:
        earlier -= {"events", "parts"} - {room}
    assert {other for other in ARROWS[module] if layer_of(other) not in earlier} == set()


def test_the_packages_face_imports_no_room() -> None:
    assert ARROWS["rpcnb"] <= {"rpcnb.parts", "rpcnb.errors"}


def test_no_files_import_each_other() -> None:
    assert rooms.circles(ARROWS) == []


def test_circles_are_found_where_there_are_some() -> None:
    made = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d2"}, "d2": {"a", "d"}}
    assert rooms.circles(made) == [["b", "c"], ["d", "d2"]]


def test_what_is_offered_by_name_is_there() -> None:
    for name in list(parts._PARTS):
        assert callable(parts.find(name)), name
    assert parts.find("scheme nothing") is None


def test_the_picture_of_the_rooms_is_current() -> None:
    page = rooms.PAGE.read_text()
    assert rooms.BEGIN + rooms.picture() + rooms.END in page, "run: python scripts/rooms.py --write"


def _defined(path: Path) -> set[str]:
    """Return the names that a file defines: functions, classes, their members, constants."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if hasattr(one, "name")}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return found


def test_the_walks_name_what_is_there() -> None:
    page = rooms.PAGE.read_text()
    files = {name: ROOT / name for name in re.findall(r"`([a-z]+/[a-z]+\.py)`", page)}
    assert len(files) > 30
    assert {name for name, path in files.items() if not path.exists()} == set()
    for name, thing in re.findall(r"`([a-z]+/[a-z]+\.py)`\s+`([\w.]+)`", page):
        assert thing in _defined(files[name]), f"{thing} in {name}"
    everything = set().union(*map(_defined, FILES))
    assert {thing for thing in re.findall(r"`([A-Z]\w+\.\w+)`", page) if thing not in everything} == set()


@pytest.mark.parametrize("room", HOUSE)
def test_a_room_says_what_lives_there_who_may_enter_and_where_to_begin(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or ""
    assert 3 <= len(text.splitlines()) <= 12
    assert "Who enters:" in text
    begin = text.partition("Begin with ")[2]
    named = re.findall(r"``([a-z]+)\.py``", begin)
    assert named, "Begin with ``file.py``"
    assert all((ROOT / room / f"{name}.py").exists() for name in named)


@pytest.mark.parametrize("folder", ["unit", "loopback"])
def test_tests_are_named_after_rooms(folder: str) -> None:
    of_the_whole = {"test_first", "test_layers", "test_benchmarks", "test_readme"}
    found = {path.stem for path in (TESTS / folder).glob("test_*.py")} - of_the_whole
    assert {name for name in found if name.split("_")[1] not in rooms.ORDER} == set()


def test_a_server_without_consent_imports_nothing_that_runs_source() -> None:
    code = (
        "import sys, rpcnb; server = rpcnb.Server(port=0); session = rpcnb.connect(server.address)\n"
        "session.status(); session.close(); server.close()\n"
        "print(*[name for name in ('rpcnb.cells.cells', 'cloudpickle') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_layers_without_io_import_nothing_that_waits_or_computes(path: Path) -> None:
    if layer_of(rooms.module_of(path)) in PURE:
        assert not {module.split(".")[0] for module in imports(ast.parse(path.read_text()))} & NOT_PURE


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_module_lists_its_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if not any(isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) for node in tree.body):
        return  # a package's docstring, or `python -m rpcnb`
    targets = [
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    ]
    assert "__all__" in targets


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_module_runs_text_or_unpickles(path: Path) -> None:
    if path in CONSENTED:
        return
    tree = ast.parse(path.read_text())
    assert not {module.split(".")[0] for module in imports(tree)} & UNSAFE_MODULES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        assert not (isinstance(function, ast.Name) and function.id in UNSAFE_CALLS), ast.unparse(node)
        assert not (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and (function.value.id, function.attr) in {("yaml", "load"), ("os", "system"), ("builtins", "eval")}
        ), ast.unparse(node)
        for keyword in node.keywords:
            shell = keyword.arg == "shell" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            )
            assert not shell, ast.unparse(node)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, rpcnb; print(*sorted({'numpy', 'tornado', 'IPython', 'asyncio', 'anywidget'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
