"""What a server says of remote cells, read by the client."""

from __future__ import annotations

from typing import Any

import pytest

from rpcnb.client.answers import load_json
from rpcnb.client.cells import CellResult, read_output
from rpcnb.errors import CellError, RemoteProtocolError
from rpcnb.protocol.records import Emitted, read_records, write_record

GOOD: dict[str, Any] = {"data": {"text/plain": "42"}, "metadata": {}, "seconds": 0.1, "error": None}


def test_a_result_shows_itself_in_every_form() -> None:
    result = CellResult.decode(GOOD)
    assert repr(result) == "42"
    assert result._repr_mimebundle_() == ({"text/plain": "42"}, {})
    assert repr(CellResult.decode({**GOOD, "data": {}})) == ""


def test_an_error_shows_the_remote_traceback() -> None:
    error = {"type": "ValueError", "text": "boom", "traceback": 'Traceback:\n  File "<In[3]>"\nValueError: boom\n'}
    with pytest.raises(CellError, match=r"^ValueError: boom$") as caught:
        CellResult.decode({**GOOD, "error": error})
    assert caught.value._render_traceback_() == ["Traceback:", '  File "<In[3]>"', "ValueError: boom"]
    assert CellError("", "KeyboardInterrupt")._render_traceback_() == ["KeyboardInterrupt"]


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {},
        {**GOOD, "data": 3},
        {**GOOD, "seconds": "x"},
        {**GOOD, "seconds": 10**400},
        {**GOOD, "error": {"type": "E"}},
    ],
)
def test_anything_else_is_the_peers_mistake(found: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="expected the outcome of a cell"):
        CellResult.decode(found)


@pytest.mark.parametrize(
    "piece", [None, 3, {}, {"stream": "stdin", "text": ""}, {"display": 3}, {"display": {}, "metadata": 5}]
)
def test_output_must_be_of_a_kind(piece: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="expected output of a remote cell"):
        read_output(piece)


@pytest.mark.parametrize("data", [b"\xff", "{", None, "[" * 100000])
def test_json_must_be_json(data: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="expected JSON"):
        load_json(data)


def test_output_travels_as_a_record() -> None:
    assert read_records(write_record(7, Emitted(b"x"))) == [(7, Emitted(b"x"))]
