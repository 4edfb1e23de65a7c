"""What a device puts out, made harmless for a notebook's page: there it would run as the user.

Text, PNG and JPEG are shown as they are, SVG as a picture. HTML stands in a frame that runs no scripts, loads nothing,
and is nobody's origin. Everything else (JavaScript, widgets, Markdown and LaTeX, which may hold both) is named.

Source:
    HTML Living Standard, the iframe element: ``sandbox`` without words, ``srcdoc``; CSP Level 3.
"""

from __future__ import annotations

import base64
import binascii
import re
from html import escape
from typing import Any

from rpcnb.transport.terminal import printable

__all__ = ["tame", "tame_text"]

_MOST = 2 << 20  # characters of HTML in a frame
_LINE, _LEAST, _TALLEST = 24, 72, 600  # pixels
_PICTURES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
_HEAD = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
_ROWS = re.compile(r"<(?:tr|br|p|li|div|h\d|pre)\b|\n", re.IGNORECASE)
# What a terminal is told but for colours, and progress bars' ways: the start of the line, and one back.
_COLOUR = re.compile("(\x1b\\[[0-9;]*m|\r\n?|\b)")


def tame_text(text: str) -> str:
    """Return what was printed without what a terminal, or a page, takes for more than text and colours."""
    parts = _COLOUR.split(text)
    return "".join(part if index % 2 else printable(part) for index, part in enumerate(parts))


def tame(data: dict[str, Any], metadata: dict[str, Any], whose: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a display's data and metadata as they may be shown.

    Args:
        data: By MIME type.
        metadata: Of them.
        whose: Name of the session, for the line that says what is not shown.
    """
    found: dict[str, Any] = {}
    hidden = []
    for kind, content in data.items():
        if kind == "text/plain":
            found[kind] = tame_text(str(content))
        elif kind in _PICTURES and _is_picture(content, _PICTURES[kind]):
            found[kind] = content
        elif kind == "text/html" and isinstance(content, str) and len(content) <= _MOST:
            found[kind] = _frame(content)
        elif kind == "image/svg+xml" and isinstance(content, str) and len(content) <= _MOST:
            found.setdefault("text/html", _as_picture(content))
        else:
            hidden.append(kind)
    if hidden:
        names = ", ".join(printable(str(kind))[:60] for kind in hidden[:5])
        note = f"not shown of {whose}: {names}; trust_output=True (--trust-output) shows all that it sends"
        found["text/plain"] = "\n".join(part for part in (found.get("text/plain", ""), f"[{note}]") if part)
        if "text/html" in found:
            found["text/html"] += f"<div><small>[{escape(note)}]</small></div>"
    kept = {kind: _sizes(metadata.get(kind)) for kind in _PICTURES if kind in found}
    return found, {kind: sizes for kind, sizes in kept.items() if sizes}


def _is_picture(content: Any, magic: bytes) -> bool:
    """Tell whether it is a picture's bytes in base64, as a page shows it."""
    if not isinstance(content, str):
        return False
    try:
        return base64.b64decode("".join(content.split()), validate=True).startswith(magic)
    except (binascii.Error, ValueError):
        return False


def _as_picture(svg: str) -> str:
    """Return an SVG as a picture, which runs and loads nothing."""
    data = base64.b64encode(svg.encode("utf-8", "replace")).decode()
    return f'<img style="max-width:100%" src="data:image/svg+xml;base64,{data}">'


def _frame(html: str) -> str:
    """Return HTML inside a frame of its own."""
    tall = min(_TALLEST, max(_LEAST, _LINE * (len(_ROWS.findall(html)) + 2)))
    style = f"width:100%;height:{tall}px;border:0;resize:vertical;background:#fff"
    return f'<iframe sandbox="" referrerpolicy="no-referrer" style="{style}" srcdoc="{escape(_HEAD + html)}"></iframe>'


def _sizes(metadata: Any) -> dict[str, int]:
    """Return width and height in pixels."""
    if not isinstance(metadata, dict):
        return {}
    return {name: metadata[name] for name in ("width", "height") if type(metadata.get(name)) is int}
