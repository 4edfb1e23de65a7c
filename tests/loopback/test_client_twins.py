"""The blocking and the awaited session, and their proxies, are twins."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import rpcnb
from rpcnb.client import remote
from rpcnb.client.aio import AsyncSession
from rpcnb.client.session import Session

TWINS = [
    (Session, AsyncSession),
    (remote.RemoteFunction, remote.AsyncRemoteFunction),
    (remote.RemoteModule, remote.AsyncRemoteModule),
    (remote.RemoteTensor, remote.AsyncRemoteTensor),
    (remote.RemoteDevice, remote.AsyncRemoteDevice),
]
# Subscription cannot be awaited; submitting is the blocking side's (design.md 8).
SYNC_ONLY = {"__getitem__", "submit", "map"}
PROTOCOL = {"__enter__", "__exit__", "__aenter__", "__aexit__", "__init__", "__doc__", "__module__", "__slots__"}


def own_methods(kind: type) -> dict[str, Any]:
    """Public methods and operators of a class and its bases of this package."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("rpcnb."):
            found.update({name: value for name, value in vars(base).items() if callable(value)})
    return {
        name: value
        for name, value in found.items()
        if (not name.startswith("_") or (name.startswith("__") and name.endswith("__"))) and name not in PROTOCOL
    }


@pytest.mark.parametrize(("sync", "awaited"), TWINS, ids=lambda kind: kind.__name__)
def test_twins_have_the_same_methods_and_parameters(sync: type, awaited: type) -> None:
    one, other = own_methods(sync), own_methods(awaited)
    assert one.keys() - SYNC_ONLY == other.keys()
    for name, method in other.items():
        here, there = inspect.signature(one[name]).parameters, inspect.signature(method).parameters
        assert list(here) == list(there), name
        for parameter in here:
            assert here[parameter].default == there[parameter].default, (name, parameter)
            assert here[parameter].kind == there[parameter].kind, (name, parameter)


@pytest.mark.parametrize(("sync", "awaited"), TWINS, ids=lambda kind: kind.__name__)
def test_what_takes_a_timeout_is_awaited_by_the_one_and_blocks_in_the_other(sync: type, awaited: type) -> None:
    one, other = own_methods(sync), own_methods(awaited)
    for name, method in other.items():
        assert not inspect.iscoroutinefunction(one[name]), name
        if "timeout" in inspect.signature(method).parameters:
            assert inspect.iscoroutinefunction(method), name


def test_connecting_is_a_twin_too() -> None:
    assert list(inspect.signature(rpcnb.connect).parameters) == list(inspect.signature(rpcnb.connect_async).parameters)
    here, there = inspect.signature(rpcnb.connect), inspect.signature(rpcnb.connect_async)
    assert [one.default for one in here.parameters.values()] == [one.default for one in there.parameters.values()]


def test_twins_have_docstrings() -> None:
    for pair in TWINS:
        for kind in pair:
            for name, method in own_methods(kind).items():
                assert name.startswith("__") or inspect.getdoc(method), (kind, name)
