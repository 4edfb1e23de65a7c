"""F2 and F3: every recorded packet truncated at every byte, and with every bit flipped once."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from recorded import CLIENT, data_plane, packets, steps

from rpcnb.errors import RemoteProtocolError, RpcError
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint, State
from rpcnb.protocol.handshake import Handshake
from rpcnb.protocol.messages import CallFunc, CopyFromRemote, CopyToRemote, Malformed, Message
from rpcnb.values import CPU, DType, TensorMeta

META = TensorMeta(1, CPU, (4,), DType(0, 8))
LARGEST_BUFFER = 256 << 10  # bytes an endpoint may hold for a damaged packet
WHOLE = 200  # bytes of a packet up to which every bit is flipped; of a longer one every 7th


def unique(sender: str) -> list[bytes]:
    """Return each different packet of one side once."""
    return sorted({step.data for name in data_plane() for step in packets(name, sender) if len(step.data) > 8})


def endpoint_for(sender: str, data: bytes) -> Endpoint:
    """Return a fresh endpoint that may receive such a packet."""
    if sender == CLIENT:
        return Endpoint(Role.SERVER)
    endpoint = Endpoint(Role.CLIENT)
    ack = data[8:12] == b"\x08\0\0\0"
    endpoint.send(CopyFromRemote(META, len(data) - 12) if ack else CallFunc(1))
    return endpoint


def read(endpoint: Endpoint, data: bytes) -> Message | RpcError | None:
    """Feed damaged bytes; only typed outcomes are let through."""
    endpoint.receive_data(data)
    try:
        message = endpoint.next_message()
    except RpcError as error:
        assert endpoint.state is State.CLOSED
        return error
    if isinstance(message, Malformed):
        assert isinstance(message.error, RpcError)
    if isinstance(message, CopyToRemote):
        endpoint.receive_payload(None)
    assert len(endpoint.get_buffer()) <= LARGEST_BUFFER
    return message


def flips(data: bytes) -> Iterator[bytes]:
    for bit in range(0, len(data) * 8, 1 if len(data) <= WHOLE else 7):
        out = bytearray(data)
        out[bit // 8] ^= 1 << bit % 8
        yield bytes(out)


@pytest.mark.parametrize("sender", ["client", "server"])
def test_a_truncated_packet_waits_and_its_end_is_an_error(sender: str) -> None:
    for data in unique(sender):
        for cut in range(1, len(data)):
            endpoint = endpoint_for(sender, data)
            found = read(endpoint, data[:cut])
            assert found is None or isinstance(found, CopyToRemote)
            endpoint.receive_eof()
            with pytest.raises(RemoteProtocolError, match="ended inside a packet"):
                endpoint.next_message()


@pytest.mark.parametrize("sender", ["client", "server"])
def test_a_packet_whose_body_is_cut_short_is_answered_or_refused(sender: str) -> None:
    for data in unique(sender):
        for cut in range(1, len(data) - 8):
            found = read(endpoint_for(sender, data), struct.pack("<Q", cut) + data[8 : 8 + cut])
            assert found is not None


@pytest.mark.parametrize("sender", ["client", "server"])
def test_a_flipped_bit_ends_in_a_message_a_typed_error_or_waiting(sender: str) -> None:
    for data in unique(sender):
        for damaged in flips(data):
            read(endpoint_for(sender, data), damaged)


def test_a_damaged_handshake_is_read_waits_or_is_refused() -> None:
    frames = {b"".join(step.data for step in steps(name)[:2]) for name in data_plane()}
    for data in frames:
        for damaged in (*flips(data), *(data[:cut] for cut in range(len(data)))):
            handshake = Handshake()
            try:
                found = handshake.receive_data(damaged)
            except RemoteProtocolError:
                continue
            assert found is None or isinstance(found, (str, int))
