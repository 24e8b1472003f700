"""Process groups, one per epoch, with gloo or NCCL behind one interface.

A group is made directly from its backend class, without torch.distributed's global default group, so that one process
can leave a broken group and join the next without a trace of the old one. Groups of different epochs meet under
different prefixes of one store and cannot hear each other.

NCCL has been checked against its documentation only, as no machine with two GPUs was at hand: its waits block the
host, since that is the only way to a deadline, and a group that failed is aborted, never destroyed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from divisi.cluster.activity import Activity
from divisi.cluster.dispatch.gloo_sockets import GlooSockets
from divisi.cluster.errors import StepAborted
from divisi.cluster.seats import Address, Membership

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
        """Start receiving exactly as many bytes as `data` holds."""
        ...

    def interrupt(self) -> None:
        """End all connections, failing what is under way here and at the peers. From any thread."""
        ...

    def close(self) -> None:
        """Drop all connections, failing what is under way at the peers."""
        ...


class StoreServer:
    """Hosts the key-value store through which groups meet. Lives in the coordinator's process, through all epochs."""

    def __init__(self, host: str) -> None:
        self._store = _dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.address = Address(host, self._store.port)


def join_group(
    membership: Membership,
    rank: int,
    device: torch.device,
    timeout_s: float,
    check: Callable[[], None] = lambda: None,
    activity: Activity | None = None,
) -> PeerGroup:
    """Meet all ranks of an epoch; blocks until they are there. Raises StepAborted, and what `check` raises.

    `activity` is told of each wait for a transfer.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        tcp = _dist.TCPStore(membership.store.host, membership.store.port, is_master=False, timeout=timeout)
        store = _dist.PrefixStore(f"epoch-{membership.epoch}", tcp)
        store.set_timeout(timeout)
        sockets = None if device.type == "cuda" else GlooSockets(membership.addresses[rank].host)
        _meet(store, rank, membership, time.monotonic() + timeout_s, check, "" if sockets is None else sockets.told)
        if sockets is None:
            backend = _nccl(store, rank, membership.size, timeout)
            interrupt = backend.abort
        else:
            backend = _gloo(store, rank, membership, timeout, sockets)
            interrupt = sockets.shut
    except RuntimeError as error:  # torch.distributed's errors all derive from it
        raise StepAborted(f"cannot form the process group of epoch {membership.epoch}: {error}") from error
    return _BackendGroup(backend, interrupt, membership, activity or Activity())


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


def _nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = _dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return _dist.ProcessGroupNCCL(store, rank, size, options)


class _BackendGroup:
    def __init__(self, backend: Any, interrupt: Callable[[], None], membership: Membership, activity: Activity) -> None:
        self._backend = backend
        self._interrupt = interrupt
        self._seats = [str(seat) for seat in membership.seats]
        self._activity = activity

    def send(self, data: Tensor, rank: int) -> Transfer:
        return self._start(data, rank, sending=True)

    def recv(self, data: Tensor, rank: int) -> Transfer:
        return self._start(data, rank, sending=False)

    def _start(self, data: Tensor, rank: int, *, sending: bool) -> Transfer:
        seat, backend = self._seats[rank], self._backend
        if backend is None:
            raise StepAborted("its process group was closed", seat)
        try:
            work = (backend.send if sending else backend.recv)([data], rank, _TAG)
        except RuntimeError as error:
            raise StepAborted(f"transfer failed: {error}", seat) from error
        return _WorkTransfer(work, seat, self._activity)

    def interrupt(self) -> None:
        self._interrupt()

    def close(self) -> None:
        if self._backend is not None:
            self._backend.abort()
            self._backend = None


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
