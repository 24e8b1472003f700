"""TLS between the processes of a gang, where certificates are given."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from divisi.cluster.door.errors import SecretError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """This node's certificate and its key, and the certificates of those who may sign others' (PEM)."""

    certificate: str
    key: str
    ca: str

    def server_context(self) -> ssl.SSLContext:
        """For who is connected to. Raises SecretError."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client_context(self) -> ssl.SSLContext:
        """For who connects. Raises SecretError."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def own_certificate(self) -> bytes:
        """The first of the certificate file (DER), which is the node's own. Raises SecretError."""
        try:
            text = Path(self.certificate).read_text(encoding="ascii")
            begin, end = text.index(_BEGIN), text.index(_END) + len(_END)
            return ssl.PEM_cert_to_DER_cert(text[begin:end])
        except (OSError, ValueError) as error:
            raise SecretError(f"{self.certificate}: cannot read a certificate in PEM: {_reason(error)}") from None

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # Nodes are known by addresses that change. Who holds a certificate of this CA is let in only with the secret,
        # and the handshake names the server's certificate, so that none can stand in for another's.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        self.own_certificate()
        load_own = partial(context.load_cert_chain, password=_refuse_password)
        for what, files, load in (
            ("certificate and key", (self.certificate, self.key), load_own),
            ("CA certificates", (self.ca,), context.load_verify_locations),
        ):
            try:
                load(*files)
            except (OSError, ValueError) as error:
                raise SecretError(f"{' and '.join(files)}: cannot use the {what}: {_reason(error)}") from None
        return context


_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"{error.reason or error}; give PEM files that belong together"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _refuse_password() -> str:
    """Rather than ask at a terminal that a server may not have."""
    raise ValueError("the key is encrypted; give one without a password, in a file that only the server may read")
