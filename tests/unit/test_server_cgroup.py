"""Bounding memory where control groups are delegated; with a directory in the place of the system's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rpcnb.server.cgroup import MemoryGroups


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cgroup.procs").write_text("")
    return tmp_path / "mine"


def test_a_group_bounds_a_process(base: Path, tmp_path: Path) -> None:
    groups = MemoryGroups.open(1 << 30, tmp_path, "/mine")
    assert groups is not None
    assert (base / "cgroup.subtree_control").read_text() == "+memory"
    assert (base / f"rpcnb-{os.getpid()}" / "cgroup.procs").read_text() == str(os.getpid())
    path = groups.make()
    assert (path / "memory.max").read_text() == str(1 << 30)
    groups.put(path, 42)
    assert (path / "cgroup.procs").read_text() == "42"
    assert not groups.remove(path)
    (path / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert groups.remove(path)


def test_a_group_of_somebody_else_is_left_alone(tmp_path: Path, base: Path) -> None:
    assert MemoryGroups.open(1 << 30, tmp_path, "/") is None
    assert MemoryGroups.open(1 << 30, tmp_path, "/other") is None
    (base / f"rpcnb-{os.getpid()}").write_text("in the way")
    assert MemoryGroups.open(1 << 30, tmp_path, "/mine") is None
