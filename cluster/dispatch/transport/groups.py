"""Process groups, one per epoch, with gloo, shared memory or NCCL behind one interface.

A group is made directly from its backend class, without torch.distributed's global default group, so that one process
can leave a broken group and join the next without a trace of the old one. Groups of different epochs meet under
different prefixes of one store and cannot hear each other. The store is behind a door; what a backend's own sockets
carry is neither authenticated nor encrypted, and needs a network of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from divisi.cluster.activity import Activity
from divisi.cluster.dispatch.transport.door_store import DoorStore
from divisi.cluster.dispatch.transport.gloo_sockets import GlooSockets
from divisi.cluster.dispatch.transport.host_memory import HostMemory, Segment
from divisi.cluster.dispatch.transport.nccl import NcclTransfer, nccl_backend
from divisi.cluster.door import Credentials
from divisi.cluster.errors import StepAborted
from divisi.cluster.seats import Membership

log = logging.getLogger(__name__)

_TAG = 0
_LOOK_EVERY_S = 0.002
# The type stubs lack most of what the backends have.
_dist: Any = torch.distributed


class Transfer(Protocol):
    """A send or receive under way; the tensor must not be touched before `wait` has returned."""

    def wait(self, deadline: float) -> None:
        """Block until it is done. `deadline` is in `time.monotonic()` seconds. Raises StepAborted."""
        ...


class PeerGroup(Protocol):
    """Point-to-point transfers between the ranks of one epoch. Tensors are contiguous uint8.

    Two ranks must issue their transfers with each other in the same order.
    """

    def send(self, data: Tensor, rank: int) -> Transfer:
        """Start sending."""
        ...

    def recv(self, data: Tensor, rank: int) -> Transfer:
        """Start receiving a message of at most as many bytes as `data` holds."""
        ...

    def interrupt(self) -> None:
        """End all connections, failing what is under way here and at the peers. From any thread."""
        ...

    def close(self) -> None:
        """Drop all connections, failing what is under way at the peers."""
        ...


def join_group(
    membership: Membership,
    rank: int,
    device: torch.device,
    timeout_s: float,
    credentials: Credentials,
    check: Callable[[], None] = lambda: None,
    activity: Activity | None = None,
    memory: HostMemory | None = None,
) -> PeerGroup:
    """Meet all ranks of an epoch; blocks until they are there. Raises StepAborted, and what `check` raises.

    `activity` is told of each wait for a transfer. With `memory`, which all ranks give or none, those of one host that
    exchange rows share memory where they can.
    """
    timeout, activity = timedelta(seconds=timeout_s), activity or Activity()
    try:
        store = DoorStore(membership.store, membership.epoch, credentials, timeout_s)
        sockets = None if device.type == "cuda" else GlooSockets(membership.addresses[rank].host)
        _meet(store, rank, membership, time.monotonic() + timeout_s, check, "" if sockets is None else sockets.told)
        if sockets is None:
            backend = nccl_backend(store, rank, membership.size, timeout)
            interrupt = backend.abort
        else:
            backend = _gloo(store, rank, membership, timeout, sockets)
            interrupt = sockets.shut
        segments = {} if memory is None else memory.open(store, rank, _partners(membership, rank), activity)
    except RuntimeError as error:  # torch.distributed's errors all derive from it
        raise StepAborted(f"cannot form the process group of epoch {membership.epoch}: {error}") from error
    if memory is not None:
        _tell(membership, rank, segments)
    return _BackendGroup(backend, interrupt, membership, activity, segments, store)


def _partners(membership: Membership, rank: int) -> list[int]:
    """The ranks of this rank's host with which it exchanges rows."""
    seats, hosts = membership.seats, [address.host for address in membership.addresses]
    return [
        other
        for other in range(membership.size)
        if other != rank
        and hosts[other] == hosts[rank]
        and (membership.shape.colocated or seats[other].role != seats[rank].role)
    ]


def _tell(membership: Membership, rank: int, segments: Mapping[int, Segment]) -> None:
    """One line for each way in which rows travel on this host."""
    partners = _partners(membership, rank)
    for ranks, how in (
        ([p for p in partners if p in segments], "shared memory with %s"),
        ([p for p in partners if p not in segments], "gloo with %s, on this host but without memory that both opened"),
    ):
        if ranks:
            who = ", ".join(str(membership.seats[p]) for p in ranks)
            log.info(f"epoch %d: {how}", membership.epoch, who)


def _meet(store: Any, rank: int, membership: Membership, deadline: float, check: Callable[[], None], told: str) -> None:
    """Tell the others, and wait until every rank is there: the backends would wait blindly for one that has gone."""
    store.set(f"here/{rank}", told)
    keys = {f"here/{other}": str(seat) for other, seat in enumerate(membership.seats)}
    while not store.check(list(keys)):
        check()
        if time.monotonic() > deadline:
            missing = ", ".join(seat for key, seat in keys.items() if not store.check([key]))
            raise StepAborted(f"did not come to the process group of epoch {membership.epoch}", missing)
        time.sleep(_LOOK_EVERY_S)  # a wait of the store itself could not be called back


def _gloo(store: Any, rank: int, membership: Membership, timeout: timedelta, sockets: GlooSockets) -> Any:
    for other, address in enumerate(membership.addresses):
        if other != rank:
            sockets.learn(address.host, store.get(f"here/{other}").decode())
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [sockets.device]
    return _dist.ProcessGroupGloo(store, rank, membership.size, options)


class _BackendGroup:
    def __init__(
        self,
        backend: Any,
        interrupt: Callable[[], None],
        membership: Membership,
        activity: Activity,
        segments: Mapping[int, Segment],
        store: DoorStore,
    ) -> None:
        self._backend = backend
        self._interrupt = interrupt
        self._store = store  # the backend is in C++, and does not keep it
        self._seats = [str(seat) for seat in membership.seats]
        self._activity = activity
        self._segments = segments
        self._closing = threading.Lock()

    def send(self, data: Tensor, rank: int) -> Transfer:
        segment = self._segments.get(rank)
        return self._start(data, rank, sending=True) if segment is None else segment.send(data, self._seats[rank])

    def recv(self, data: Tensor, rank: int) -> Transfer:
        segment = self._segments.get(rank)
        return self._start(data, rank, sending=False) if segment is None else segment.recv(data, self._seats[rank])

    def _start(self, data: Tensor, rank: int, *, sending: bool) -> Transfer:
        seat, backend = self._seats[rank], self._backend
        if backend is None:
            raise StepAborted("its process group was closed", seat)
        try:
            work = (backend.send if sending else backend.recv)([data], rank, _TAG)
        except RuntimeError as error:
            raise StepAborted(f"transfer failed: {error}", seat) from error
        transfer = NcclTransfer if data.is_cuda else _WorkTransfer
        return transfer(work, seat, self._activity)

    def interrupt(self) -> None:
        self._close_segments()
        self._interrupt()

    def close(self) -> None:
        with self._closing:
            backend, self._backend = self._backend, None
        if backend is not None:
            self._close_segments()
            backend.abort()
            self._store.close()
            # At once, though this group may be in a cycle: gloo's device is a thread that wakes 100 times a second.
            self._interrupt, self._segments = _nothing, {}

    def _close_segments(self) -> None:
        for segment in self._segments.values():
            segment.close()


def _nothing() -> None:
    """What is left to interrupt of a group that was closed."""


@dataclass(frozen=True, slots=True)
class _WorkTransfer:
    work: Any
    seat: str
    activity: Activity

    def wait(self, deadline: float) -> None:
        left_s = max(deadline - time.monotonic(), 0.001)
        self.activity.waiting()
        try:
            self.work.wait(timedelta(seconds=left_s))
        except RuntimeError as error:
            raise StepAborted(f"transfer failed: {error}", self.seat) from error
        self.activity.goes_on()
