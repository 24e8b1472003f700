"""By what the processes of a gang know each other."""

from __future__ import annotations

from dataclasses import dataclass

from divisi.cluster.door.secret import Secret
from divisi.cluster.door.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class Credentials:
    """The secret, and the certificates where connections between nodes are encrypted."""

    secret: Secret
    tls: TlsFiles | None = None
