"""What of detached jobs is in the sessions that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runtime_wire import Client

from rpcnb.cells.cells import run_source
from rpcnb.protocol.messages import CallFunc, Raised, Shutdown
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.files import SessionFiles
from rpcnb.runtime.parcel import pack, unpack
from rpcnb.runtime.registry import Registry


def test_questions_go_to_who_has_the_jobs_and_back(registry: Registry) -> None:
    asked: list[Any] = []

    def jobs(words: dict[str, Any], data: bytes, answer: Any) -> None:
        asked.append((words, data))
        answer({"state": "fine"}, b"bytes")

    client = Client(Environment(registry=registry, jobs=jobs))
    _, data = client.call("rpcnb.jobs", pack([{"op": "list"}, b"x"]))
    assert unpack(bytes(data))  # type: ignore[arg-type]  # bytes == [{"state": "fine"}, b"bytes"]
    assert asked == [({"op": "list"}, b"x")]
    client.send(Shutdown())


def test_without_jobs_there_is_no_such_function(registry: Registry) -> None:
    client = Client(Environment(registry=registry))
    assert not client.local.get_function("rpcnb.jobs")
    client.send(Shutdown())


def test_a_visitor_finds_no_functions(registry: Registry) -> None:
    registry.register("mine", lambda: 1)
    client = Client(Environment(registry=registry, visitor="taken by the job 'x'"))
    from rpcnb.protocol.codes import Code
    from rpcnb.protocol.messages import Syscall

    answer = client.ask(Syscall(Code.GET_GLOBAL_FUNC, ("mine",)))
    assert isinstance(answer, Raised)
    assert "taken by the job 'x'; until it ends only session.jobs" in answer.text
    assert client.local.get_function("rpcnb.status")
    client.send(Shutdown())


def test_files_that_are_kept_stay(tmp_path: Path) -> None:
    files = SessionFiles()
    files.keep_at(tmp_path / "files")
    files.write("a", b"content")
    files.close()
    assert (tmp_path / "files" / "a").read_bytes() == b"content"


def test_a_cell_of_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_source("x = 2\nprint(x)\nx * 3", "<job>", {}) == 6
    assert capsys.readouterr().out == "2\n"
    with pytest.raises(EOFError):
        run_source("input()", "<job>", {})


@pytest.mark.parametrize(
    "question",
    [pack([1, b""]), pack([{}, 1]), pack([{}]), b"nothing", pack([{"op": "x" * (1 << 20)}, b""])],
)
def test_wrong_questions_are_answered_with_an_error(registry: Registry, question: bytes) -> None:
    client = Client(Environment(registry=registry, jobs=lambda words, data, answer: None))
    handle = client.local.get_function("rpcnb.jobs")
    assert isinstance(client.ask(CallFunc(int(handle), (question,))), Raised)
    client.send(Shutdown())
