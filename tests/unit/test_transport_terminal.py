"""What strangers say, made harmless for a terminal."""

from __future__ import annotations

import logging

import pytest

from rpcnb.transport.terminal import PrintableFormatter, printable


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("plain text,\ttabs and\nlines; Grüße, 日本, 👩‍🔬", "plain text,\ttabs and\nlines; Grüße, 日本, 👩‍🔬"),
        ("\x1b]52;c;cm0=\x07\x1b[2J", r"\x1b]52;c;cm0=\x07\x1b[2J"),
        ("\x9b2J over\rwritten\x7f\x00", r"\x9b2J over\rwritten\x7f\x00"),
        ("file\u202etxt.exe\u2028\u2066", r"file\u202etxt.exe\u2028\u2066"),
        ("\ud800", r"\ud800"),
    ],
)
def test_control_characters_are_escaped(said: str, shown: str) -> None:
    assert printable(said) == shown


def test_what_is_logged_of_strangers_is_harmless() -> None:
    record = logging.LogRecord("rpcnb", logging.WARNING, "", 0, "refused %s", ("\x1b[2J",), None)
    assert PrintableFormatter("%(levelname)s %(message)s").format(record) == r"WARNING refused \x1b[2J"
