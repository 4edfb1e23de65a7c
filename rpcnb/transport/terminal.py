"""What strangers say, made harmless for a terminal: it could move the cursor, write the clipboard, or fake lines."""

from __future__ import annotations

import logging
import re

__all__ = ["PrintableFormatter", "printable"]

# All control characters but tab and line feed; what changes the direction of writing; other ends of lines; surrogates.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with its control characters escaped as Python writes them in a string."""
    return _HARMFUL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class PrintableFormatter(logging.Formatter):
    """Formats log records for a terminal; names and errors of others are in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return printable(super().format(record))
