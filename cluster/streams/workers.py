"""An ingress's connections to all workers that the coordinator names, made anew as often as they end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from divisi.cluster.door import Channel, DoorError, Place, Secret, TlsFiles, connect
from divisi.cluster.seats import Address, StreamAddress
from divisi.cluster.streams.client import WorkerConnection
from divisi.cluster.streams.wire import Report

log = logging.getLogger(__name__)

_CONNECT_S = 2.0
_RETRY_S = 0.25


class WorkerConnections:
    """One connection to each worker. Belongs to one event loop."""

    def __init__(self, host: str, secret: Secret, tls: TlsFiles | None = None) -> None:
        """`host` is this process's own: workers on it are reached by their Unix sockets."""
        self._host = host
        self._secret = secret
        self._tls = tls
        self._named: frozenset[StreamAddress] = frozenset()
        self._keeping: dict[StreamAddress, asyncio.Task[None]] = {}
        self._open: dict[StreamAddress, WorkerConnection] = {}
        self._reported = asyncio.Event()

    def name(self, addresses: Iterable[StreamAddress]) -> None:
        """These are the workers. A connection to one that is named no more lasts until the worker ends it."""
        self._named = frozenset(addresses)
        for address in self._named:
            if address not in self._keeping:
                self._keeping[address] = asyncio.create_task(self._keep(address))

    def able(self) -> dict[WorkerConnection, Report]:
        """The workers that take requests, and their last reports; one that is silent only where all are."""
        reports = {connection: connection.report for connection in self._open.values()}
        able = {connection: report for connection, report in reports.items() if report and not report.refusal}
        return {connection: report for connection, report in able.items() if not connection.is_silent} or able

    async def wait_until_able(self, deadline_s: float) -> bool:
        """Wait until a worker takes requests; whether one does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while not self.able():
                    self._reported.clear()
                    await self._reported.wait()
        return bool(self.able())

    async def close(self) -> None:
        """End all connections."""
        tasks = list(self._keeping.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, address: StreamAddress) -> None:
        """Hold a connection to one worker for as long as it is named."""
        try:
            await self._hold(address)
        finally:
            del self._keeping[address]

    async def _hold(self, address: StreamAddress) -> None:
        told = ""
        while address in self._named:
            try:
                channel = await self._connect(address)
            except DoorError as error:
                if str(error) != told:  # and not again with every try
                    log.warning("%s", error)
                told = str(error)
            else:
                told = ""
                connection = self._open[address] = WorkerConnection(channel)
                try:
                    await connection.run(self._changed)
                except Exception:  # whatever it was, the worker is to be reached again
                    log.exception("the connection to %s failed", channel.peer)
                finally:
                    del self._open[address]
            await asyncio.sleep(_RETRY_S)

    def _changed(self) -> None:
        """A worker has reported, or is silent: where another is able, those that leave or are silent hand over."""
        self._reported.set()
        able = [connection for connection in self.able() if not connection.is_silent]
        for connection in list(self._open.values()):
            leaves = connection.report is not None and connection.report.leaving
            if able and (leaves or connection.is_silent):
                connection.hand_over()

    async def _connect(self, address: StreamAddress) -> Channel:
        """Raises DoorError."""
        if address.host == self._host:
            try:
                return await self._to(Path(address.path))
            except DoorError:
                if not address.port:
                    raise
        return await self._to(Address(address.host, address.port))

    async def _to(self, place: Place) -> Channel:
        return await connect(place, self._secret, _CONNECT_S, self._tls)
