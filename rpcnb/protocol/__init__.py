"""The wire, as bytes and rules: no sockets, no clock, no threads.

Read in this order: :mod:`codes`, :mod:`sequence` (values), :mod:`messages` (packets), :mod:`handshake`,
:mod:`endpoint` (one side of a conversation), :mod:`flows` (operations).
"""
