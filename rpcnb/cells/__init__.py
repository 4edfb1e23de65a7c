"""Remote cells at the server: Python that a client sends, where it runs, what it prints and shows, its variables.

Lives here: the one module that runs source and the one that unpickles; they are imported only where the operator (or,
for pickles, the user) consents. A server gets its cells handed in.

Who enters: the server and ``rpcnb serve`` with consent; the client for how variables travel.

Begin with ``cells.py`` (a cell's life), then ``runners.py`` (threads and interrupts), then ``output.py``.
"""
