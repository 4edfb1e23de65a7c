"""Copies through both kinds of session: byte-exact at every size and type."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb import errors
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]
SIZES = [0, 1, 7, 4095, 65535, 65536, 65537, 1 << 20]
DTYPES = ["uint8", "int16", "float32", "float64", "complex64", "bool"]


def random_array(nbytes: int, dtype: str) -> np.ndarray[Any, Any]:
    kind = np.dtype(dtype)
    count = nbytes // kind.itemsize
    if kind == np.bool_:
        return np.random.default_rng(count).integers(0, 2, count).astype(np.bool_)
    array: np.ndarray[Any, Any] = np.frombuffer(np.random.default_rng(count).bytes(count * kind.itemsize), kind).copy()
    return array


@pytest.mark.parametrize("dtype", DTYPES)
def test_m1_every_size_is_byte_exact_both_ways(serve: Serve, registry: Registry, dtype: str) -> None:
    registry.register("hash", lambda array: hash(array.tobytes()))
    server = serve()
    with rpcnb.connect(server.address) as session:
        for nbytes in SIZES:
            local = random_array(nbytes, dtype)
            remote = session.array(local)
            assert session.call("hash", remote) == hash(local.tobytes())
            back = remote.numpy()
            assert back.tobytes() == local.tobytes()
            assert back.dtype == local.dtype
            out = np.zeros_like(local)
            assert remote.numpy(out) is out
            assert out.tobytes() == local.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_m1_every_size_is_byte_exact_both_ways_when_awaited(serve: Serve, registry: Registry, dtype: str) -> None:
    registry.register("hash", lambda array: hash(array.tobytes()))
    server = serve()

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            for nbytes in SIZES:
                local = random_array(nbytes, dtype)
                remote = await session.array(local)
                assert await session.call("hash", remote) == hash(local.tobytes())
                assert (await remote.numpy()).tobytes() == local.tobytes()

    asyncio.run(main())


def test_m1_64_mib_are_byte_exact_both_ways(serve: Serve) -> None:
    server = serve()
    local = random_array(64 << 20, "float32").reshape(64, -1)
    with rpcnb.connect(server.address) as session:
        assert session.array(local).numpy().tobytes() == local.tobytes()

    async def main() -> None:
        async with await rpcnb.connect_async(server.address) as session:
            remote = await session.array(local)
            assert (await remote.numpy()).tobytes() == local.tobytes()

    asyncio.run(main())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4), (1,) * 8])
def test_m1_every_shape_keeps_its_shape(serve: Serve, shape: tuple[int, ...]) -> None:
    local = np.asarray(np.random.default_rng(1).random(shape), np.float64)
    with rpcnb.connect(serve().address) as session:
        back = session.array(local).numpy()
    assert back.shape == shape
    assert back.tobytes() == local.tobytes()


def test_m1_arrays_that_are_not_contiguous_or_foreign_endian_are_copied_by_value(serve: Serve) -> None:
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    with rpcnb.connect(serve().address) as session:
        for local in (base[::2, ::-1], base.T, base.astype(">i4"), np.asfortranarray(base)):
            np.testing.assert_array_equal(session.array(local).numpy(), local)
        target = np.zeros((6, 4), np.int32).T
        session.array(base).numpy(target)
        np.testing.assert_array_equal(target, base)


def test_m1_sub_byte_and_bfloat_types(serve: Serve) -> None:
    import ml_dtypes

    with rpcnb.connect(serve().address) as session:
        for kind in (ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e4m3fn):
            local = np.arange(-4, 4).astype(kind)
            np.testing.assert_array_equal(session.array(local).numpy().astype(np.float32), local.astype(np.float32))


def test_views_with_offset_read_and_write_their_part(serve: Serve) -> None:
    local = np.arange(100, dtype=np.int32)
    with rpcnb.connect(serve().address) as session:
        whole = session.array(local)
        part = whole.view((5, 4), byte_offset=40)
        np.testing.assert_array_equal(part.numpy(), local[10:30].reshape(5, 4))
        part.copyfrom(np.full((5, 4), -1, np.int32))
        inner = part.view((2,), byte_offset=8)
        inner.copyfrom(np.array([7, 8], np.int32))
        expected = local.copy()
        expected[10:30] = -1
        expected[12:14] = 7, 8
        np.testing.assert_array_equal(whole.numpy(), expected)
        as_bytes = whole.view((8,), "uint8", 4)
        assert as_bytes.numpy().tobytes() == expected[1:3].tobytes()
        with pytest.raises(errors.CopyMismatch):
            whole.view((101,))
        with pytest.raises(errors.CopyMismatch):
            part.view((5, 4), byte_offset=4)
        del whole
        np.testing.assert_array_equal(inner.numpy(), [7, 8])  # a view keeps its owner


def test_views_with_offset_reach_remote_functions(serve: Serve, registry: Registry) -> None:
    registry.register("sum", lambda array: int(array.sum()))
    registry.register("fill", lambda array, value: array.fill(value))
    with rpcnb.connect(serve().address) as session:
        whole = session.array(np.arange(10, dtype=np.int64))
        assert session.fn.sum(whole.view((3,), byte_offset=16)) == 2 + 3 + 4
        session.fn.fill(whole.view((2,), byte_offset=64), 0)
        np.testing.assert_array_equal(whole.numpy(), [0, 1, 2, 3, 4, 5, 6, 7, 0, 0])


def test_copyto_within_and_between_sessions(serve: Serve) -> None:
    server = serve()
    local = np.arange(1000, dtype=np.float32)
    with rpcnb.connect(server.address) as one, rpcnb.connect(server.address) as other:
        source = one.array(local)
        within = one.empty((1000,))
        assert source.copyto(within) is within
        across = source.copyto(other.cpu())
        assert across.session is other
        again = other.empty((1000,))
        again.copyfrom(within)
        here = np.empty_like(local)
        source.copyto(here)
        for got in (within.numpy(), across.numpy(), again.numpy(), here):
            np.testing.assert_array_equal(got, local)
        with pytest.raises(errors.CopyMismatch):
            source.copyto(other.empty((999,)))
        with pytest.raises(errors.CopyMismatch):
            source.copyto(one.empty((999,)))


def test_copyto_within_and_between_awaited_sessions(serve: Serve) -> None:
    server = serve()
    local = np.arange(1000, dtype=np.float32)

    async def main() -> None:
        async with (
            await rpcnb.connect_async(server.address) as one,
            await rpcnb.connect_async(server.address) as other,
        ):
            source = await one.array(local)
            within = await source.copyto(await one.empty((1000,)))
            across = await source.copyto(other.cpu())
            np.testing.assert_array_equal(await within.numpy(), local)
            np.testing.assert_array_equal(await across.numpy(), local)

    asyncio.run(main())


def test_arrays_as_arguments_are_uploaded_and_freed(serve: Serve, registry: Registry) -> None:
    registry.register("dot", lambda a, b: float(a @ b))
    server = serve()
    with rpcnb.connect(server.address) as session:
        dot = session.get_function("dot")
        dot(np.ones(8), np.arange(8.0))
        table = next(iter(server._connections)).servant.session.table
        for _ in range(50):
            assert dot(np.ones(8), np.arange(8.0)) == 28
        eventually(lambda: len(table) == 1, "only the function's handle left")


def test_array_results_are_released_with_their_tensors(serve: Serve, registry: Registry) -> None:
    registry.register("make", lambda count: np.arange(count))
    server = serve()
    with rpcnb.connect(server.address) as session:
        make = session.get_function("make")
        table = next(iter(server._connections)).servant.session.table
        for count in (0, 1, 1000):
            np.testing.assert_array_equal(make(count).numpy(), np.arange(count))
        eventually(lambda: len(table) == 1, "only the function's handle left")


def test_mismatched_copies_send_nothing_and_leave_the_session_right(serve: Serve) -> None:
    with rpcnb.connect(serve().address) as session:
        tensor = session.array(np.zeros(4, np.float32))
        for wrong in (np.zeros(5, np.float32), np.zeros(4, np.float64)):
            with pytest.raises(errors.CopyMismatch):
                tensor.copyfrom(wrong)
            with pytest.raises(errors.CopyMismatch):
                tensor.numpy(wrong)
        read_only = np.zeros(4, np.float32)
        read_only.flags.writeable = False
        with pytest.raises(errors.CopyMismatch):
            tensor.numpy(read_only)
        tensor.free()
        tensor.free()
        with pytest.raises(errors.StaleHandle):
            tensor.numpy()
        assert session.call("rpc.test.addone", 1) == 2
