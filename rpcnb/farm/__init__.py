"""Boards shared by many: the tracker, the proxy, and how servers and clients deal with them.

Lives here: their messages, the decisions without sockets (``tracking``, ``pairing``), both services, a server's
registration and its waiting at a proxy, sessions with a tracker and its boards.

Who enters: users (``rpcnb.Tracker``, ``Proxy``, ``connect_tracker``); earlier rooms find the scheme ``tracker://``, the
registration and the dialling out by name (``rpcnb.parts``).

Begin with ``tracking.py`` (what a tracker decides), then ``tracker.py`` (its sockets), then ``trackersession.py``.
"""
