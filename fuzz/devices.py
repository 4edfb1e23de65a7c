"""A tracker's summary, whatever the tracker and the boards in it say, as the tables that people read."""

from __future__ import annotations

from fuzz.promises import bounded
from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.devices import show_devices
from rpcnb.farm.messages import GREETING, NOTHING, Frames, ask_summary

__all__ = ["one_input"]


def one_input(data: bytes) -> None:
    """Read an answer to the question for the summary, and show it."""
    with bounded(len(data)):
        frames, flow = Frames(), ask_summary()
        next(flow)
        try:
            frames.receive_data(GREETING + data)
            if (value := frames.next_value()) is not NOTHING:
                flow.send(value)
        except RemoteProtocolError:
            pass
        except StopIteration as end:
            show_devices(end.value)
