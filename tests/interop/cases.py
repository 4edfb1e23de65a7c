"""What upstream tests of a session, written once for both clients: ``remote`` is stock's session or ours.

Each case takes the session, ``nd`` (``tensor(array, device)`` and ``empty(shape, dtype, device)`` of that client) and a
folder. Names and functions are the ones that stock servers and ours have alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CASES"]


def simple_call(remote: Any, nd: Any, folder: Path) -> None:
    assert remote.get_function("rpc.test.addone")(10) == 11


def text_and_numbers(remote: Any, nd: Any, folder: Path) -> None:
    assert remote.get_function("rpc.test.strcat")("abc", 11) == "abc:11"


def long_text(remote: Any, nd: Any, folder: Path) -> None:
    assert remote.get_function("rpc.test.runtime_str_concat")("x" * 5000, "y" * 5000) == "x" * 5000 + "y" * 5000


def exception(remote: Any, nd: Any, folder: Path) -> None:
    raised = ""
    try:
        remote.get_function("rpc.test.except")("abc")
    except Exception as error:
        raised = str(error)
    assert "abc" in raised
    simple_call(remote, nd, folder)


def missing_function(remote: Any, nd: Any, folder: Path) -> None:
    try:
        remote.get_function("rpc.test.nothing")
    except AttributeError:
        return
    raise AssertionError("a function that is not there was found")


def array_there_and_back(remote: Any, nd: Any, folder: Path) -> None:
    data = np.arange(1024, dtype="float32").reshape(32, 32)
    assert (nd.tensor(data, remote.cpu(0)).numpy() == data).all()


def array_types(remote: Any, nd: Any, folder: Path) -> None:
    for kind in ("int8", "uint16", "int64", "float16", "float64", "bool"):
        data = np.arange(24).reshape(2, 3, 4).astype(kind)
        back = nd.tensor(data, remote.cpu(0)).numpy()
        assert back.dtype == data.dtype
        assert (back == data).all()


def array_copied_in_place(remote: Any, nd: Any, folder: Path) -> None:
    data = np.random.default_rng(0).random((100, 100)).astype("float32")
    there = nd.empty((100, 100), "float32", remote.cpu(0))
    there.copyfrom(data)
    assert (there.numpy() == data).all()


def array_among_remotes(remote: Any, nd: Any, folder: Path) -> None:
    data = np.arange(100, dtype="int32")
    one, two = nd.tensor(data, remote.cpu(0)), nd.empty((100,), "int32", remote.cpu(0))
    one.copyto(two)
    assert (two.numpy() == data).all()


def large_array(remote: Any, nd: Any, folder: Path) -> None:
    data = np.random.default_rng(1).random(2_000_000)
    assert (nd.tensor(data, remote.cpu(0)).numpy() == data).all()


def array_as_argument(remote: Any, nd: Any, folder: Path) -> None:
    remote.get_function("rpc.test.remote_tensor_func")(nd.tensor(np.ones((3, 4)), remote.cpu(0)))


def returned_function(remote: Any, nd: Any, folder: Path) -> None:
    assert remote.get_function("rpc.test.add_to_lhs")(10)(12) == 22


def returned_array(remote: Any, nd: Any, folder: Path) -> None:
    make = remote.get_function("rpc.test.remote_return_nd")
    array = make("get_arr")()
    for index in range(10):
        assert make("get_elem")(index) == 0
        assert make("get_arr_elem")(array, index) == 0
    assert (array.numpy() == np.zeros(10)).all()


def device_exists(remote: Any, nd: Any, folder: Path) -> None:
    assert remote.cpu(0).exist


def files(remote: Any, nd: Any, folder: Path) -> None:
    content = np.random.default_rng(2).bytes(200_000)
    remote.upload(bytearray(content), "blob.bin")
    assert bytes(remote.download("blob.bin")) == content
    remote.remove("blob.bin")
    small = folder / "small.txt"
    small.write_bytes(b"hello")
    remote.upload(str(small))
    assert bytes(remote.download("small.txt")) == b"hello"


def shapes(remote: Any, nd: Any, folder: Path) -> None:
    shape = remote.get_function("ffi.Shape")(7, 8, 9)
    assert remote.get_function("rpc.testing.GetShapeSize")(shape) == 3
    assert remote.get_function("rpc.testing.GetShapeElem")(shape, 2) == 9


def many_calls(remote: Any, nd: Any, folder: Path) -> None:
    add = remote.get_function("rpc.test.addone")
    assert [add(number) for number in range(300)] == list(range(1, 301))


def many_handles(remote: Any, nd: Any, folder: Path) -> None:
    adders = [remote.get_function("rpc.test.add_to_lhs")(number) for number in range(50)]
    assert [adder(1) for adder in adders] == list(range(1, 51))
    del adders
    simple_call(remote, nd, folder)


CASES = {
    case.__name__: case
    for case in (
        simple_call,
        text_and_numbers,
        long_text,
        exception,
        missing_function,
        array_there_and_back,
        array_types,
        array_copied_in_place,
        array_among_remotes,
        large_array,
        array_as_argument,
        returned_function,
        returned_array,
        device_exists,
        files,
        shapes,
        many_calls,
        many_handles,
    )
}
