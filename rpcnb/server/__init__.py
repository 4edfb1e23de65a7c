"""The listening side: connections, who runs where, lanes of a session, the web port, hops to other servers.

Lives here: the server on its loop, one object per client connection, the workers that plain functions run in.

Who enters: users (``rpcnb.Server``), the farm (boards that dial out), the command line, the notebook. What a request
means is decided in ``rpcnb.runtime``.

Begin with ``server.py`` (options, admission), then ``connection.py`` (one client, its owners), then ``workers.py``.
"""
