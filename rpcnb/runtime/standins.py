"""What others ask TVM's runtime for, on a server that has not loaded it: threads, caches, random numbers, sorting.

Served to clients by name. TVM's own take their place once its runtime is loaded. They are not registered with
apache-tvm-ffi: TVM's runtime, when it is loaded later, ends a process in which its names are taken.

Source:
    src/runtime/thread_pool.cc, src/runtime/extra/contrib/random/random.cc and sort/sort.cc.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rpcnb.errors import CopyMismatch, DeviceError, LibraryError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["STAND_INS"]


def _config_threadpool(mode: int = 0, count: int = 0, *_: Any) -> None:
    """Run parallel loops in so many threads from now on; 0: in as many as there are processors.

    TVM's modes (big or little processors first) are alike here.
    """
    from rpcnb.runtime.backend import install_backend, processors

    del mode
    backend = install_backend()
    if backend is not None:
        backend.threads = count if count > 0 else processors()


def _num_threads() -> int:
    from rpcnb.runtime.backend import install_backend, processors

    try:
        backend = install_backend() if install_backend.cache_info().currsize else None
    except LibraryError:  # no compiled code can run here
        backend = None
    return processors() if backend is None else backend.threads


def _cpu(array: Any) -> Any:
    """Return an array in this process's memory."""
    import numpy as np

    if isinstance(array, np.ndarray):
        return array
    from rpcnb.runtime.dlpack import from_dlpack

    try:
        return from_dlpack(array)
    except (AttributeError, CopyMismatch):
        raise DeviceError(f"expected a tensor in the CPU's memory, got {array!r}") from None


def _flush(*args: Any) -> None:
    """Push what a function will read, but for its first argument, out of the processor's caches."""
    from rpcnb.runtime.backend import Backend, measuring_backend

    arrays = [_cpu(value) for value in args[1:] if hasattr(value, "__dlpack__")]
    try:
        backend = measuring_backend()
    except LibraryError:  # no compiled code can run here
        backend = Backend()
    backend.flush(arrays)


@functools.cache
def _rng() -> Any:
    import numpy as np

    return np.random.default_rng()


def _fill(out: Any) -> None:
    """Fill with numbers from 1 to 10, of which no kernel is slower than of others (no denormals, no zeros)."""
    array = _cpu(out)
    if array.dtype.kind == "b":
        array[...] = _rng().integers(0, 2, array.shape)
    else:
        _put(array, _rng().uniform(1.0, 10.0, array.shape))


def _put(array: Any, values: Any) -> None:
    import numpy as np

    array[...] = np.asarray(values).astype(array.dtype)


def _uniform(low: float, high: float, out: Any) -> None:
    array = _cpu(out)
    _put(array, _rng().uniform(low, high, array.shape))


def _normal(mean: float, deviation: float, out: Any) -> None:
    array = _cpu(out)
    _put(array, _rng().normal(mean, deviation, array.shape))


def _randint(low: int, high: int, out: Any) -> None:
    array = _cpu(out)
    _put(array, _rng().integers(low, high, array.shape))


def _order(data: Any, axis: int, ascending: bool) -> Any:
    """Return the indices that sort, stably, in either direction."""
    import numpy as np

    if ascending:
        return np.argsort(data, axis=axis, kind="stable")
    last = data.shape[axis] - 1
    return last - np.flip(np.argsort(np.flip(data, axis), axis=axis, kind="stable"), axis)


def _sort(data: Any, out: Any, axis: int = -1, ascending: bool = True) -> None:
    import numpy as np

    source = _cpu(data)
    _put(_cpu(out), np.take_along_axis(source, _order(source, axis, ascending), axis))


def _argsort(data: Any, out: Any, axis: int = -1, ascending: bool = True) -> None:
    _put(_cpu(out), _order(_cpu(data), axis, ascending))


def _argsort_nms(data: Any, counts: Any, out: Any, axis: int = 1, ascending: bool = False) -> None:
    """Sort the first ``counts[i]`` elements of each row; behind them the indices go on counting."""
    import numpy as np

    source, rows = np.moveaxis(_cpu(data), axis, -1), _cpu(counts).reshape(-1)
    target = np.moveaxis(_cpu(out), axis, -1)
    flat = source.reshape(-1, source.shape[-1])
    found = np.tile(np.arange(flat.shape[-1]), (len(flat), 1))
    for index, row in enumerate(flat):
        count = int(rows[index % len(rows)])
        found[index, :count] = _order(row[:count], 0, ascending)
    _put(target, found.reshape(source.shape))


def _topk(data: Any, *rest: Any) -> None:
    """Write the ``k`` greatest (or least) elements of each row, their indices, or both."""
    import numpy as np

    outs = [_cpu(one) for one in rest if not isinstance(one, (int, str, bool))]
    options: list[Any] = [one for one in rest if isinstance(one, (int, str, bool))]
    k, axis, kind, ascending = (options + [0, -1, "both", False][len(options) :])[:4]
    source = _cpu(data)
    order = _order(source, axis, bool(ascending))
    if k > 0:
        order = np.take(order, range(min(k, order.shape[axis])), axis)
    values = np.take_along_axis(source, order, axis)
    chosen = {"both": (values, order), "values": (values,), "indices": (order,)}[str(kind)]
    for out, one in zip(outs, chosen, strict=True):
        _put(out, one)


STAND_INS: dict[str, Callable[..., Any]] = {
    "runtime.config_threadpool": _config_threadpool,
    "runtime.NumThreads": _num_threads,
    "cache_flush_cpu_non_first_arg": _flush,
    "tvm.contrib.random.random_fill": _fill,
    "tvm.contrib.random.random_fill_for_measure": _fill,
    "tvm.contrib.random.uniform": _uniform,
    "tvm.contrib.random.normal": _normal,
    "tvm.contrib.random.randint": _randint,
    "tvm.contrib.sort.sort": _sort,
    "tvm.contrib.sort.argsort": _argsort,
    "tvm.contrib.sort.argsort_nms": _argsort_nms,
    "tvm.contrib.sort.topk": _topk,
}
