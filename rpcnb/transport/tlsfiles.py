"""Certificates that a user names."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

__all__ = ["Tls"]


@dataclass(frozen=True)
class Tls:
    """Certificates of one's own, for ``Server(tls=...)`` and ``connect("rpcs://...", tls=...)``.

    Attributes:
        cert: File of the certificate (and what it is signed by), PEM.
        key: File of its private key; None: it is in ``cert``.
        ca: File of the authorities that are trusted: by a client for servers' certificates; by a server for those of
            clients, which it then asks for.
    """

    cert: str | None = None
    key: str | None = None
    ca: str | None = None

    def load(self, context: ssl.SSLContext) -> None:
        """Let a context have these.

        Raises:
            OSError: A file is not there, or not what it should be.
        """
        try:
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            names = ", ".join(name for name in (self.cert, self.key, self.ca) if name)
            raise OSError(error.errno, f"not certificates that go together: {error.reason or error}", names) from None
