"""Keys, tokens and the rate of guesses."""

from __future__ import annotations

import pytest

from rpcnb.protocol.handshake import KeyText
from rpcnb.runtime.access import Gate, Guesses, check_token, new_token


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_new_token_has_192_bits_and_can_travel() -> None:
    token = new_token()
    assert len(token) == 32
    assert check_token(token) == token
    assert token != new_token()


@pytest.mark.parametrize("token", ["", "a b", "a=b", "ä", "a\n"])
def test_a_token_that_could_not_travel_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        check_token(token)


@pytest.mark.parametrize(
    ("text", "admitted"),
    [
        ("client:gpu", True),
        ("client:gpu -timeout=3", True),
        ("client:gp", False),
        ("client:gpu2", False),
        ("server:gpu", False),
        ("gpu", False),
        ("", False),
        ("  ", False),
    ],
)
def test_the_first_word_must_be_the_key(text: str, admitted: bool) -> None:
    assert Gate("gpu", None).admits(text) is admitted


@pytest.mark.parametrize(
    ("text", "admitted"),
    [
        ("client:k -token=secret", True),
        ("client:k -timeout=3 -token=secret", True),
        ("client:k -token=secre", False),
        ("client:k -token=", False),
        ("client:k", False),
        ("client:x -token=secret", False),
    ],
)
def test_key_and_token_must_both_be_right(text: str, admitted: bool) -> None:
    assert Gate("k", "secret").admits(text) is admitted


def test_wrong_attempts_are_told_the_later_the_more_there_are() -> None:
    clock = Clock()
    guesses = Guesses(clock, 3)
    assert [guesses.note("10.0.0.5") for _ in range(6)] == [0, 0, 0, 0.25, 0.5, 0.75]
    assert guesses.note("10.0.0.6") == 0
    assert [guesses.note("10.0.0.5") for _ in range(20)][-1] == 2.0
    clock.now = 61.0
    assert guesses.note("10.0.0.5") == 0


def test_wrong_attempts_of_many_addresses_are_forgotten_when_they_are_old() -> None:
    clock = Clock()
    guesses = Guesses(clock, 1)
    for number in range(4097):
        guesses.note(f"host{number}")
    clock.now = 100.0
    guesses.note("late")
    assert len(guesses._wrong) == 1


def test_the_token_is_not_shown() -> None:
    assert repr(Gate("k", "secret")) == "Gate(key='k', token=set)"
    assert repr(Gate("k", None)) == "Gate(key='k', token=none)"


@pytest.mark.parametrize(("trusts", "bare"), [(False, False), (True, True)])
def test_a_match_key_is_good_for_one_session(trusts: bool, bare: bool) -> None:
    gate = Gate("gpu", "token", tracked=True, trusts_tracker=trusts)
    match_key = gate.issue()
    assert match_key.startswith("gpu:")
    assert len(match_key) >= len("gpu:") + 22  # 128 bits
    assert not gate.admits("client:gpu -token=token")
    assert gate.admits(f"client:{match_key}") is bare
    assert gate.admits(f"client:{match_key} -token=token") is not bare, "spent, if it was enough"
    assert not gate.admits(f"client:{match_key} -token=token")
    other = gate.issue()
    gate.withdraw(other)
    assert not gate.admits(f"client:{other} -token=token")
    assert gate.has_token("client:x -token=token")
    assert gate.has_token("client:x") is trusts


def test_a_guessed_match_key_does_not_enter() -> None:
    gate = Gate("gpu", None, tracked=True)
    match_key = gate.issue()
    assert not gate.admits("client:gpu:guess")
    assert not gate.admits("client:gpu")
    assert gate.admits(f"client:{match_key}")


@pytest.mark.parametrize(
    ("text", "visits", "lets"),
    [
        ("client:rpi -rpcnb=1.lanes -token=secret", True, True),
        ("client:rpi -rpcnb=1.lanes -token=wrong", True, False),
        ("client:rpi -rpcnb=1.lanes", True, False),
        ("client:rpi -token=secret", False, False),
        ("client:other -rpcnb=1.lanes -token=secret", False, False),
        ("client:rpi:a-match-key -rpcnb=1.lanes -token=secret", False, False),
    ],
)
def test_who_comes_to_a_trackers_board_by_itself_visits(text: str, visits: bool, lets: bool) -> None:
    gate = Gate("rpi", "secret", tracked=True)
    assert gate.is_visit(KeyText.parse(text)) is visits
    assert gate.lets_visit(text) is lets
    assert not gate.admits(text)
    assert not Gate("rpi", "secret").is_visit(KeyText.parse(text)), "no tracker hands it out"
    assert Gate("rpi", None, tracked=True).lets_visit(text) is visits
