"""``%rpc_jobs``, which looks after what goes on at the device without a session, and ``%rpc_restart``.

Their plain Python twins: ``session.jobs``, ``session.reconnect()``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from rpcnb.jupyter.magics import describe, plain_errors, say
from rpcnb.jupyter.sessions import BOOK

if TYPE_CHECKING:
    from rpcnb.client.jobs import Job

__all__ = ["JobMagics", "job_line"]


def job_line(facts: dict[str, Any]) -> str:
    """Return a line that says how a job is."""
    seconds = (facts["ended"] or time.time()) - facts["since"]
    error = facts["error"]
    why = f": {error['type']}: {error['text'].splitlines()[0] if error['text'] else ''}" if error else ""
    why = why or (f": {facts['how']}" if facts["how"] else "")
    return f"{facts['name']:24} {facts['state']:10} {seconds:8.1f} s  {facts['function'] or 'a cell'}{why}"


@magics_class
class JobMagics(Magics):  # type: ignore[misc]  # IPython is untyped here
    """Magics for detached jobs, and for beginning afresh."""

    NAMES = ("rpc_jobs", "rpc_restart")

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("name", nargs="?", default=None, help="of a job; all are listed by default")
    @argument("--follow", action="store_true", help="show its output until it ends; Ctrl-C ends the showing alone")
    @argument("--out", metavar="VAR", help="wait for its end and bind its result here")
    @argument("--cancel", action="store_true", help="interrupt it")
    @argument("--forget", action="store_true", help="drop what is kept of it")
    @argument("--session", help="name of the session; the current one by default")
    def rpc_jobs(self, line: str) -> Job | None:
        """List the device's detached jobs, or look after one: ``%rpc_jobs burnin --follow``.

        Of several options each is done: ``--cancel``, then ``--follow``, ``--out`` and ``--forget``.
        """
        options = parse_argstring(self.rpc_jobs, line)
        session = BOOK.find(options.session)
        if options.name is None:
            if options.follow or options.out or options.cancel or options.forget:
                raise UsageError("expected the name of a job")
            jobs = session.jobs.values()
            for job in jobs:
                say(job_line(job.facts))
            if not jobs:
                say("no jobs; begin one with %%rpc --detach NAME, or f.submit(..., detach=True, name=NAME)")
            return None
        if options.out is not None and not options.out.isidentifier():
            raise UsageError(f"--out expects a variable's name, got {options.out!r}")
        try:
            job = session.jobs[options.name]
        except KeyError as error:
            raise UsageError(str(error.args[0])) from None
        if options.cancel:
            say(f"{job.name} was cancelled" if job.cancel() else f"{job.name} had ended")
        if options.follow:
            job.follow()
        if options.out is not None:
            self.shell.user_ns[options.out] = job.result()
        if options.forget:
            job.forget()
            say(f"forgot {job.name}")
        return None if options.cancel or options.follow or options.out or options.forget else job

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("--session", help="name of the session; the current one by default")
    def rpc_restart(self, line: str) -> None:
        """Begin afresh: the same session, with nothing of before at the device; in a process of its own there."""
        session = BOOK.restart(parse_argstring(self.rpc_restart, line).session)
        say(f"{session.name} begins afresh at {describe(session)}")
