"""The import rules of style.md 1, and what no module may contain (no pickle, no eval)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rpcnb

ROOT = Path(rpcnb.__file__).parent
ORDER = ("errors", "values", "events", "protocol", "runtime", "net", "session", "jupyter")
LEAVES = frozenset({"", "__main__", "board", "command", "demo"})  # may import anything; "" is rpcnb/__init__
MAY_IMPORT = {layer: frozenset(ORDER[: ORDER.index(layer)]) for layer in ORDER} | {
    "errors": frozenset[str](),
    "values": frozenset[str](),
    "events": frozenset({"errors", "values"}),
    "protocol": frozenset({"errors", "values"}),
    "jupyter": frozenset({*ORDER[:-1], *LEAVES}),
}
PURE = ("errors", "values", "events", "protocol")
NOT_PURE = frozenset({"asyncio", "numpy", "socket", "threading", "time", "tornado"})
UNSAFE_MODULES = frozenset({"marshal", "pickle", "shelve", "dill", "cloudpickle"})
UNSAFE_CALLS = frozenset({"eval", "exec", "__import__"})

FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def layer_of(module: str) -> str:
    """Return the layer of ``rpcnb.protocol.codes``: ``protocol``."""
    return ([*module.split("."), ""])[1]


def own_module(path: Path) -> str:
    parts = ["rpcnb", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield every module imported anywhere, those for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            assert node.module is not None
            if node.module == "rpcnb":
                for alias in node.names:
                    yield f"rpcnb.{alias.name}" if (ROOT / alias.name).exists() else _submodule(alias.name)
            else:
                yield node.module


def _submodule(name: str) -> str:
    return f"rpcnb.{name}" if (ROOT / f"{name}.py").exists() else "rpcnb"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_layer_imports_only_what_lies_to_its_left(path: Path) -> None:
    layer = layer_of(own_module(path))
    if layer in LEAVES:
        return
    allowed = MAY_IMPORT[layer] | {layer}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # the one exception: methods named `panel` import it when they are called
        if isinstance(node, ast.FunctionDef) and node.name == "panel":
            node.body = [one for one in node.body if getattr(one, "module", "") != "rpcnb.jupyter.panels"]
    found = {module for module in imports(tree) if module.split(".")[0] == "rpcnb"}
    assert {module for module in found if layer_of(module) not in allowed} == set()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_layers_without_io_import_nothing_that_waits_or_computes(path: Path) -> None:
    if layer_of(own_module(path)) in PURE:
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
    if path == ROOT / "runtime" / "cells.py":
        return  # the one module of remote cells, imported only where the operator gave consent
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
