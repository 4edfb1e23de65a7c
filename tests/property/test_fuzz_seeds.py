"""The fuzz targets, for some seconds and always the same way; ``fuzz/README.md`` says how to run them for longer."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import TARGETS
from fuzz.__main__ import run_seeded
from fuzz.corpora import make

CORPORA = Path(__file__).parents[2] / "fuzz" / "corpus"
# About two seconds each. Inputs, not seconds: a slow machine tries the same ones.
INPUTS = {
    "client": 1500,
    "devices": 4000,
    "proxy": 5000,
    "records": 8000,
    "servant": 600,
    "tracker": 2500,
    "websocket": 1500,
}


@pytest.fixture
def _measured() -> Iterator[None]:
    """Memory is looked at; what is refused is not logged."""
    logging.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_measured")
@pytest.mark.parametrize("target", TARGETS)
def test_f6_mutated_inputs_break_no_promise(target: str) -> None:
    assert run_seeded(target, 1, lambda count: count < INPUTS[target]) == INPUTS[target]


def test_the_committed_corpora_are_what_the_vectors_make(tmp_path: Path) -> None:
    make(tmp_path)
    made, kept = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path, CORPORA)
    )
    assert made == kept
    assert sum(map(len, kept.values())) < 200_000
