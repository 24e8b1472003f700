"""What can go wrong at the door, drawn as one tree. Texts name what is wrong and the remedy, and never a secret."""

from __future__ import annotations

from typing import Literal

from divisi.cluster.errors import DivisiError

Kind = Literal["crowded", "failed", "not ours", "secret", "slow", "version"]
"""Why a handshake ended: one log line for each in a while, however many connections it is."""


class DoorError(DivisiError):
    """A connection cannot be made or kept, or a door cannot be opened."""


class SecretError(DoorError, ValueError):
    """The file of the secret, or of a certificate, cannot be used."""


class HandshakeFailed(DoorError):
    """The other side is not let in, or doesn't let us in."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[type[HandshakeFailed], tuple[Kind, str]]:
        return type(self), (self.kind, str(self))


class ChannelClosed(DoorError):
    """The connection has ended; the text says how. What had arrived before was handed out."""
