"""Sockets and loops, knowing nothing of what is said over them.

Lives here: addresses, listening, WebSocket as a socket, TLS, trying before sleeping, a loop in a thread, whose loop a
notebook's is, time limits, run files, a relay that shapes a link; how many connections may say nothing, and what
strangers may write into a log.

Who enters: whoever moves bytes. Nothing here knows a session or a request.

Begin with ``address.py`` (what users write), then ``listen.py`` (how services live), then ``websocket.py``.
"""
