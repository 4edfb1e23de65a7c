"""``%rpc`` and ``%%rpc``, which run source on the device, and ``%rpc_panel``.

Their plain Python twins: ``session.run_cell``, ``session.submit(session.run_cell, ...)``, :func:`rpcnb.panel`.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from IPython.display import display

from rpcnb.errors import RpcError
from rpcnb.jupyter.magics import plain_errors, say
from rpcnb.jupyter.panels import SECTIONS, panel
from rpcnb.jupyter.sessions import BOOK

if TYPE_CHECKING:
    from rpcnb.client.cells import CellOutput, CellResult
    from rpcnb.client.jobs import Job
    from rpcnb.client.pending import Pending
    from rpcnb.client.session import Session
    from rpcnb.jupyter.panels import Panel

__all__ = ["CellMagics", "show_output"]

_LOOK = 0.3  # seconds for asking whether an interrupted cell has ended: the user waits
SHEET = """\
%rpc_connect [ADDRESS|demo]    connect; --key K --token-file F --via HOST:PORT --as NAME
%%rpc                          run the cell on the device; --timeout S --out VAR --noblock
%rpc EXPRESSION                run a line there
session.fn.demo.add(1, 2)      call a function; session.submit(session.fn.demo.add, 1, 2) does not wait
session.namespace["x"]         a variable of the device's cells
%rpc_functions [PATTERN]       what may be called
%rpc_upload, %rpc_download     files there and back
%rpc_timeit CALL               time a function at the device; -n CALLS -r REPEATS
%%rpc --detach NAME            run it as a job that outlives this notebook; %rpc_jobs [NAME] --follow --out VAR
%rpc_restart                   begin afresh: a new process at the device
%rpc_panel                     what goes on, live
%rpc_serve                     make this kernel a device
%rpc_sessions, %rpc_close      what is open; --session NAME picks one everywhere; -h explains"""


def show_output(session: Session, piece: CellOutput) -> None:
    """Show a piece of a cell's output where the cell is; of a device that is not trusted, what does no harm."""
    if not session.trust_output:
        piece = piece.shown(session.name)
    if piece.kind == "display":
        display(piece.data, metadata=piece.metadata, raw=True)
    else:
        stream = sys.stdout if piece.kind == "stdout" else sys.stderr
        stream.write(piece.text)
        stream.flush()


@magics_class
class CellMagics(Magics):  # type: ignore[misc]  # IPython is untyped here
    """Magics for source on the device, and for looking at it."""

    NAMES = ("rpc", "rpc_panel")

    @no_var_expand
    @line_cell_magic
    def rpc(self, line: str, cell: str | None = None) -> CellResult | Pending | Job | None:
        """Run source on the device: a cell (``%%rpc``), or the rest of the line (``%rpc x.sum()``)."""
        if cell is None:
            return self._rpc_line(line)  # type: ignore[no-any-return]
        self._cell = cell
        return self._rpc_cell(line)  # type: ignore[no-any-return]

    @plain_errors
    def _rpc_line(self, line: str) -> CellResult | None:
        """Run the rest of the line on the device; alone, it lists what there is. A whole cell: %%rpc.

        ``--session NAME`` in front of it names the session.
        """
        if not line.strip():
            say(SHEET)
            return None
        option, _, rest = line.strip().partition(" ")
        name = None
        if option == "--session":
            name, _, line = rest.strip().partition(" ")
        return self._run(BOOK.find(name), line, None)

    @plain_errors
    @magic_arguments("%rpc")
    @argument("--timeout", type=float, help="seconds after which the cell is interrupted")
    @argument("--out", metavar="VAR", help="bind the value of the last expression here")
    @argument("--noblock", action="store_true", help="return at once: a Pending; output comes here all the same")
    @argument(
        "--detach", metavar="NAME", help="a job of this name, in a process of its own, which outlives the session"
    )
    @argument("--session", help="name of the session; the current one by default")
    def _rpc_cell(self, line: str) -> CellResult | Pending | Job | None:
        """Run the cell's source on the device, in a namespace that lives as long as the session."""
        options = parse_argstring(self._rpc_cell, line)
        if options.out is not None and not options.out.isidentifier():
            raise UsageError(f"--out expects a variable's name, got {options.out!r}")
        session = BOOK.find(options.session)
        if options.detach is not None:
            if options.timeout is not None or options.out is not None or options.noblock:
                raise UsageError("--detach goes alone: the job's result is session.jobs[NAME].result()")
            return session.jobs.start_cell(self._cell, options.detach)
        if options.noblock:
            pending: Pending = session.submit(
                session.run_cell,
                self._cell,
                self._name(session),
                timeout=options.timeout,
                on_output=partial(show_output, session),
            )
            if options.out is None:
                return pending
            self.shell.user_ns[options.out] = pending
            return None
        result = self._run(session, self._cell, options.timeout)
        if options.out is None:
            return result
        self.shell.user_ns[options.out] = session.get_variable("_") if result is not None else None
        return None

    def _name(self, session: Session) -> str:
        number = self.shell.displayhook.prompt_count  # of this cell, in every version
        return f"In[{number}] on {session.name}"

    rpc.parser = _rpc_cell.parser  # type: ignore[attr-defined]  # magic_arguments gives it; its options complete

    def _run(self, session: Session, source: str, timeout: float | None) -> CellResult | None:
        name = self._name(session)
        try:
            result = session.run_cell(source, name, timeout=timeout, on_output=partial(show_output, session))
        except KeyboardInterrupt:
            _tell_if_it_goes_on(session, name)
            raise
        return result if result.data else None

    @no_var_expand
    @line_magic
    @plain_errors
    @magic_arguments()
    @argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    @argument("--session", help="only this session")
    def rpc_panel(self, line: str) -> Panel:
        """Show live what goes on: transfers, pending calls, sessions, devices, this kernel's server."""
        options = parse_argstring(self.rpc_panel, line)
        session = None if options.session is None else BOOK.find(options.session)
        return panel(*options.sections, session=session)


def _tell_if_it_goes_on(session: Session, name: str) -> None:
    """Say so if the device has not ended the cell yet: a kernel stops between two bytecodes only."""
    until = time.monotonic() + _LOOK
    try:
        while any(cell.mine and cell.name == name for cell in session.list_cells(timeout=_LOOK)):
            if time.monotonic() > until:
                say("interrupt pending: the cell ends on the device when its present call returns")
                return
            time.sleep(_LOOK / 10)
    except RpcError:
        return
