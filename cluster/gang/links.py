"""What connects a rank to its gang during one epoch: the control mesh and the process group."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from divisi.cluster.dispatch.groups import PeerGroup, join_group
from divisi.cluster.gang.inbox import Assignment, EpochInbox
from divisi.cluster.gang.mesh import FollowerMesh, LeaderMesh

_MEET_S = 15.0


@dataclass(frozen=True, slots=True)
class WorkerLinks:
    """An attention worker's connections; where all experts are at hand there is no group."""

    mesh: LeaderMesh | FollowerMesh
    group: PeerGroup | None


@dataclass(frozen=True, slots=True)
class ShardLinks:
    """An expert shard's connections."""

    mesh: FollowerMesh
    group: PeerGroup


@contextlib.contextmanager
def worker_links(
    assignment: Assignment, inbox: EpochInbox, listener: socket.socket, device: torch.device
) -> Iterator[WorkerLinks]:
    """Meet the other ranks; on the way out all connections are dropped, so that they notice. Raises StepAborted."""
    membership, rank = assignment.membership, assignment.rank
    deadline = time.monotonic() + _MEET_S
    with contextlib.ExitStack() as stack:
        mesh: LeaderMesh | FollowerMesh
        if rank == 0:
            mesh = LeaderMesh(listener, membership, inbox, deadline)
        else:
            mesh = FollowerMesh(membership, rank, inbox, deadline)
        stack.callback(mesh.close)
        group = None
        if membership.shape.expert_shards and membership.shape.size > 1:
            group = join_group(membership, rank, device, _MEET_S)
            stack.callback(group.close)
        yield WorkerLinks(mesh, group)


@contextlib.contextmanager
def shard_links(assignment: Assignment, inbox: EpochInbox, device: torch.device) -> Iterator[ShardLinks]:
    """As `worker_links`, for a shard."""
    mesh = FollowerMesh(assignment.membership, assignment.rank, inbox, time.monotonic() + _MEET_S)
    with contextlib.closing(mesh):
        group = join_group(assignment.membership, assignment.rank, device, _MEET_S)
        with contextlib.closing(group):
            yield ShardLinks(mesh, group)
