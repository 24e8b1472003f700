"""A coordinator that other processes reach, and ranks of a gang in processes of their own, to be killed."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.managers import BaseManager
from multiprocessing.process import BaseProcess
from typing import Any

from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.request import Request
from divisi.cluster.spec import GangSpec
from tests.support.credentials import CREDENTIALS
from tests.support.thread_gang import HOST, Shard, Worker, new_coordinator


class _Manager(BaseManager):
    """Serves the coordinator to other processes."""


@contextmanager
def coordinator_server(spec: GangSpec) -> Iterator[tuple[Coordinator, int]]:
    """The coordinator, and the port at which ranks in other processes find it."""
    store = StoreServer(HOST, CREDENTIALS)
    coordinator = new_coordinator(spec, store, lease_s=6.0, grace_s=2.0)
    _Manager.register("coordinator", callable=lambda: coordinator)
    server = _Manager((HOST, 0), authkey=b"test").get_server()
    threading.Thread(target=_serve_forever, args=(server,), daemon=True).start()
    yield coordinator, server.address[1]
    server.stop_event.set()  # type: ignore[attr-defined]
    store.close()


def _serve_forever(server: Any) -> None:
    with suppress(SystemExit):  # how this server ends
        server.serve_forever()


@contextmanager
def rank_processes(spec: GangSpec, port: int) -> Iterator[Callable[..., BaseProcess]]:
    """Starts a shard by its index, or an attention worker by the requests that it is to answer."""
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []

    def start(rank: int | Request, *more: Request) -> BaseProcess:
        run = _run_shard if isinstance(rank, int) else _run_worker
        process = context.Process(target=run, args=(spec, port, rank, *more), daemon=True)
        process.start()
        processes.append(process)
        return process

    try:
        yield start
    finally:
        for process in processes:
            process.kill()
            process.join(10)


def _connect(port: int) -> Any:
    class Client(BaseManager):
        """The other end."""

    Client.register("coordinator")
    client = Client((HOST, port), authkey=b"test")
    client.connect()
    return client.coordinator()  # type: ignore[attr-defined]


def _run_shard(spec: GangSpec, port: int, index: int) -> None:
    Shard(spec, index, _connect(port))
    threading.Event().wait()


def _run_worker(spec: GangSpec, port: int, *requests: Request) -> None:
    Worker(spec, _connect(port)).submit(*requests)
    threading.Event().wait()
