"""Reading the recorded vectors, and a server like the one they were recorded from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rpcnb.runtime.devices import DeviceTensor, Memory
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.registry import Registry
from rpcnb.values import CPU, Device, DType, Pointer

FOLDER = Path(__file__).parent.parent / "vectors"
NOT_DATA_PLANE = ("tracker_", "proxy_", "event_handler")
CLIENT, SERVER = "client", "server"


@dataclass
class Step:
    """One recorded frame: a handshake field, a packet, or (empty) the end of the stream."""

    sender: str
    data: bytes
    decoded: str
    volatile: list[tuple[int, int]] = field(default_factory=list)
    truncated: bool = False

    @property
    def handles(self) -> list[int]:
        """Where the frame holds handles."""
        return [start for start, nbytes in self.volatile if nbytes == 8]

    def masked(self, data: bytes) -> bytes:
        """Return ``data`` without the ranges that differ from run to run."""
        out = bytearray(data)
        for start, nbytes in self.volatile:
            out[start : start + nbytes] = bytes(len(out[start : start + nbytes]))
        return bytes(out)


def data_plane() -> list[str]:
    """Return the names of the recordings of whole RPC connections."""
    return sorted(path.stem for path in FOLDER.glob("*.json") if not path.stem.startswith(NOT_DATA_PLANE))


def load(name: str) -> dict[str, Any]:
    """Return a recording as it is stored."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def steps(name: str) -> list[Step]:
    """Return the frames of a recording, ends of streams left out."""
    return [
        Step(
            step["from"],
            bytes.fromhex(step["hex"]),
            step["decoded"],
            [(start, nbytes) for start, nbytes in step.get("volatile", [])],
            "truncated_from" in step,
        )
        for step in load(name)["steps"]
        if step["hex"]
    ]


def packets(name: str, sender: str) -> Iterator[Step]:
    """Yield the whole packets of one side, behind its handshake."""
    own = [step for step in steps(name) if step.sender == sender]
    yield from (step for step in own[2:] if not step.truncated)


def key_of(name: str) -> str:
    """Return the key text with which the recorded client came."""
    return steps(name)[1].data[4:].decode()


TVM_NAMES = {bytes: "Bytes", DType: "dtype", Pointer: "c_void_p"}


def _describe(*args: Any) -> str:
    return "|".join(TVM_NAMES.get(type(arg), type(arg).__name__) for arg in args)


def _raise(kind: str) -> None:
    raise {"ValueError": ValueError, "KeyError": KeyError}[kind]("boom " + kind)


def _view() -> DeviceTensor:
    data = np.arange(6, dtype="<i4").view(np.uint8)
    return DeviceTensor(Memory(CPU, 24, data), (2,), DType(0, 32), 8)


def recorded_registry(*, chunked: bool = False) -> Registry:
    """Return the functions that the recorder registered in the stock server."""
    registry = Registry()
    results: dict[str, Any] = {
        "vec.true": True,
        "vec.false": False,
        "vec.int": -3,
        "vec.float": 1.5,
        "vec.str0": "",
        "vec.str": "abc",
        "vec.longstr": "a string longer than seven bytes é世",
        "vec.nulstr": "ab\0cd",
        "vec.bytes": b"\x00\x01\x02",
        "vec.longbytes": bytes(range(16)),
        "vec.bytearray": bytearray(b"xyz"),
        "vec.dtype": DType(2, 32),
        "vec.device": Device(1, 0),
        "vec.opaque": Pointer(0x1234),
        "vec.list": [1, "two"],
    }
    for name, result in results.items():
        registry.register(name, lambda result=result: result)
    registry.register("vec.none", lambda *args: None)
    registry.register("vec.tensor", lambda: np.arange(6, dtype="<f4").reshape(2, 3))
    registry.register("vec.view", _view)
    registry.register("vec.fn", lambda: lambda x: x * 2)
    registry.register("vec.sum", lambda tensor: float(tensor.sum()))
    registry.register("vec.describe", _describe)
    registry.register("vec.raise", _raise)
    if chunked:
        registry.register("tvm.rpc.server.GetCRTMaxPacketSize", lambda: 100)
    return registry


def recorded_environment(name: str) -> Environment:
    """Return what the server of a recording had."""
    return Environment(registry=recorded_registry(chunked=name == "copy_chunked"))


__all__ = [
    "CLIENT",
    "SERVER",
    "Step",
    "data_plane",
    "key_of",
    "load",
    "packets",
    "recorded_environment",
    "recorded_registry",
    "steps",
]
