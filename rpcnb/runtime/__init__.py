"""What a server does with a request, without sockets: functions, handles, memory, devices, files, compiled libraries.

Lives here: the registry, serving sessions, the servant that performs one conversation, calls that overlap, well-known
functions, the event-driven handler, and who may enter (keys and tokens).

Who enters: the server, a session with this process, tests. A new well-known function or device begins here.

Begin with ``serving.py`` (the interface), then ``servant.py`` (one conversation), then ``local.py`` (this process).
"""
