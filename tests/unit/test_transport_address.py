"""Addresses as users give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpcnb.transport import runfiles
from rpcnb.transport.address import tracker_pair


@pytest.mark.parametrize(
    ("given", "pair"),
    [
        (("h", 1), ("h", 1)),
        (["h", "1"], ("h", 1)),
        ("h:1", ("h", 1)),
        ("h", ("h", 9190)),
        ("[::1]:2", ("::1", 2)),
        ("tracker://h:3", ("h", 3)),
    ],
)
def test_a_tracker_is_given_as_a_pair_or_as_text(given: Any, pair: tuple[str, int]) -> None:
    assert tracker_pair(given) == pair


@pytest.mark.parametrize("given", [5, ("h",), ("h", "x"), (1, "h"), ("h", 1, 2), None])
def test_anything_else_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected host and port of a tracker"):
        tracker_pair(given)


def test_a_directory_that_cannot_be_read_has_no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "glob", refuse)
    assert runfiles.list_servers() == []
    assert runfiles.find_token("127.0.0.1", 9090) is None
