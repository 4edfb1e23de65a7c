"""Running flows by blocking."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from rpcnb.protocol.flows import Send, SendCalls, Wait

if TYPE_CHECKING:
    from rpcnb.net.interrupt import Guard
    from rpcnb.net.link import Deadline
    from rpcnb.protocol.flows import Flow

__all__ = ["run_flow"]


def run_flow(link: Any, flow: Flow[Any], deadline: Deadline, guard: Guard) -> Any:
    """Run a flow by blocking; what was asked and not answered is abandoned when it is left early."""
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
                    link.wait(ticket, deadline, guard)
                ticket.taken = True  # what the reply brings is the flow's from now on
                while tickets and tickets[0].taken:
                    tickets.popleft()
            else:
                ticket = link.exchange(step, deadline, guard)
            step = flow.send(ticket.reply) if ticket.error is None else flow.throw(ticket.error)
    except StopIteration as end:
        return end.value
    except BaseException:
        flow.close()
        link.abandon(tickets)
        raise
