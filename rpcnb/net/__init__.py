"""Sockets and loops: links of clients, the server, hops, interruptible waiting."""
