"""The thinnest path through all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rpcnb
from rpcnb.runtime.registry import Registry


def test_a_registered_function_is_called_through_a_socket(serve: Callable[..., Any], registry: Registry) -> None:
    registry.register("demo.add", lambda a, b: a + b)
    with rpcnb.connect(serve().address) as session:
        assert session.get_function("demo.add")(1, 2) == 3
        assert session.fn.demo.add("a", "b") == "ab"
    assert session.state == "closed"
