"""Running flows by blocking."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from rpcnb.errors import DeadlineExceeded
from rpcnb.protocol.flows import Send, SendCalls, Wait

if TYPE_CHECKING:
    from rpcnb.link.interrupt import Guard
    from rpcnb.protocol.flows import Flow
    from rpcnb.transport.deadline import Deadline

__all__ = ["Unfinished", "run_flow"]


class Unfinished(Exception):  # not an error: the flow goes on elsewhere
    """A flow has taken longer than its caller's patience; it waits for ``ticket``, and ``tickets`` are its."""

    def __init__(self, ticket: Any, tickets: deque[Any]) -> None:
        self.ticket = ticket
        self.tickets = tickets
        super().__init__()


def run_flow(link: Any, flow: Flow[Any], deadline: Deadline, guard: Guard, patience: Deadline | None = None) -> Any:
    """Run a flow by blocking; what was asked and not answered is abandoned when it is left early.

    Args:
        link: The connection.
        flow: What to run.
        deadline: Of the whole operation.
        guard: The operation's.
        patience: How long to go on here, shorter than ``deadline``.

    Raises:
        Unfinished: The patience is over; nothing has been given up.
    """
    tickets: deque[Any] = deque()
    try:
        step: Any = next(flow)
        while True:
            if type(step) is Send:
                ticket = link.send(step.request)
                tickets.append(ticket)
                step = flow.send(ticket)
                continue
            if type(step) is SendCalls:
                sent = link.send_calls(step.handle, step.calls)
                tickets += sent
                step = flow.send(sent)
                continue
            if type(step) is Wait:
                ticket = step.ticket
                if not ticket.done:
                    _wait_patiently(link, ticket, tickets, deadline, guard, patience)
                ticket.taken = True  # what the reply brings is the flow's from now on
                while tickets and tickets[0].taken:
                    tickets.popleft()
            elif patience is None:
                ticket = link.exchange(step, deadline, guard)
            else:
                ticket = link.send(step)
                tickets.append(ticket)
                if not ticket.done:
                    _wait_patiently(link, ticket, tickets, deadline, guard, patience)
                ticket.taken = True
            step = flow.send(ticket.reply) if ticket.error is None else flow.throw(ticket.error)
    except StopIteration as end:
        return end.value
    except Unfinished:
        raise
    except BaseException as error:
        if isinstance(error, DeadlineExceeded):
            error.explain(link.wire.behind(tickets))
        flow.close()
        link.abandon(tickets)
        raise


def _wait_patiently(
    link: Any, ticket: Any, tickets: deque[Any], deadline: Deadline, guard: Guard, patience: Deadline | None
) -> None:
    """Wait for a ticket, up to the deadline or as long as the patience lasts."""
    if patience is None or (deadline.at is not None and patience.at is not None and deadline.at <= patience.at):
        link.wait(ticket, deadline, guard)
        return
    try:
        link.wait(ticket, patience, guard)
    except DeadlineExceeded:
        raise Unfinished(ticket, tickets) from None
