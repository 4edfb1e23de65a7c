"""What a device puts out, as a notebook may show it: nothing of it runs as the user."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html import unescape
from typing import Any

import pytest

import rpcnb
from rpcnb.client.cells import CellOutput, CellResult
from rpcnb.client.untrusted import tame, tame_text
from rpcnb.link import hosts

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n and more").decode()
JPEG = base64.b64encode(b"\xff\xd8\xff and more").decode()
SCRIPT = "<script>parent.document.title = 'owned'</script>"


def shown(**data: Any) -> dict[str, Any]:
    named = {name.replace("_", "/", 1).replace("__", "+"): value for name, value in data.items()}
    return tame(named, {}, "bench")[0]


def test_text_and_pictures_are_shown_as_they_are() -> None:
    data = {"text/plain": "42", "image/png": PNG, "image/jpeg": f"{JPEG[:8]}\n{JPEG[8:]}"}
    metadata = {"image/png": {"width": 30, "height": "x", "onload": "evil()"}, "text/html": {"isolated": True}}
    assert tame(data, metadata, "bench") == (data, {"image/png": {"width": 30}})
    assert tame(data, {"image/png": 5}, "bench")[1] == {}


@pytest.mark.parametrize("content", ['"><script>', base64.b64encode(b"GIF89a").decode(), "%%%", 5, None, [PNG]])
def test_what_is_no_picture_is_not_shown_as_one(content: Any) -> None:
    found = shown(image_png=content)
    assert list(found) == ["text/plain"]
    assert "not shown of bench: image/png" in found["text/plain"]


@pytest.mark.parametrize(
    "html",
    [
        SCRIPT,
        "</iframe>" + SCRIPT,
        '"></iframe>' + SCRIPT,
        "<img src=x onerror=\"parent.alert('owned')\">",
        "<a href='javascript:alert(1)'>click</a>",
        "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
        "' onload='alert(1)",
        "<svg onload=alert(1)>",
    ],
)
def test_html_stands_in_a_frame_that_runs_nothing(html: str) -> None:
    found = shown(text_html=html)["text/html"]
    frame = re.fullmatch(
        r'<iframe sandbox="" referrerpolicy="no-referrer" style="[^"<>]*" srcdoc="([^"<>]*)"></iframe>', found
    )
    assert frame, "no way out of the attribute"
    inner = unescape(frame[1])
    assert inner.endswith(html)
    assert "default-src 'none'" in inner


def test_svg_is_a_picture() -> None:
    svg = f"<svg>{SCRIPT}</svg>"
    found = shown(image_svg__xml=svg)
    assert re.fullmatch(r'<img style="max-width:100%" src="data:image/svg\+xml;base64,[\w+/=]*">', found["text/html"])
    assert base64.b64encode(svg.encode()).decode() in unescape(found["text/html"])
    assert "table" in shown(image_svg__xml=svg, text_html="<table>")["text/html"], "HTML is what was wanted"


@pytest.mark.parametrize(
    "kind",
    [
        "application/javascript", "text/markdown", "text/latex", "application/vnd.jupyter.widget-view+json",
        "application/vnd.plotly.v1+json", "application/json", "\x1b]52;c;evil\x07",
    ],
)  # fmt: skip
def test_everything_else_is_named_and_not_shown(kind: str) -> None:
    found, _ = tame({kind: SCRIPT, "text/plain": "chart"}, {}, "bench")
    assert list(found) == ["text/plain"]
    assert found["text/plain"].startswith("chart\n[not shown of bench: ")
    assert "trust_output=True" in found["text/plain"]
    assert "owned" not in found["text/plain"]
    assert "\x1b" not in found["text/plain"]
    beside, _ = tame({kind: SCRIPT, "text/html": "<b>x</b>"}, {}, "<i>bench</i>")
    assert "not shown of &lt;i&gt;bench" in beside["text/html"]


def test_what_is_huge_is_named() -> None:
    assert "not shown of bench: text/html" in shown(text_html="x" * (3 << 20))["text/plain"]
    assert "600px" in shown(text_html="<tr>" * 1000)["text/html"]
    assert "72px" in shown(text_html="x")["text/html"]


def test_printed_text_keeps_colours_and_progress_bars_alone() -> None:
    text = "\x1b[1;31mred\x1b[0m 50 %\r 51 %\b\n\ttab \u00e9"
    assert tame_text(text) == text
    assert tame_text("\x1b]52;c;evil\x07\x1b[2J\x1b[?1049h\u202e") == (r"\x1b]52;c;evil\x07\x1b[2J\x1b[?1049h\u202e")


def test_pieces_and_results_of_those_who_are_not_trusted_are_tamed() -> None:
    piece = CellOutput("display", "", {"text/html": SCRIPT})
    assert "sandbox" in piece.shown("bench").data["text/html"]
    assert CellOutput("stdout", "\x1b]0;x\x07").shown("bench").text == r"\x1b]0;x\x07"
    result = CellResult({"text/html": SCRIPT, "text/plain": "\x1b]0;x\x07"}, {}, 0.1, "bench")
    assert "sandbox" in result._repr_mimebundle_()[0]["text/html"]
    assert repr(result) == r"\x1b]0;x\x07"
    assert CellResult({"text/html": SCRIPT}, {}, 0.1)._repr_mimebundle_() == ({"text/html": SCRIPT}, {})
    assert result.data["text/html"] == SCRIPT, "for programs it is what was sent"


def test_who_is_trusted(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(allow_exec=True, insecure=True)
    with rpcnb.connect(server.address) as session:
        assert not session.trust_output
        assert session.run_cell("1 + 1").whose == session.name
        session.trust_output = True
        assert session.run_cell("1 + 1").whose == ""
    with rpcnb.connect(server.address, trust_output=True) as session:
        assert session.trust_output
    for kind, trusted in (("demo", True), ("kernel", True), ("", False)):
        monkeypatch.setattr(hosts, "find_own", lambda *_, kind=kind: {"kind": kind})
        with rpcnb.connect(server.address) as session:
            assert session.trust_output is trusted
    with rpcnb.connect(server.address, trust_output=False) as session:
        assert not session.trust_output
    with rpcnb.LocalSession() as session:
        assert session.trust_output
