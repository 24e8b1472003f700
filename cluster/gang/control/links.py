"""What connects a rank to its gang during one epoch: the control mesh, the beats and the process group."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from divisi.cluster.dispatch.protocol import Peers
from divisi.cluster.dispatch.transport.groups import PeerGroup, join_group
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.door import Credentials
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.control.beats import Beats
from divisi.cluster.gang.control.mesh import FollowerMesh, LeaderMesh
from divisi.cluster.gang.control.peer import Peer
from divisi.cluster.gang.loops.inbox import Assignment, EpochInbox
from divisi.cluster.seats import Seat

_MEET_S = 8.0


@dataclass(frozen=True, slots=True)
class WorkerLinks:
    """An attention worker's connections."""

    mesh: LeaderMesh | FollowerMesh
    peers: Peers


@dataclass(frozen=True, slots=True)
class ShardLinks:
    """An expert shard's connections."""

    mesh: FollowerMesh
    peers: Peers


@contextlib.contextmanager
def worker_links(
    assignment: Assignment,
    inbox: EpochInbox,
    listener: socket.socket,
    device: torch.device,
    credentials: Credentials,
    spin_s: float = 0.0,
    mark: Callable[[], bytes] = bytes,
) -> Iterator[WorkerLinks]:
    """Meet the other ranks; on the way out all connections are dropped, so that they notice. Raises StepAborted.

    `spin_s` is for how long who waits for a rank of this host keeps its core. `mark` gives a leader what the next
    header carries for observers.
    """
    deadline = time.monotonic() + _MEET_S
    with contextlib.ExitStack() as stack:
        mesh: LeaderMesh | FollowerMesh
        if assignment.rank == 0:
            mesh = LeaderMesh(listener, assignment.membership, inbox, deadline, credentials.secret, mark)
        else:
            mesh = FollowerMesh(assignment.membership, assignment.rank, inbox, deadline, credentials.secret)
        stack.callback(mesh.close)
        with stack.enter_context(_fenced(assignment, inbox, mesh.beats)):
            yield WorkerLinks(mesh, _peers(assignment, inbox, device, credentials, spin_s, stack))


@contextlib.contextmanager
def shard_links(
    assignment: Assignment, inbox: EpochInbox, device: torch.device, credentials: Credentials, spin_s: float = 0.0
) -> Iterator[ShardLinks]:
    """As `worker_links`, for a shard."""
    with contextlib.ExitStack() as stack:
        deadline = time.monotonic() + _MEET_S
        mesh = FollowerMesh(assignment.membership, assignment.rank, inbox, deadline, credentials.secret)
        stack.callback(mesh.close)
        with stack.enter_context(_fenced(assignment, inbox, mesh.beats)):
            yield ShardLinks(mesh, _peers(assignment, inbox, device, credentials, spin_s, stack))


@contextlib.contextmanager
def _fenced(
    assignment: Assignment, inbox: EpochInbox, beats: Mapping[Seat, Peer]
) -> Iterator[contextlib.AbstractContextManager[None]]:
    """Beat, and have the epoch end here as soon as a peer is suspected.

    What may fail for a peer's sake belongs into the context that this gives: who is to blame is settled there, before
    anything is closed.
    """
    membership, blamed = assignment.membership, dict[Seat, str]()

    def suspect(seat: Seat, reason: str) -> None:
        blamed[seat] = reason
        inbox.interrupt(membership.epoch)

    own = membership.seats[assignment.rank]
    thread = Beats(membership.epoch, own, beats, inbox.activity, membership.patience, suspect)
    thread.start()
    try:
        yield _judged(membership.epoch, inbox, blamed)
    finally:
        thread.close()
        inbox.activity.waiting()


@contextlib.contextmanager
def _judged(epoch: int, inbox: EpochInbox, blamed: Mapping[Seat, str]) -> Iterator[None]:
    """An error names those who are suspected. In an epoch that was interrupted it is nobody's fault: this has broken
    the transfers."""
    try:
        yield
    except StepAborted as error:
        if blamed:
            raise StepAborted(", ".join(blamed.values()), ", ".join(map(str, blamed))) from None
        if inbox.is_over(epoch) and error.seat is not None:
            raise StepAborted(f"epoch {epoch} is over") from None
        raise


def _peers(
    assignment: Assignment,
    inbox: EpochInbox,
    device: torch.device,
    credentials: Credentials,
    spin_s: float,
    stack: contextlib.ExitStack,
) -> Peers:
    """The epoch's ranks by seat; a group that is joined is closed with the stack."""

    def join(largest: int) -> PeerGroup:
        membership = assignment.membership
        memory = HostMemory(largest, spin_s) if device.type == "cpu" else None
        check = partial(inbox.check, membership.epoch)
        group = join_group(membership, assignment.rank, device, _MEET_S, credentials, check, inbox.activity, memory)
        stack.callback(group.close)
        inbox.on_interrupt(membership.epoch, group.interrupt)
        return group

    return Peers.of(assignment.membership, assignment.rank, join)
