"""The wire, without IO, clock or threads: bytes to messages and back, what may be said when, operations as flows.

Lives here: the codes and limits, packed sequences, messages, the parser, the handshake, the conversation's states, the
short way of plain calls, records of calls that overlap, and each operation written once as a generator of requests.

Who enters: every later room; both sides are judged by the same tables. A new packet, field or well-known exchange
begins here, with its bytes in ``tests/vectors``.

Begin with ``messages.py`` (what is said), then ``endpoint.py`` (when), then ``flows.py`` (operations).
"""
