"""Makes the committed corpora, of the recorded vectors and of our own: ``python -m fuzz.corpora``."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.client import OPERATIONS
from fuzz.servant import Conversation
from rpcnb.farm.messages import GREETING
from rpcnb.protocol.codes import MAGIC, Code
from rpcnb.protocol.handshake import hello
from rpcnb.protocol.messages import CallFunc, InitServer, Message, Raised, Return, Shutdown, Syscall, encode_packet
from rpcnb.protocol.records import Emitted, write_record
from rpcnb.values import CPU, DType, Pointer, TensorMeta

__all__ = ["make"]

_HERE = Path(__file__).parent
_VECTORS = _HERE.parent / "tests" / "vectors"
_LONGEST = 4096  # bytes of a conversation that is worth keeping
_INIT = 2  # frames of a handshake
_PIECES = 37  # an irregular cut


def _packets(*messages: Message) -> bytes:
    return b"".join(bytes(part) for message in messages for part in encode_packet(message))


def _recordings(start: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for path in sorted(_VECTORS.glob(f"{start}*.json")):
        yield path.stem, [step for step in json.loads(path.read_text()).get("steps", ()) if step["hex"]]


def _conversations() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, steps in _recordings():
        if not name.startswith(("tracker_", "proxy_")):
            yield name, steps


def _segment(head: int, data: bytes) -> bytes:
    return struct.pack("<BH", head, len(data)) + data


# -- servant ---------------------------------------------------------------------------------------------------------


def _replayed(steps: list[dict[str, Any]]) -> bytes:
    """Return what the recorded client said, with our handles in the place of the recorded ones."""
    conversation, known = Conversation(0), dict[bytes, bytes]()
    said, answered = bytearray(), 0
    for step in steps[2:]:
        data = bytearray.fromhex(step["hex"])
        places = [start for start, size in step.get("volatile", ()) if size == 8]
        if step["from"] == "client":
            for start in places:
                data[start : start + 8] = known.get(bytes(data[start : start + 8]), bytes(data[start : start + 8]))
            said += data
            conversation.feed(bytes(data))
        elif step["from"] == "server" and len(data) > 8:
            ours = conversation.sent[answered : answered + len(data)]
            answered += len(data)
            for start in places:
                known[bytes(data[start : start + 8])] = bytes(ours[start : start + 8])
    conversation.finish()
    return bytes(said)


def _ours() -> Iterator[tuple[str, bytes]]:
    """Yield what rpcnb's own client says: calls that are started, cells, files in parts."""
    names = ("rpcnb.start", "rpcnb.next", "rpcnb.cancel", "rpcnb.cancel_at", "later", "parked", "echo", "adder")
    more = ("rpcnb.put", "rpcnb.get", "rpcnb.size", "rpcnb.digest", "rpcnb.status", "rpcnb.cell", "rpcnb.cells")
    conversation = Conversation(2)
    said = bytearray()

    def say(message: Message) -> bytes:
        data, before = _packets(message), len(conversation.sent)
        said.extend(data)
        conversation.feed(data)
        return bytes(conversation.sent[before:])

    say(InitServer())
    handles = {}
    for name in (*names, *more):
        answer = say(Syscall(Code.GET_GLOBAL_FUNC, (name,)))
        handles[name] = int.from_bytes(answer[20:28], "little")
    looked_up = len(said)
    start, following = handles["rpcnb.start"], CallFunc(handles["rpcnb.next"], ())
    say(CallFunc(start, (1, 0.0, handles["later"], 5)))
    say(CallFunc(start, (2, 1.5, handles["parked"], "x")))
    say(following)
    say(CallFunc(handles["rpcnb.cancel"], (2,)))
    say(following)
    say(CallFunc(handles["rpcnb.cancel_at"], (0, 3, 4)))
    yield "started", bytes(said)
    del said[looked_up:]
    say(CallFunc(handles["rpcnb.put"], ("file", 8, 0, b"somedata")))
    for name, args in (("get", ("file", 0, 8)), ("size", ("file",)), ("digest", ("file", 8)), ("status", ())):
        say(CallFunc(handles[f"rpcnb.{name}"], args))
    say(CallFunc(handles["rpcnb.cell"], ("1 + 1", "cell")))
    say(CallFunc(handles["adder"], (1,)))
    say(CallFunc(handles["echo"], (DType(2, 32), CPU, b"x" * 40, "text", None, True, 2.5)))
    yield "own", bytes(said) + _packets(Shutdown())


def _servant() -> Iterator[tuple[str, bytes]]:
    for name, steps in _conversations():
        said = _replayed(steps)
        if 0 < len(said) <= _LONGEST:
            yield name, bytes([len(name) & 4, len(name) % 3 * _PIECES]) + said
    for name, said in _ours():
        yield name, bytes([2, 0]) + said
    yield "toinit", bytes([1, 1]) + hello("client:k -timeout=3 -rpcnb=1.0")[4:] + _packets(InitServer(), Shutdown())


# -- client ----------------------------------------------------------------------------------------------------------


def _client() -> Iterator[tuple[str, bytes]]:
    handle, void = _packets(Return((Pointer(0x100000002),))), _packets(Return())

    def returns(*values: Any) -> bytes:
        return _packets(Return(values))

    ack = struct.pack("<Qi", 404, 8) + bytes(400)
    cell = {"data": {"text/plain": "2"}, "metadata": {}, "seconds": 0.1, "error": None, "outputs": []}
    listed = [{"id": 1, "name": "cell", "state": "queued", "age": 0.5, "mine": True}]
    tensor = TensorMeta(0x300000004, CPU, (2, 3), DType(2, 32))
    answers = (
        handle + returns(70, tensor, Pointer(6)) + struct.pack("<Qi", 28, 8) + bytes(24) + returns(68, Pointer(8)),
        handle + void + void + ack + void + void,
        handle + returns(1, 5) + void + returns(1, 7) + handle,
        handle + returns(1, 1) + returns(1, 2) + _packets(Raised("ValueError: no")),
        handle + returns(68, Pointer(10)) + returns(1, 2) + returns(65, "first") + returns(65, "second"),
        handle + void + handle + void + handle + void,
        handle + returns(1, 4) + handle + returns(66, b"data"),
        handle + returns(65, "a,b"),
        handle + returns(73, Pointer(12)) + handle + returns(68, Pointer(14)) + returns(1, 3),
        returns(1),
        handle + returns(68, Pointer(16)) + returns(66, struct.pack("<3d", 1.0, 2.0, 3.0)),
        handle + returns(65, json.dumps(cell)),
        handle + returns(65, json.dumps(listed)),
        handle + returns(66, b"int:1"),
        handle + returns(65, json.dumps([["x", "int"]])),
        handle + returns(65, json.dumps({"state": "READY"})),
        handle + void,
    )
    assert len(answers) == len(OPERATIONS)
    for number, said in enumerate(answers, 1):
        for stock in (0, 0x80):
            yield f"operation-{number}-{'stock' if stock else 'rpcnb'}", bytes([number | stock, number % 3]) + said
    yield "hello", bytes([0, 1]) + hello("server:key -rpcnb=1.0,lanes -session=x")
    yield "mismatch", bytes([0, 0]) + struct.pack("<i", MAGIC + 2)
    for name, steps in _conversations():
        said = b"".join(bytes.fromhex(step["hex"]) for step in steps[_INIT:] if step["from"] == "server")
        if 0 < len(said) <= _LONGEST // 4:
            yield f"recorded-{name}", bytes([1 + len(name) % len(OPERATIONS), _PIECES]) + said


# -- the others ------------------------------------------------------------------------------------------------------


def _records() -> Iterator[tuple[str, bytes]]:
    output = json.dumps({"stream": "stdout", "text": "hi\n"}).encode()
    shown = json.dumps({"display": {"text/plain": "3"}, "metadata": {}}).encode()
    outcomes: tuple[Return | Raised | Emitted, ...] = (
        Return((1, 5)),
        Return((65, "text of some length")),
        Return((70, TensorMeta(8, CPU, (2, 3), DType(2, 32)), Pointer(9))),
        Raised("boom", "ValueError", "Traceback ..."),
        Emitted(output),
        Emitted(shown),
    )
    for number, outcome in enumerate(outcomes):
        yield f"outcome-{number}", write_record(number, outcome)
    cell = {"data": {"text/plain": "2"}, "metadata": {}, "seconds": 10**400, "error": None}
    yield "cell", write_record(1, Emitted(json.dumps(cell).encode()))
    yield "all", b"".join(write_record(number, outcome) for number, outcome in enumerate(outcomes))


def _tracker() -> Iterator[tuple[str, bytes]]:
    for name, steps in _recordings("tracker_"):
        for side in ("client", "server"):
            said = [bytes.fromhex(step["hex"]) for step in steps if step["from"] == side]
            if said and sum(map(len, said)) <= _LONGEST:
                yield f"{name}-{side}", b"".join(_segment(number % 2, data) for number, data in enumerate(said))
                yield f"{name}-{side}-alone", b"".join(_segment(0, data) for data in said)
        answers = [bytes.fromhex(step["hex"]) for step in steps if step["from"] == "tracker"][1:]
        if answers and sum(map(len, answers)) <= _LONGEST:
            yield f"{name}-answers", b"".join(_segment(3 << 2, data) for data in answers)

    def frame(value: Any) -> bytes:
        data = json.dumps(value).encode()
        return struct.pack("<i", len(data)) + data

    info = {"key": "server:k", "addr": [None, 9090], "rpcnb": {"instance": "x", "sessions": [{"peer": "p"}]}}
    ours = {"rpcnb": "1.0"}
    board = [frame([5, info]), frame([3, "k", [9090, "k:1"], None]), frame([7])]
    client = [frame([4, "k", "me", 2, ours]), frame([4, "k", "me", 1.5, ours]), frame([6, ours])]
    greeted = _segment(0, GREETING) + _segment(1, GREETING) + _segment(2, GREETING)
    talk = b"".join(_segment(0, data) for data in board) + b"".join(_segment(1, data) for data in client)
    yield "farm", greeted + talk + _segment(2 << 2, bytes(6)) + _segment(0, frame([1])) + _segment(1 << 2, b"")
    yield "place", _segment(3 << 2, frame([100, {"place": 1, "of": 2}]) + frame([0, ["h", 9090, "k:1"]]))
    yield "stop", _segment(0, GREETING) + _segment(0, frame([2, "guess"])) + _segment(0, frame([2, "\ud800"]))
    yield "number", _segment(0, GREETING) + _segment(0, frame([4, "k", "", 10**400]))


def _devices() -> Iterator[tuple[str, bytes]]:
    told = {"instance": "x", "sessions": [{"peer": "p", "limit": 60.0}, {"peer": "q", "limit": None}]}
    info = {"key": "server:k", "addr": ["10.0.0.1", 9090], "rpcnb": told}
    holders = [{"name": "me", "key": "k", "since": 1.5}]
    board = {"key": ["k"], "addr": ["10.0.0.1", 9090], "state": "busy", "free": 0, "holders": holders, "rpcnb": told}
    summary = {"queue_info": {"k": {"free": 1, "pending": 0}}, "server_info": [info]}
    for name, value in (("stock", summary), ("ours", {**summary, "boards": [board]})):
        data = json.dumps([0, value]).encode()
        yield name, struct.pack("<i", len(data)) + data
    for name, steps in _recordings("tracker_"):
        for number, step in enumerate(steps):
            if step["from"] == "tracker" and b"queue_info" in bytes.fromhex(step["hex"]):
                yield f"{name}-{number}", bytes.fromhex(step["hex"])


def _proxy() -> Iterator[tuple[str, bytes]]:
    server, client = b"server:k", b"client:k -timeout=5"
    for tracked in (0, 1):
        yield f"pair-{tracked}", bytes([tracked]) + _segment(0, hello(server.decode())) + _segment(1, hello("client:k"))
        talk = _segment(3 << 2, server) + _segment(3 << 2 | 1, client) + _segment(3 << 2 | 2, server)
        yield f"keys-{tracked}", bytes([tracked]) + talk + _segment(2 << 2 | 3, b"") + _segment(1 << 2, b"")
    for name, steps in _recordings("proxy_"):
        said = [bytes.fromhex(step["hex"]) for step in steps if step["from"] in ("client", "server")][:6]
        yield name, b"\0" + b"".join(_segment(number % 2, data[:300]) for number, data in enumerate(said))


def _websocket() -> Iterator[tuple[str, bytes]]:
    payload = hello("client:k") + _packets(InitServer())
    for side, key in ((0, b"\1\2\3\4"), (1, b"")):
        mask = 0x80 if key else 0

        def frame(opcode: int, data: bytes, mask: int = mask, key: bytes = key) -> bytes:
            size = len(data)
            head = struct.pack(">BB", opcode, mask | (size if size < 126 else 126))
            head += struct.pack(">H", size) if size > 125 else b""
            return head + key + (bytes(b ^ key[i % 4] for i, b in enumerate(data)) if key else data)

        whole = frame(0x82, payload)
        yield f"binary-{side}", bytes([side, 1]) + whole
        yield (
            f"parts-{side}",
            bytes([side, 5]) + frame(0x02, payload[:9]) + frame(0x89, b"?") + frame(0x80, payload[9:]),
        )
        yield f"long-{side}", bytes([side, _PIECES]) + frame(0x82, payload * 9) + frame(0x8A, b"") + whole
        yield f"close-{side}", bytes([side, 2]) + whole + frame(0x88, b"\x03\xe8bye") + whole
    for name, steps in _recordings("proxy_ws_server"):
        said = [bytes.fromhex(step["hex"]) for step in steps if "websocket" in step.get("transport", "")]
        yield (
            name,
            bytes([1, 3]) + b"".join(struct.pack(">BB", 0x82, len(data)) + data for data in said if len(data) < 126),
        )


def make(corpora: Path) -> None:
    """Write the corpora anew into a folder."""
    makers = {
        "client": _client,
        "devices": _devices,
        "proxy": _proxy,
        "records": _records,
        "servant": _servant,
        "tracker": _tracker,
        "websocket": _websocket,
    }
    for target, maker in makers.items():
        folder = corpora / target
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, data in maker():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    make(_HERE / "corpus")
