"""The browser tests share one JupyterLab and one browser per module; these are no leaks of a single test."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(autouse=True)
def _no_leaks() -> None:
    """Leave the look at threads and sockets to the end of the module."""


@pytest.fixture(scope="module", autouse=True)
def _no_children_left() -> Iterator[None]:
    """After a module its JupyterLab, kernels, demo boards and browser are gone."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not psutil.wait_procs(left, 10)[1]
