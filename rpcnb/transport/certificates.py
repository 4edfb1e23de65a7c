"""Certificates by their fingerprints: a server's own, and those of servers that this user knows, as ssh has them.

A fingerprint is the SHA-256 of a certificate, in base64url without padding, as in ``rpcs://board:9090#sha256=...``.

Source:
    RFC 5280 (certificates); RFC 5929, section 4 (the end point that a proof is bound to).
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import os
import shutil
import ssl
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from rpcnb.transport.address import read_fingerprint, show_address
from rpcnb.transport.runfiles import write_text_atomically

__all__ = [
    "config_directory",
    "expiry",
    "fingerprint_of",
    "first_certificate",
    "known_fingerprint",
    "own_certificate",
    "remember",
]

_DAYS = 3650  # of a certificate of our own: it is known by its fingerprint
_KNOWN = "known_hosts"
_MAKING = 30  # seconds


def config_directory() -> Path:
    """Return the directory of what a user of this account has set; it need not exist."""
    chosen = os.environ.get("RPCNB_CONFIG_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "rpcnb"


def private_directory(*names: str) -> Path:
    """Return a directory below :func:`config_directory` that only this user can look into; it is made."""
    folder = config_directory().joinpath(*names)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def fingerprint_of(certificate: bytes) -> str:
    """Return the fingerprint of a certificate, DER."""
    return base64.urlsafe_b64encode(hashlib.sha256(certificate).digest()).decode().rstrip("=")


def first_certificate(path: str) -> bytes:
    """Return the first certificate of a PEM file, which OpenSSL has read already, as DER."""
    with open(path) as file:
        _, begin, rest = file.read().partition("-----BEGIN CERTIFICATE-----")
    body, end, _ = rest.partition("-----END CERTIFICATE-----")
    return ssl.PEM_cert_to_DER_cert(begin + body + end)


# -- servers that are known ------------------------------------------------------------------------------------------


def _known() -> dict[str, str]:
    with contextlib.suppress(OSError):
        lines = (config_directory() / _KNOWN).read_text().splitlines()
        return dict(line.split()[:2] for line in lines if len(line.split()) == 2)
    return {}


def known_fingerprint(host: str, port: int) -> str:
    """Return the fingerprint under which a server is known; empty if it is not."""
    found = _known().get(show_address(host, port), "")
    try:
        return read_fingerprint(found) if found else ""
    except ValueError:
        return ""


def remember(host: str, port: int, fingerprint: str) -> None:
    """Keep the fingerprint of a server, for addresses without one; where nothing can be written it is not kept."""
    known, name, shown = _known(), show_address(host, port), f"sha256={fingerprint}"
    if known.get(name) == shown:
        return
    known[name] = shown
    with contextlib.suppress(OSError):
        text = "".join(f"{host} {value}\n" for host, value in known.items())
        write_text_atomically(private_directory() / _KNOWN, text)


# -- a server's own --------------------------------------------------------------------------------------------------


def own_certificate() -> tuple[Path, Path]:
    """Return the files of this user's certificate for servers, and of its key; made at the first time.

    Raises:
        OSError: It cannot be made.
    """
    folder = private_directory("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    if not (cert.is_file() and key.is_file()):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place)
            _make(made / cert.name, made / key.name)
            (made / key.name).chmod(0o600)
            os.replace(made / key.name, key)
            os.replace(made / cert.name, cert)
    return cert, key


def _make(cert: Path, key: Path) -> None:
    """Make a key and a certificate that it signs itself: with ``cryptography`` or the program ``openssl``."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        _make_with_openssl(cert, key)
        return
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rpcnb")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(secret.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
    builder = builder.not_valid_after(now + datetime.timedelta(_DAYS))
    plain, pem = serialization.NoEncryption(), serialization.Encoding.PEM
    key.write_bytes(secret.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    cert.write_bytes(builder.sign(secret, hashes.SHA256()).public_bytes(pem))


def _make_with_openssl(cert: Path, key: Path) -> None:
    program = shutil.which("openssl")
    if program is None:
        raise OSError(0, "a certificate is made by the package cryptography (pip install 'rpcnb[tls]') or by openssl")
    command = [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=rpcnb", "-days", str(_DAYS), "-keyout", str(key), "-out", str(cert)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_MAKING, check=False)
    if done.returncode:
        raise OSError(0, f"openssl makes no certificate: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")


# -- validity --------------------------------------------------------------------------------------------------------


class Expiry(NamedTuple):
    """When a certificate ends: ``at`` is None where that could not be read."""

    at: datetime.datetime | None

    @property
    def over(self) -> bool:
        """Tell whether it is no longer, or not known to be, valid."""
        return self.at is None or self.at < datetime.datetime.now(datetime.timezone.utc)

    def __str__(self) -> str:
        return "an unknown day" if self.at is None else f"{self.at:%Y-%m-%d}"


def expiry(certificate: bytes) -> Expiry:
    """Return when a certificate, DER, ends: what is known by its fingerprint, OpenSSL does not look at."""
    try:
        fields = _elements(_elements(_elements(certificate)[0][1])[0][1])
        fields = fields[1:] if fields[0][0] == 0xA0 else fields  # the version
        tag, value = _elements(fields[3][1])[1]
        written = value.decode()
        if tag == 0x17:  # UTCTime: two digits of the year
            written = f"{'19' if written[:2] >= '50' else '20'}{written}"
        at = datetime.datetime.strptime(written, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.timezone.utc)
    except (IndexError, ValueError):
        return Expiry(None)
    return Expiry(at)


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    """Return tags and contents of the DER elements that follow each other."""
    found, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            count = length & 0x7F
            length, at = int.from_bytes(data[at : at + count], "big"), at + count
        found.append((tag, data[at : at + length]))
        at += length
    return found
