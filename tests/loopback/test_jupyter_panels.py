"""Panels and progress without a front end: what is read off living objects, and what clicks do."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import eventually

import rpcnb
from rpcnb.jupyter import bridge as bridge_module
from rpcnb.jupyter.actions import act
from rpcnb.jupyter.bridge import Bridge
from rpcnb.jupyter.facts import Scope, collect
from rpcnb.jupyter.panels import panel
from rpcnb.jupyter.progress import describe_wait
from rpcnb.runtime.registry import Registry

Serve = Callable[..., Any]


@pytest.fixture(autouse=True)
def _quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCNB_NONINTERACTIVE", "1")


@pytest.fixture
def address(serve: Serve, registry: Registry) -> str:
    async def wait(seconds: float) -> None:
        await asyncio.sleep(seconds)

    registry.register("wait", wait)

    def until_cancelled() -> None:
        while not rpcnb.cancelled():
            time.sleep(0.005)

    registry.register("slow", time.sleep)
    registry.register("until_cancelled", until_cancelled)
    registry.register("add", lambda a, b: a + b)
    return str(serve(key="lab").address)


@pytest.fixture
def session(address: str) -> Iterator[rpcnb.Session]:
    with rpcnb.connect(address, key="lab", session_timeout=100) as made:
        yield made


def rows(scope: Scope, section: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = getattr(collect(scope, 0.0, [], []), section)
    return found


def test_a_pending_call_says_what_it_waits_for(session: rpcnb.Session) -> None:
    job = session.get_function("wait").submit(60.0, timeout=90.0)
    scope = Scope(session=session)
    eventually(lambda: rows(scope, "pending")[0]["state"] == "running", "its beginning")
    (row,) = rows(scope, "pending")
    assert (row["function"], row["waits"], row["remote"]) == ("wait", "a callback at the server", True)
    assert row["deadline"] > row["since"]
    slow = session.get_function("slow")
    calls = [session.submit(slow, 0.3) for _ in range(3)]
    assert [row["waits"] for row in rows(scope, "pending")[1:]] == [
        "the function at the server",
        "an earlier call",
        "2 earlier calls",
    ]
    job.cancel()
    for call in calls:
        call.result()
    assert rows(scope, "pending") == []
    (row,) = rows(Scope(pending=job), "pending")
    assert (row["state"], row["ended"] >= row["since"], row["waits"]) == ("cancelled", True, "")


def test_a_session_counts_what_its_sockets_carry(session: rpcnb.Session, address: str) -> None:
    x = session.array(np.zeros(1 << 20, "uint8"))
    session.get_function("wait").submit(0.0).result()
    (row,) = rows(Scope(session=session), "sessions")
    assert (row["name"], row["key"], row["kind"], row["held"]) == (session.name, "lab", "rpcnb", 1 << 20)
    assert 0 < row["expires"] - time.monotonic() < 101
    assert row["sent"] > 1 << 20
    before = session.traffic
    x.free()
    session.reconnect()
    assert session.traffic.sent > before.sent, "what earlier connections carried counts"
    session._link.fail(rpcnb.SessionLost("gone"))
    (row,) = rows(Scope(session=session), "sessions")
    assert (row["state"], row["reconnects"], row["error"]) == ("lost", True, "gone")


def test_a_server_shows_its_clients_and_what_is_parked(session: rpcnb.Session, address: str) -> None:
    job = session.get_function("wait").submit(60.0)
    eventually(lambda: bool(rows(Scope(), "servers")[0]["clients"][0].get("calls")), "the call at the server")
    (row,) = rows(Scope(), "servers")
    assert (row["address"], row["key"], row["functions"], row["token"]) == (address, "lab", 4, False)
    assert row["clients"][0]["calls"][0][0] == "wait"
    job.cancel()


def test_a_remote_cell_is_waited_for_as_such(serve: Serve) -> None:
    with rpcnb.connect(serve(token="t", allow_exec=True).address, token="t") as session:
        job = session.submit(session.run_cell, "import time\nwhile True: time.sleep(0.01)", "In[3]")
        eventually(
            lambda: rows(Scope(session=session), "pending")[0]["waits"] == "the cell on the device", "its beginning"
        )
        plain = session.get_function("rpc.test.addone").submit(1)
        assert not plain.runs_cell
        job.cancel()


def test_transfers_with_their_ends(session: rpcnb.Session) -> None:
    x = session.empty((1 << 20,), "uint8")
    good = session.submit(x.copyfrom, np.zeros(1 << 20, "uint8"))
    good.result()
    bad = session.submit(session.download, "nothing")
    with pytest.raises(rpcnb.RemoteError):
        bad.result()
    assert rows(Scope(pending=good), "transfers")[0]["state"] == "done"
    (row,) = rows(Scope(pending=bad), "transfers")
    assert (row["state"], "no such file" in row["error"]) == ("failed", True)
    for one in (good, bad):
        assert repr(one.panel()) == "<rpcnb panel>"


class View:
    """Takes what a panel would draw."""

    def __init__(self, scope: Scope | None = None) -> None:
        self.scope = scope or Scope()
        self.shown: list[dict[str, Any]] = []
        self.looking = True

    def show(self, snapshot: dict[str, Any]) -> bool:
        self.shown.append(snapshot)
        return self.looking

    def tick(self, now: float) -> None:
        pass


def test_a_bridge_shows_changes_and_the_last_state_and_then_ends(session: rpcnb.Session) -> None:
    bridge, view = Bridge(), View(Scope(session=session))
    bridge.add(view)
    eventually(lambda: len(view.shown) == 1, "the first snapshot")
    slow = threading.Thread(target=lambda: session.get_function("slow")(0.5))  # blocks its caller
    slow.start()
    eventually(lambda: any(one["pending"]["rows"] for one in view.shown), "the blocking call")
    slow.join()
    eventually(lambda: not view.shown[-1]["pending"]["rows"], "its end")
    eventually(lambda: bool(view.shown[-1]["sessions"]["rows"][0]["latencies"]), "its latency")
    bridge.remove(view)
    eventually(lambda: bridge._thread is None, "the end of the bridge")
    assert not rpcnb.events.observers


def test_a_view_that_nobody_looks_at_is_fed_no_more(session: rpcnb.Session) -> None:
    bridge, view = Bridge(), View()
    view.looking = False
    bridge.add(view)
    eventually(lambda: bridge._thread is None, "the end of the bridge")
    assert len(view.shown) == 1


def test_a_panel_with_much_to_tell_tells_it_less_often() -> None:
    feed = bridge_module._Feed(View())
    large = {"rows": ["x" * 1000] * 12}
    assert feed.offer({**large, "n": 1}, feed._at)
    assert feed.offer({**large, "n": 2}, feed._at + 0.1)  # not yet: no room
    assert feed.offer({**large, "n": 3}, feed._at + 0.5)
    view: Any = feed.view
    assert [one["n"] for one in view.shown] == [1, 3]


def test_devices_of_a_farm(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    with rpcnb.Tracker(port=0, silent=True) as tracker:
        board = serve(key="rpi", tracker_addr=("127.0.0.1", tracker.port))
        farm = rpcnb.connect_tracker("127.0.0.1", tracker.port)
        eventually(lambda: farm.summary()["queue_info"].get("rpi", {}).get("free") == 1, "the board")
        held = farm.request("rpi", session_timeout=60)
        places: list[int] = []
        waiting = threading.Thread(
            target=lambda: farm.request("rpi", timeout=30, told=lambda *place: places.append(place[0])).close()
        )
        waiting.start()
        eventually(lambda: bool(places), "the place")
        bridge, view = Bridge(), View()
        bridge.add(view)

        def rows() -> list[dict[str, Any]]:
            """Of this tracker: others that this process has asked may not have been collected yet."""
            found = view.shown[-1]["devices"]["rows"] if view.shown else []
            return [row for row in found if row["tracker"] == tracker.address]

        eventually(lambda: len(rows()) == 2, "the devices")
        one, other = rows()
        assert (one["board"], one["key"], one["state"], one["limit"]) == (board.address, "rpi", "busy", "60 s")
        assert one["holder"]
        assert (other["state"], other["holder"]) == ("you wait", "place 1 of 1")
        panel("devices")._ipython_display_()  # without a front end: asked now
        assert board.address in capsys.readouterr().out
        held.close()
        waiting.join()
        eventually(lambda: "you wait" not in str(view.shown[-1]["devices"]), "the end of waiting")
        bridge.remove(view)
        eventually(lambda: bridge._thread is None, "the end of the bridge")
    (row,) = bridge_module._devices_of(farm.address)
    assert (row["state"], "refused" in row["error"]) == ("no answer", True)


def test_clicks_cancel_close_and_reconnect(session: rpcnb.Session, caplog: pytest.LogCaptureFixture) -> None:
    job = session.get_function("wait").submit(60.0)
    act({"op": "cancel", "id": job.id})
    eventually(job.cancelled, "the cancel")
    act({"op": "nonsense"})
    act({"op": "cancel", "id": -1})
    act({"op": "dismiss", "id": job.id})
    session._link.fail(rpcnb.SessionLost("gone"))
    act({"op": "reconnect", "session": session.name})
    eventually(lambda: session.state == "ready", "the session")
    act({"op": "close", "session": session.name})
    eventually(lambda: session.state == "closed", "the close")
    act({"op": "close", "session": "nobody"})


def test_reconnecting_to_nobody_is_said_in_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    with rpcnb.connect(server.address) as session:
        server.close()
        eventually(lambda: session.state == "lost", "the loss")
        with caplog.at_level(logging.WARNING):
            act({"op": "reconnect", "session": session.name})
            eventually(lambda: "could not be opened again" in caplog.text, "the word")
        caplog.clear()


def test_clicks_reach_awaited_sessions(address: str) -> None:
    async def main() -> None:
        session = await rpcnb.connect_async(address, key="lab")
        task = asyncio.ensure_future(session.call("wait", 60.0))
        while not session.pending:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.005)
        act({"op": "cancel", "id": session.pending[0].id})
        with pytest.raises(asyncio.CancelledError):
            await task
        act({"op": "close", "session": session.name})
        while session.state != "closed":  # noqa: ASYNC110  # likewise
            await asyncio.sleep(0.005)

    asyncio.run(main())


def test_a_panel_without_a_front_end_is_what_it_shows_now(session: rpcnb.Session, capsys: Any) -> None:
    with pytest.raises(ValueError, match="expected sections of transfers, pending"):
        panel("nonsense")
    shown = session.panel()
    shown._ipython_display_()
    assert session.name in capsys.readouterr().out
    assert session.name in shown.static_html()
    assert shown.widget is None
    shown.close()
    assert not shown.show({})


def test_a_blocked_operation_is_cancelled_by_a_click_while_somebody_observes(session: rpcnb.Session) -> None:
    session.observers.subscribe(lambda event: None)
    outcome: list[str] = []

    def block() -> None:
        try:
            session.get_function("until_cancelled")()
        except BaseException as error:
            outcome.append(type(error).__name__)

    thread = threading.Thread(target=block)
    thread.start()
    eventually(lambda: bool(session.pending), "the call among the pending ones")
    (pending,) = session.pending
    assert pending.function == "until_cancelled"
    pending.cancel()
    thread.join(10)
    assert outcome == ["CancelledError"]


def frame_of(thread: threading.Thread) -> Any:
    return sys._current_frames().get(thread.ident or 0)


def test_the_progress_line_knows_what_a_thread_waits_for(session: rpcnb.Session, address: str) -> None:
    assert describe_wait(sys._getframe()) is None
    slow, wait = session.get_function("slow"), session.get_function("wait")
    session.call("wait", 0.0)
    jobs: dict[str, Callable[[], object]] = {
        f"slow at {session.peer}": lambda: slow(0.4),
        f"wait at {session.peer}": lambda: session.call("wait", 0.4),
        f"wait at {session.peer} ": lambda: wait.submit(0.4).result(),
    }
    for text, job in jobs.items():
        thread = threading.Thread(target=job)
        thread.start()
        eventually(lambda thread=thread: describe_wait(frame_of(thread)) is not None, "the wait")  # type: ignore[misc]
        found = describe_wait(frame_of(thread))
        assert found is None or found[1] == text.strip()
        thread.join()
