"""The operator's modules, which register functions: importing them by name, or by path."""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rpcnb.runtime.backend import ffi_global_names
from rpcnb.runtime.registry import REGISTRY

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["is_path", "load_modules", "loads_program", "main_program"]

_MAIN = "__mp_main__"  # what multiprocessing calls a program whose functions are wanted, not its run
_OWN = ("ffi.", "testing.")  # how the globals of apache-tvm-ffi itself begin


def load_modules(
    names: Sequence[str], main: dict[str, str] | None = None, before: frozenset[str] = frozenset()
) -> frozenset[str]:
    """Import modules by name, files by path, or call ``module:function`` with the registry.

    Args:
        names: Of modules.
        main: A program (``main_program()`` of the process that has it) whose functions are wanted.
        before: Globals of apache-tvm-ffi that were there.

    Returns:
        Names of the globals of apache-tvm-ffi that they have brought.
    """
    if main is not None:
        _load_program(main)
    for name in names:
        _load(name)
    own = frozenset(name for name in ffi_global_names() if name.startswith(_OWN))
    return ffi_global_names() - (before or own)


def is_path(name: str) -> bool:
    """Tell whether a module is named by where its file is."""
    return name.endswith(".py") or os.sep in name


def _load(name: str) -> None:
    module, colon, function = name.partition(":")
    if is_path(name):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"cannot load {name}: no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None, name
        assert spec.loader is not None, name
        made = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, made)
        spec.loader.exec_module(made)
    elif colon:
        getattr(importlib.import_module(module), function)(REGISTRY)
    else:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        importlib.import_module(name)


def main_program() -> dict[str, str] | None:
    """Return where the program that runs in this process can be found; None if it is no file: a notebook, a prompt."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return {"module": spec.name}
    path = getattr(main, "__file__", None)
    return None if path is None or not os.path.isfile(path) else {"path": os.path.abspath(path)}


_loads_program = False


def loads_program() -> bool:
    """Tell whether a program is being imported for its functions: what it does there is not meant to be run."""
    return _loads_program


def _load_program(main: dict[str, str]) -> None:
    global _loads_program
    _loads_program = True
    try:
        if "module" in main:
            found = runpy.run_module(main["module"], run_name=_MAIN, alter_sys=False)
        else:
            found = runpy.run_path(main["path"], run_name=_MAIN)
    finally:
        _loads_program = False
    module = type(sys)(_MAIN)
    module.__dict__.update(found)
    sys.modules[_MAIN] = module
