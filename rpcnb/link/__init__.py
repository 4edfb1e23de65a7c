"""How a client's requests travel: who owns the socket, who waits, what is owed, and how it is given up.

Lives here: the wire with its tickets, the blocking and the awaiting link, the I/O thread, dialling, interrupts that
lose nothing, lanes, started calls (control), the order of what names the same thing, the pace of bulk data.

Who enters: the client, hops and trackers. A new way to reach a server begins with ``dial.py``.

Begin with ``wire.py`` (tickets), then ``link.py`` (the caller that waits owns the socket), then ``control.py``.
"""
