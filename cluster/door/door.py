"""Opens doors and goes through them: what `open_door` accepts, `connect` makes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from divisi.cluster.door.address import Place, listen, name
from divisi.cluster.door.channel import Channel
from divisi.cluster.door.errors import ChannelClosed, DoorError, HandshakeFailed
from divisi.cluster.door.handshake import Handshake
from divisi.cluster.door.refusals import Refusals
from divisi.cluster.door.secret import Secret
from divisi.cluster.door.tls import TlsFiles

logger = logging.getLogger(__name__)

HANDSHAKE_S = 2.0
MAX_STRANGERS = 64
"""Connections that haven't proved anything yet; one more pushes the oldest out, so that a crowd keeps no peer out."""
_EXHAUSTED_S = 0.1

Accept = Callable[[Channel], Awaitable[None]]


class Door:
    """A listener, and the connections that came through it."""

    def __init__(self, place: Place, secret: Secret, accept: Accept, tls: TlsFiles | None) -> None:
        self._listener, self.place = listen(place)
        self._secret = secret
        self._accept = accept
        # A Unix socket is in a folder that nobody else can enter.
        used = None if isinstance(place, Path) else tls
        try:
            self._context = used.server_context() if used else None
            self._certificate = used.own_certificate() if used else b""
        except DoorError:
            self._listener.close()
            raise
        self._refusals = Refusals(name(self.place))
        self._strangers: dict[asyncio.Task[None], str] = {}
        self._inside: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._listening = self._loop.create_task(self._listen())

    async def close(self) -> None:
        """Accept nobody any more, and end all connections; what was sent is given 2 s to get out."""
        tasks = [self._listening, *self._strangers, *self._inside]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        if isinstance(self.place, Path):
            self.place.unlink(missing_ok=True)

    async def _listen(self) -> None:
        while True:
            try:
                connection, address = await self._loop.sock_accept(self._listener)
            except OSError as error:  # out of file descriptors, mostly: some will be free again
                self._refusals.note("failed", f"cannot accept: {error.strerror or error}")
                await asyncio.sleep(_EXHAUSTED_S)
                continue
            if len(self._strangers) >= MAX_STRANGERS:
                oldest = next(iter(self._strangers))
                peer = self._strangers.pop(oldest)
                self._refusals.note("crowded", f"{peer}: more than {MAX_STRANGERS} are in their handshakes")
                oldest.cancel()
            peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a process of this node"
            task = self._loop.create_task(self._welcome(connection, peer))
            task.add_done_callback(partial(_close, connection))
            self._strangers[task] = peer
            await asyncio.sleep(0)  # accepting may not wait, and then nobody else would get a turn

    async def _welcome(self, connection: socket.socket, peer: str) -> None:
        """One connection, from its first byte to its last."""
        task = asyncio.current_task()
        assert task is not None
        self._inside.add(task)
        channel = Channel(lambda _: Handshake(self._secret, "server", self._certificate), peer)
        try:
            if await self._let_in(connection, channel):
                self._strangers.pop(task, None)
                await self._accept(channel)
        except ChannelClosed:
            pass
        except Exception:  # of the one who accepts; the other connections go on
            logger.exception("the connection to %s ends, since its handler failed", peer)
        finally:
            self._strangers.pop(task, None)
            channel.close()
            with contextlib.suppress(asyncio.CancelledError):
                await channel.wait_closed()
            self._inside.discard(task)

    async def _let_in(self, connection: socket.socket, channel: Channel) -> bool:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await self._loop.connect_accepted_socket(lambda: channel, connection, ssl=self._context)
                await channel.ready
        except HandshakeFailed as error:
            self._refusals.note(error.kind, f"{channel.peer} {error}")
        except TimeoutError:
            self._refusals.note("slow", f"{channel.peer} did not prove within {HANDSHAKE_S:g} s to know the secret")
        except DoorError as error:
            self._refusals.note("failed", str(error))
        except OSError as error:
            self._refusals.note("failed", f"{channel.peer}: {error}")
        else:
            return True
        return False


def _close(connection: socket.socket, _: asyncio.Task[None]) -> None:
    """For a task that was cancelled before it began; to close twice does no harm."""
    connection.close()


async def open_door(place: Place, secret: Secret, accept: Accept, tls: TlsFiles | None = None) -> Door:
    """Listen at a place, and run `accept` for each connection once it has proved to know the secret.

    `accept` owns its channel until it returns; then, or when it raises, the channel is closed. Raises DoorError.
    """
    return Door(place, secret, accept, tls)


async def connect(place: Place, secret: Secret, deadline_s: float, tls: TlsFiles | None = None) -> Channel:
    """A channel to whoever opened a door at `place`, within `deadline_s` seconds. Raises DoorError."""
    loop, where = asyncio.get_running_loop(), name(place)
    channel = Channel(lambda transport: Handshake(secret, "client", _certificate_of(transport)), where)
    try:
        async with asyncio.timeout(deadline_s), _unless_it_fails(channel):
            if isinstance(place, Path):
                await loop.create_unix_connection(lambda: channel, str(place))
            else:
                context = tls.client_context() if tls else None
                await loop.create_connection(lambda: channel, place.host, place.port, ssl=context)
            await channel.ready
    except ChannelClosed as error:
        raise HandshakeFailed(
            "failed", f"{where} did not let this process in; do both have the same secret and certificates? ({error})"
        ) from error
    except HandshakeFailed as error:
        raise HandshakeFailed(error.kind, f"{where} {error}") from None
    except TimeoutError:
        raise DoorError(f"{where} did not answer within {deadline_s:g} s; is its process running?") from None
    except OSError as error:
        raise DoorError(f"cannot reach {where}: {error.strerror or error}") from error
    return channel


@asynccontextmanager
async def _unless_it_fails(channel: Channel) -> AsyncIterator[None]:
    """Leave no socket behind where a connection isn't handed out."""
    try:
        yield
    except BaseException:
        channel.abort()
        raise


def _certificate_of(transport: asyncio.BaseTransport) -> bytes:
    """The server's, in DER; nothing without TLS."""
    connection: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    return (connection.getpeercert(binary_form=True) or b"") if connection is not None else b""
