"""Devices and their memory, through the wire where a client sees them."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runtime_wire import Client

from rpcnb.errors import CopyMismatch, DeviceError
from rpcnb.protocol.codes import Code, Limits
from rpcnb.protocol.messages import CallFunc, CopyFromRemote, CopyToRemote, Return, Shutdown, Syscall
from rpcnb.runtime import devices
from rpcnb.runtime.devices import ATTRIBUTES, DeviceAPI, DeviceTensor, Memory, find_device
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.registry import Registry
from rpcnb.values import CPU, NULL, Device, DType, Pointer, TensorMeta, dtype

CUDA, FPGA = Device(2), Device(12)
VOID = Return((None,))


class Board(DeviceAPI):
    """A plug-in device whose copies and waits end when the test says so."""

    device_type = 12
    made: list[Board] = []  # noqa: RUF012  # emptied by the fixture

    def __init__(self) -> None:
        self.pending: list[Any] = []
        self.freed: list[Memory] = []
        self.log: list[Any] = []
        self.current: Any = None
        self.waits = False
        self.fails = ""
        Board.made.append(self)

    def exists(self, index: int) -> bool:
        return index == 0

    def attribute(self, index: int, name: str) -> int | str | None:
        known: dict[str, int | str] = {"device_name": "board", "warp_size": 4}
        return known.get(name)

    def allocate(self, device: Device, nbytes: int, alignment: int, scope: str) -> Memory:
        self.log.append((nbytes, alignment, scope))
        return Memory(device, nbytes, bytearray(nbytes))

    def free(self, memory: Memory) -> None:
        self.freed.append(memory)
        if self.fails == "free":
            raise OSError("the board does not answer")

    def _later(self, act: Any, done: Any) -> None:
        if self.fails == "copy":
            raise OSError("the board does not answer")

        def finish(error: BaseException | None = None) -> None:
            if error is None:
                act()
            done(error)

        if self.waits:
            self.pending.append(finish)
        else:
            finish()

    def copy_in(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Any) -> None:
        def act() -> None:
            memory.storage[start : start + len(data)] = data

        self._later(act, done)

    def copy_out(self, memory: Memory, start: int, data: memoryview, stream: Any, done: Any) -> None:
        def act() -> None:
            data[:] = memory.storage[start : start + len(data)]

        self._later(act, done)

    def copy_among(self, source: Memory, start: int, target: Memory, at: int, nbytes: int, stream: Any) -> None:
        target.storage[at : at + nbytes] = source.storage[start : start + nbytes]
        self.log.append(stream)

    def create_stream(self, device: Device) -> Any:
        return SimpleNamespace(name="stream")

    def free_stream(self, device: Device, stream: Any) -> None:
        self.log.append(("freed", stream))

    def set_stream(self, device: Device, stream: Any) -> None:
        self.current = stream

    def current_stream(self, device: Device) -> Any:
        return self.current

    def synchronize(self, device: Device, stream: Any, done: Any) -> None:
        self._later(lambda: self.log.append(("waited", stream)), done)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the plug-in."""
    monkeypatch.setattr(devices, "_APIS", {1: devices._APIS[1]})

    def points(**which: Any) -> list[Any]:
        assert which["group"] == "rpcnb.devices"
        loads = {"ext_dev": Board, "metal": object}
        name = which["name"]
        return [SimpleNamespace(value=f"plug:{name}", load=lambda: loads[name])] if name in loads else []

    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    yield
    Board.made.clear()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.send(Shutdown())


def the_board() -> Board:
    (found,) = Board.made
    return found


# -- finding devices -------------------------------------------------------------------------------------------------


def test_an_absent_device_type_is_refused_with_stocks_words() -> None:
    for device, name in ((CUDA, "cuda"), (Device(77), "device77")):
        with pytest.raises(DeviceError) as caught:
            find_device(device)
        assert str(caught.value) == f"Check failed: (allow_missing) is false: Device API {name} is not enabled."


@pytest.mark.usefixtures("board")
def test_a_plug_in_is_loaded_once_when_a_client_names_it() -> None:
    assert Board.made == []
    assert find_device(FPGA) is find_device(Device(12, 3)) is the_board()


@pytest.mark.usefixtures("board")
def test_a_plug_in_that_is_no_device_api_is_named() -> None:
    with pytest.raises(DeviceError, match=r"entry point plug:metal of rpcnb\.devices is not a DeviceAPI"):
        find_device(Device(8))


def test_the_base_class_refuses_what_it_cannot_do_and_needs_no_streams() -> None:
    done: list[Any] = []
    api, memory = DeviceAPI(), Memory(CUDA, 4, None)
    for act in (
        lambda: api.allocate(CUDA, 1, 1, "global"),
        lambda: api.copy_in(memory, 0, memoryview(b""), None, done.append),
        lambda: api.copy_out(memory, 0, memoryview(b""), None, done.append),
        lambda: api.copy_among(memory, 0, memory, 0, 0, None),
    ):
        with pytest.raises(DeviceError, match="device cuda:0 cannot"):
            act()
    api.free(memory)
    api.set_device(CUDA)
    assert api.exists(3)
    api.free_stream(CUDA, None)
    api.set_stream(CUDA, None)
    api.synchronize(CUDA, None, done.append)
    assert done == [None]
    assert api.exists(5)
    assert api.attribute(0, "warp_size") is None
    assert api.direct(memory, 0, 1) is None
    assert api.create_stream(CUDA) is None
    assert api.current_stream(CUDA) is None


# -- attributes ------------------------------------------------------------------------------------------------------


def ask_attribute(client: Client, device: Device, kind: int) -> Any:
    return client.values(Syscall(Code.DEV_GET_ATTR, (device, kind)))[0]


def test_the_cpu_answers_existence_and_ram_as_stock_does(client: Client) -> None:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    expected = {0: 1, 14: ram}
    for kind in range(len(ATTRIBUTES)):
        assert ask_attribute(client, Device(1, 5), kind) == expected.get(kind)


def test_an_absent_device_does_not_exist_and_has_no_attributes(client: Client) -> None:
    assert ask_attribute(client, CUDA, 0) == 0
    assert client.error(Syscall(Code.DEV_GET_ATTR, (CUDA, 1))).text == (
        "Check failed: (allow_missing) is false: Device API cuda is not enabled."
    )


@pytest.mark.parametrize("kind", [-1, 17])
def test_an_unknown_attribute_is_refused(client: Client, kind: int) -> None:
    text = client.error(Syscall(Code.DEV_GET_ATTR, (CPU, kind))).text
    assert text == f"device attribute {kind} is unknown; expected 0 to 16"


@pytest.mark.usefixtures("board")
def test_a_plug_in_answers_for_its_own_indices(client: Client) -> None:
    assert ask_attribute(client, FPGA, 0) == 1
    assert ask_attribute(client, Device(12, 1), 0) == 0
    assert ask_attribute(client, FPGA, 5) == "board"
    assert ask_attribute(client, FPGA, 2) == 4


# -- CPU memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7)])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float32x4", "int4", "bfloat16", "bool"])
def test_memory_is_allocated_written_and_read(client: Client, shape: tuple[int, ...], kind: str) -> None:
    meta = client.tensor(shape, kind)
    assert meta.data != 0
    data = bytes(index % 251 for index in range(meta.nbytes))
    if data:
        assert client.write(meta, data) == VOID
        assert client.read(meta) == data
    assert client.free_data(meta) == VOID
    assert "was freed before" in client.error(Syscall(Code.DEV_FREE_DATA, (CPU, Pointer(meta.data)))).text


def test_plain_bytes_are_allocated_and_a_negative_size_is_refused(client: Client) -> None:
    (data,) = client.values(Syscall(Code.DEV_ALLOC_DATA, (CPU, 100, 64, DType(0, 0, 0))))
    assert isinstance(data, Pointer)
    assert client.write(TensorMeta(int(data), CPU, (100,), dtype("uint8")), bytes(100)) == VOID
    text = client.error(Syscall(Code.DEV_ALLOC_DATA, (CPU, -1, 64, DType(0, 0, 0)))).text
    assert text == "cannot allocate -1 bytes"


@pytest.mark.parametrize("alignment", [0, 1, 64, 256, 4096])
def test_memory_is_aligned_to_at_least_64_bytes(alignment: int) -> None:
    memory = find_device(CPU).allocate(CPU, 10, alignment, "global")
    assert memory.storage.ctypes.data % max(64, alignment) == 0


def test_more_memory_than_there_is_is_an_error(client: Client) -> None:
    text = client.error(Syscall(Code.DEV_ALLOC_DATA, (CPU, 1 << 62, 64, DType(0, 0, 0)))).text
    assert text == f"cannot allocate {1 << 62} bytes on cpu:0"


@pytest.mark.parametrize("scope", [None, "", "global"])
def test_the_global_scope_is_accepted(client: Client, scope: str | None) -> None:
    meta = TensorMeta(0, CPU, (4,), dtype("uint8"))
    assert client.values(Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (meta, scope)))[0]


def test_another_scope_is_refused_with_stocks_words(client: Client) -> None:
    meta = TensorMeta(0, CPU, (4,), dtype("uint8"))
    assert client.error(Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (meta, "texture"))).text == (
        "Device does not support allocate data space with specified memory scope: texture"
    )


def test_byte_offsets_count_in_both_directions(client: Client) -> None:
    meta = client.tensor((8,))
    client.write(meta, bytes(range(8)))
    view = meta._replace(shape=(3,), byte_offset=4)
    assert client.read(view) == bytes([4, 5, 6])
    client.write(view, b"xyz")
    assert client.read(meta) == b"\0\1\2\3xyz\7"


@pytest.mark.parametrize(("shape", "offset"), [((9,), 0), ((1,), 8), ((4,), 5), ((1,), 1 << 62)])
def test_a_copy_outside_its_memory_is_refused_and_the_session_goes_on(
    client: Client, shape: tuple[int, ...], offset: int
) -> None:
    meta = client.tensor((8,))
    bad = meta._replace(shape=shape, byte_offset=offset)
    text = f"bytes {offset} to {offset + bad.nbytes} lie outside a memory of 8 bytes"
    assert client.error(CopyToRemote(bad, bad.nbytes, bytes(bad.nbytes))).text == text
    assert client.error(CopyFromRemote(bad, bad.nbytes)).text == text
    assert client.read(meta, 0) == b""


def test_a_copy_longer_than_its_tensor_is_refused(client: Client) -> None:
    meta = client.tensor((8,))
    short = meta._replace(shape=(4,))
    assert client.error(CopyFromRemote(short, 5)).text == "copy of 5 bytes is larger than its tensor of 4 bytes"
    assert client.error(CopyToRemote(short, 5, b"12345")).text.startswith("copy of 5 bytes")


def test_memory_of_another_device_or_freed_or_never_allocated_is_refused(client: Client) -> None:
    meta = client.tensor((4,))
    assert client.error(CopyFromRemote(meta._replace(device=CUDA), 4)).text == (
        f"handle {meta.data:#x} is memory on cpu:0; expected cuda:0"
    )
    assert (
        client.error(CopyFromRemote(meta._replace(data=77), 4)).text == "handle 0x4d was never issued in this session"
    )
    client.free_data(meta)
    assert client.error(CopyFromRemote(meta, 4)).text == f"handle {meta.data:#x} was freed before"
    assert client.error(CopyToRemote(meta, 4, b"1234")).text == f"handle {meta.data:#x} was freed before"


def test_the_limit_of_handles_gives_the_memory_back() -> None:
    client = Client(Environment(limits=Limits(handles=1)))
    meta = client.tensor((4,))
    again = Syscall(Code.DEV_ALLOC_DATA_WITH_SCOPE, (meta._replace(data=0), None))
    assert client.error(again).text == "session holds 1 handles, handles=1; free some first"
    client.free_data(meta)
    assert client.tensor((4,))
    client.send(Shutdown())


def test_memory_checks_its_bounds() -> None:
    memory = Memory(CPU, 4, None)
    memory.check(0, 4)
    for start, nbytes in ((-1, 1), (0, -1), (4, 1)):
        with pytest.raises(CopyMismatch, match="lie outside a memory of 4 bytes"):
            memory.check(start, nbytes)
    with pytest.raises(CopyMismatch):
        DeviceTensor(memory, (2,), dtype("int32"))


def test_memory_that_is_not_the_cpus_has_no_view() -> None:
    with pytest.raises(DeviceError, match="a tensor on cuda:0 has no view in the server's own memory"):
        DeviceTensor(Memory(CUDA, 4, None), (4,), dtype("uint8")).numpy()


# -- copies among, streams -------------------------------------------------------------------------------------------


def among(source: TensorMeta, target: TensorMeta, stream: int = 0) -> Syscall:
    return Syscall(Code.COPY_AMONG_REMOTE, (source, target, Pointer(stream)))


def test_copies_among_tensors_count_both_offsets(client: Client) -> None:
    one, other = client.tensor((8,)), client.tensor((8,))
    client.write(one, bytes(range(8)))
    client.write(other, bytes(8))
    part, place = one._replace(shape=(2,), byte_offset=3), other._replace(shape=(2,), byte_offset=6)
    assert client.ask(among(part, place)) == VOID
    assert client.read(other) == bytes([0, 0, 0, 0, 0, 0, 3, 4])
    overlap = one._replace(shape=(4,), byte_offset=2)
    assert client.ask(among(one._replace(shape=(4,)), overlap)) == VOID
    assert client.read(one) == bytes([0, 1, 0, 1, 2, 3, 6, 7])


def test_copies_among_of_different_sizes_are_refused(client: Client) -> None:
    one, other = client.tensor((8,)), client.tensor((4,))
    assert client.error(among(one, other)).text == "cannot copy 8 bytes, shape (8,), into 4 bytes"


def test_cpu_streams_are_answered_and_null(client: Client) -> None:
    null = Return((NULL,))
    assert client.ask(Syscall(Code.DEV_CREATE_STREAM, (CPU,))) == null
    assert client.ask(Syscall(Code.DEV_GET_CURRENT_STREAM, (CPU,))) == null
    for code in (Code.DEV_SET_STREAM, Code.DEV_FREE_STREAM, Code.DEV_STREAM_SYNC):
        assert client.ask(Syscall(code, (CPU, NULL))) == VOID
        assert client.ask(Syscall(code, (CPU, None))) == VOID
    assert client.ask(Syscall(Code.DEV_SET_DEVICE, (CPU,))) == VOID


@pytest.mark.usefixtures("board")
def test_plug_in_streams_have_handles(client: Client) -> None:
    (made,) = client.values(Syscall(Code.DEV_CREATE_STREAM, (FPGA,)))
    assert isinstance(made, Pointer)
    assert made
    assert client.ask(Syscall(Code.DEV_SET_STREAM, (FPGA, made))) == VOID
    assert client.values(Syscall(Code.DEV_GET_CURRENT_STREAM, (FPGA,))) == (made,)
    assert client.ask(Syscall(Code.DEV_STREAM_SYNC, (FPGA, made))) == VOID
    one = client.tensor((2,), device=FPGA)
    assert client.ask(among(one, one, int(made))) == VOID
    for _ in range(2):
        assert client.ask(Syscall(Code.DEV_FREE_STREAM, (FPGA, made))) == VOID
    stream = the_board().current
    assert the_board().log[-2:] == [stream, ("freed", stream)]
    assert ("waited", stream) in the_board().log
    assert "was freed before" in client.error(Syscall(Code.DEV_SET_STREAM, (FPGA, made))).text
    assert "was never issued" in client.error(Syscall(Code.DEV_STREAM_SYNC, (FPGA, Pointer(5)))).text


# -- plug-in memory --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("board")
def test_plug_in_memory_is_copied_through_its_api(client: Client) -> None:
    meta, plain = client.tensor((4,), device=FPGA), client.tensor((4,))
    assert the_board().log == [(4, 1, "global")]
    assert client.write(meta, b"abcd") == VOID
    assert client.read(meta) == b"abcd"
    assert client.ask(among(meta, plain)) == VOID
    assert client.read(plain) == b"abcd"
    client.write(plain, b"1234")
    assert client.ask(among(plain, meta)) == VOID
    assert client.read(meta._replace(shape=(2,), byte_offset=1)) == b"23"
    client.free_data(meta)
    assert len(the_board().freed) == 1


@pytest.mark.usefixtures("board")
def test_two_devices_without_plain_memory_cannot_copy(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices._APIS, 2, Board())
    Board.made.pop()
    one, other = client.tensor((4,), device=FPGA), client.tensor((4,), device=CUDA)
    assert client.error(among(one, other)).text == "cannot copy from ext_dev:0 to cuda:0; go through the CPU"


@pytest.mark.usefixtures("board")
def test_an_exception_before_the_callback_is_taken_is_one_remote_error(client: Client) -> None:
    meta, plain = client.tensor((4,), device=FPGA), client.tensor((4,))
    the_board().fails = "copy"
    client.chunks.clear()
    for request in (
        CopyToRemote(meta, 4, b"abcd"),
        CopyFromRemote(meta, 4),
        among(meta, plain),
        Syscall(Code.DEV_STREAM_SYNC, (FPGA, NULL)),
    ):
        assert client.error(request).text == "the board does not answer"
    assert client.servant.session is not None
    assert client.local._uses == {memory.thing: 1 for memory in client.local.table._entries.values()}


@pytest.mark.usefixtures("board")
def test_a_copy_that_completes_later_pins_memory_even_over_a_shutdown() -> None:
    client = Client()
    meta = client.tensor((4,), device=FPGA)
    board = the_board()
    board.waits = True
    client.send(CopyToRemote(meta, 4, b"abcd"))
    assert client.servant.parked is not None
    client.servant.cancel()
    assert board.freed == []
    (finish,) = board.pending
    finish()
    assert [bytes(memory.storage) for memory in board.freed] == [b"abcd"]
    finish()
    assert len(board.freed) == 1


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize("kind", ["plain", "coroutine", "callback"])
@pytest.mark.parametrize("fails", [False, True])
def test_memory_that_a_call_uses_is_freed_after_it_even_over_a_shutdown(kind: str, fails: bool) -> None:
    registry = Registry()
    seen: list[list[Memory]] = []
    ends: list[Any] = []

    def use(tensor: DeviceTensor) -> None:
        clients[0].servant.cancel()
        seen.append(list(the_board().freed))
        if fails:
            raise ValueError

    async def coroutine(tensor: DeviceTensor) -> None:
        use(tensor)

    def callback(done: Any, tensor: DeviceTensor) -> None:
        assert not done.cancelled
        ends.append(done)
        use(tensor)

    def spawn(awaitable: Any, done: Any) -> Any:
        with pytest.raises(ValueError if fails else StopIteration) as end:
            awaitable.send(None)
        if fails:
            done.error(end.value)
        else:
            done()
        return lambda: None

    functions: dict[str, Any] = {"plain": use, "coroutine": coroutine, "callback": callback}
    registry.register("use", functions[kind], callback=kind == "callback")
    clients = [Client(Environment(registry=registry, spawn=spawn))]
    meta = clients[0].tensor((4,), device=FPGA)
    clients[0].send(CallFunc(clients[0].find("use"), (meta,)))
    assert seen == [[]]
    for done in ends:
        done.error(ValueError())
        done.error(ValueError())
    assert len(the_board().freed) == 1


@pytest.mark.usefixtures("board")
def test_a_callback_that_completes_gives_its_arguments_up(client: Client) -> None:
    dones: list[Any] = []
    registry = client.environment.registry
    registry.register("t.hold", lambda done, tensor: dones.append(done), callback=True, override=True)
    try:
        kept = Memory(FPGA, 4, bytearray(4))
        registry.register("t.kept", lambda: DeviceTensor(kept, (4,), dtype("uint8")), override=True)
        meta = client.tensor((4,), device=FPGA)
        view = client.call("t.kept")[1]
        assert isinstance(view, TensorMeta)
        hold = client.find("t.hold")
        for tensor in (meta, view):
            client.send(CallFunc(hold, (tensor,)))
            dones.pop()(5)
            assert client.reply() == Return((1, 5))
    finally:
        registry.remove("t.hold")
        registry.remove("t.kept")
    assert the_board().freed == []
    client.free_data(meta)
    assert len(the_board().freed) == 1


@pytest.mark.usefixtures("board")
def test_a_callback_that_completes_for_a_client_that_has_left_gives_its_arguments_up() -> None:
    dones: list[Any] = []
    registry = Registry()
    registry.register("hold", lambda done, tensor: dones.append(done), callback=True)
    client = Client(Environment(registry=registry))
    client.send(CallFunc(client.find("hold"), (client.tensor((4,), device=FPGA),)))
    client.servant.cancel()
    assert the_board().freed == []
    dones[0](5)
    assert len(the_board().freed) == 1
    assert client.reply() is None


@pytest.mark.usefixtures("board")
def test_a_failed_later_copy_is_an_error_and_unpins(client: Client) -> None:
    meta = client.tensor((4,), device=FPGA)
    board = the_board()
    board.waits = True
    client.send(CopyFromRemote(meta, 4))
    assert client.reply() is None
    board.pending.pop()(OSError("link down"))
    reply = client.reply()
    assert reply.text == "link down"
    client.free_data(meta)
    assert len(board.freed) == 1


@pytest.mark.usefixtures("board")
def test_memory_lives_until_the_last_tensor_in_it_is_freed() -> None:
    registry = Registry()
    registry.register("same", lambda tensor: DeviceTensor(tensor.memory, (2,), dtype("uint8"), 1))
    client = Client(Environment(registry=registry))
    meta = client.tensor((4,), device=FPGA)
    client.write(meta, b"abcd")
    _, view, handle = client.call("same", meta)
    assert isinstance(view, TensorMeta)
    assert isinstance(handle, Pointer)
    assert view.data == meta.data
    client.free_data(meta)
    assert client.read(view) == b"bc"
    assert the_board().freed == []
    client.free(handle)
    assert len(the_board().freed) == 1
    client.send(Shutdown())


@pytest.mark.usefixtures("board")
def test_a_freed_tensor_leaves_the_allocation_it_lies_in() -> None:
    registry = Registry()
    registry.register("same", lambda tensor: DeviceTensor(tensor.memory, (2,), dtype("uint8"), 1))
    client = Client(Environment(registry=registry))
    meta = client.tensor((4,), device=FPGA)
    first, second = (client.call("same", meta)[2] for _ in range(2))
    assert first != second
    for handle in (first, second):
        assert isinstance(handle, Pointer)
        client.free(handle)
    assert client.write(meta, b"abcd") == VOID
    assert the_board().freed == []
    client.send(Shutdown())
    assert len(the_board().freed) == 1


@pytest.mark.usefixtures("board")
def test_memory_that_a_function_made_is_never_freed_by_the_session() -> None:
    registry, kept = Registry(), Memory(FPGA, 4, bytearray(b"abcd"))
    registry.register("kept", lambda: DeviceTensor(kept, (4,), dtype("uint8")))
    client = Client(Environment(registry=registry))
    _, meta, handle = client.call("kept")
    assert isinstance(meta, TensorMeta)
    assert isinstance(handle, Pointer)
    assert client.read(meta) == b"abcd"
    client.free(handle)
    client.call("kept")
    client.send(Shutdown())
    assert the_board().freed == []


@pytest.mark.usefixtures("board")
def test_a_device_that_fails_to_free_does_not_keep_the_files(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    client.tensor((4,), device=FPGA)
    root = client.local.files.root
    the_board().fails = "free"
    client.send(Shutdown())
    assert not root.exists()
    assert "shutdown of LocalServingSession failed" in caplog.text
    caplog.clear()


def test_cpu_tensors_reach_functions_as_views() -> None:
    registry = Registry()

    def double(array: np.ndarray[Any, Any]) -> None:
        array *= 2

    registry.register("double", double)
    client = Client(Environment(registry=registry))
    meta = client.tensor((4,), "int16")
    client.write(meta, np.arange(4, dtype="<i2").tobytes())
    client.call("double", meta._replace(shape=(2,), byte_offset=4))
    assert np.frombuffer(client.read(meta), "<i2").tolist() == [0, 1, 4, 6]
    client.send(Shutdown())
