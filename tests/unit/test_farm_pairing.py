"""Who is joined with whom at a proxy, without sockets."""

from __future__ import annotations

import pytest

from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.pairing import DUPLICATE, MISMATCH, WAITS, Pairing


def test_a_key_that_a_tracker_would_not_list_is_refused() -> None:
    pairing: Pairing[str] = Pairing(tracked=True)
    for key in ("k" * 1000, "tab\tbed", "esc\x1b"):
        with pytest.raises(RemoteProtocolError, match="expected a key that a tracker lists"):
            pairing.arrive("a", f"server:{key}")
    assert len(pairing) == 0
    assert pairing.arrive("a", f"server:{'k' * 900}") == WAITS


def test_a_server_waits_for_its_client() -> None:
    pairing: Pairing[str] = Pairing()
    assert pairing.arrive("s", "server:k -x=1") == WAITS
    assert len(pairing) == 1
    assert pairing.arrive("other", "client:other") == WAITS
    assert pairing.arrive("c", "client:k -timeout=7") == "s"
    assert pairing.arrive("late", "client:k") == WAITS


def test_a_client_waits_for_its_server() -> None:
    pairing: Pairing[str] = Pairing()
    assert pairing.arrive("c", "client:k") == WAITS
    assert pairing.arrive("s", "server:k") == "c"
    assert not len(pairing)


def test_a_second_peer_of_the_same_role_and_key_is_a_duplicate() -> None:
    pairing: Pairing[str] = Pairing()
    pairing.arrive("s", "server:k")
    assert pairing.arrive("s2", "server:k") == DUPLICATE
    pairing.leave("s2")
    pairing.leave("s")
    assert pairing.arrive("s2", "server:k") == WAITS


@pytest.mark.parametrize("text", ["", "k", "proxy:k", "servers:k"])
def test_a_key_text_without_a_role_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="expected a key text"):
        Pairing[str]().arrive("x", text)


def test_with_a_tracker_clients_come_with_match_keys() -> None:
    pairing: Pairing[str] = Pairing(tracked=True)
    assert [pairing.arrive(name, "server:k") for name in ("s1", "s2")] == [WAITS, WAITS]
    assert (len(pairing), pairing.keys) == (2, ["k"])
    first, second = pairing.issue(), pairing.issue()
    assert first is not None
    assert second is not None
    assert pairing.issue() is None
    assert first[0] == second[0] == "k"
    assert first[1] != second[1]
    assert len(first[1].removeprefix("k:")) >= 22
    assert pairing.arrive("c", "client:k") == MISMATCH
    assert pairing.arrive("c", f"client:{second[1]}") == "s2"
    assert pairing.arrive("c2", f"client:{second[1]}") == MISMATCH
    assert list(pairing.match_keys_of("s1")) == [first[1]]
    pairing.withdraw(first[1])
    assert pairing.arrive("c3", f"client:{first[1]}") == MISMATCH
    again = pairing.issue()
    assert again is not None
    pairing.leave("s1")
    assert pairing.arrive("c4", f"client:{again[1]}") == MISMATCH
    assert (len(pairing), pairing.keys, pairing.issue()) == (0, [], None)
