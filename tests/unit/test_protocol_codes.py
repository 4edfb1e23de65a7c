"""The wire's numbers."""

from __future__ import annotations

import pytest

from rpcnb.protocol.codes import MAGIC, MAGIC_DUPLICATE, MAGIC_MISMATCH, VERSION, Code, Limits, Role, TypeIndex
from rpcnb.protocol.messages import SYSCALLS


def test_the_magic_words_are_the_wires() -> None:
    assert MAGIC.to_bytes(4, "little").hex() == "71f20f00"
    assert (MAGIC_DUPLICATE, MAGIC_MISMATCH) == (MAGIC + 1, MAGIC + 2)
    assert VERSION == "0.8.0"


def test_the_codes_are_numbered_without_a_gap_and_the_syscalls_are_the_last_13() -> None:
    assert [int(code) for code in Code] == list(range(22))
    assert sorted(SYSCALLS) == list(range(9, 22))


@pytest.mark.parametrize(
    ("name", "number"),
    [("NONE", 0), ("OPAQUE", 4), ("DLTENSOR", 7), ("STR", 65), ("TENSOR", 70), ("RPC_OBJECT_REF", 115)],
)
def test_type_indices_have_their_numbers(name: str, number: int) -> None:
    assert TypeIndex[name] == number


def test_limits_are_bounded_by_default() -> None:
    limits = Limits()
    assert (limits.key, limits.args, limits.ndim, limits.handles) == (4096, 1024, 64, 65536)
    assert (Role.CLIENT, Role.SERVER) == (0, 1)
