"""The one door of all our sockets: mutual proof of a shared secret, authenticated frames, TLS where it is wanted."""

from divisi.cluster.door.address import Place, private_folder
from divisi.cluster.door.channel import Channel
from divisi.cluster.door.credentials import Credentials
from divisi.cluster.door.door import MAX_STRANGERS, Door, connect, open_door
from divisi.cluster.door.errors import ChannelClosed, DoorError, HandshakeFailed, SecretError
from divisi.cluster.door.framer import MAX_FRAME, Framer
from divisi.cluster.door.handshake import Handshake
from divisi.cluster.door.line import Line
from divisi.cluster.door.refusals import Refusals
from divisi.cluster.door.secret import Secret
from divisi.cluster.door.tls import TlsFiles

__all__ = ["MAX_FRAME", "MAX_STRANGERS", "Channel", "ChannelClosed", "Credentials", "Door", "DoorError", "Framer",
           "Handshake", "HandshakeFailed", "Line", "Place", "Refusals", "Secret", "SecretError", "TlsFiles", "connect",
           "open_door", "private_folder"]  # fmt: skip
