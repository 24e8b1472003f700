"""Gangs inside one process: real sockets and gloo groups, ranks in threads, experts with a dense reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.cluster.dispatch.protocol import Peers, ShardedMode
from divisi.cluster.dispatch.transport.groups import PeerGroup, join_group
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.loops.shard_loop import serve_steps
from divisi.cluster.passes import Pass, PassKind, PassLayers
from divisi.cluster.seats import Address, GangShape, Membership, Seat
from divisi.kernels.experts.reference import sum_in_tree
from divisi.kernels.native.loader import load_library
from divisi.model.placement import ExpertShare, Layout, share_of
from tests.support.credentials import CREDENTIALS

CPU = torch.device("cpu")
SHARED = HostMemory(2**16, 0.0)


@dataclass(frozen=True)
class DenseExperts:
    """Experts small enough to compute one token at a time. `share` is what this rank has."""

    weights_LEDD: Tensor
    share: ExpertShare

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        leaves, size = self.share.leaves, 1 << (self.share.leaves - 1).bit_length()
        sums = []
        for own in self.share.subtrees:
            parts_TKD = torch.zeros(*expert_ids_TK.shape, x_TD.shape[1])
            for t, ids in enumerate(expert_ids_TK.tolist()):
                for k, expert in enumerate(ids):
                    if expert % leaves in own:
                        y_D = torch.tanh(self.weights_LEDD[layer, expert] @ x_TD[t].float())
                        parts_TKD[t, k] = gates_TK[t, k] * y_D
            sums.append(sum_in_tree(parts_TKD, expert_ids_TK % leaves, size))
        return torch.cat(sums, dim=1)

    @property
    def num_leaves(self) -> int:
        return self.share.leaves

    def serving(self, layout: Layout, seat: int) -> DenseExperts:
        return DenseExperts(self.weights_LEDD, share_of(self.weights_LEDD.shape[1], layout.leaves, layout.served[seat]))

    bank = None

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return self.partial_sum(layer, x_TD, expert_ids_TK, gates_TK)


def membership_of(shape: GangShape, store: Address, epoch: int = 1, layout: Layout | None = None) -> Membership:
    """Of all seats but those that serve nothing."""
    served = range(shape.expert_shards) if layout is None else layout.seats
    absent = frozenset(Seat("expert", index) for index in range(len(shape.shard_ranks)) if index not in served)
    holders = tuple(str(seat) for seat in shape.seats if seat not in absent)
    addresses = (Address("127.0.0.1"),) * len(holders)
    return Membership(epoch, shape, holders, addresses, store, absent, layout=layout)


@contextmanager
def gang_groups(
    shape: GangShape, epoch: int = 1, memory: HostMemory | None = SHARED, layout: Layout | None = None
) -> Iterator[list[PeerGroup]]:
    """The groups of all ranks, in rank order: shared memory, or gloo where there is none."""
    load_library()  # compiles where nothing is compiled yet, for longer than ranks wait for each other
    with closing(StoreServer("127.0.0.1", CREDENTIALS)) as store:
        membership = membership_of(shape, store.address, epoch, layout)

        def join(rank: int) -> PeerGroup:
            return join_group(membership, rank, CPU, 20.0, CREDENTIALS, memory=memory)

        with ThreadPoolExecutor(membership.size) as pool:
            groups = list(pool.map(join, range(membership.size)))
        try:
            yield groups
        finally:
            for group in groups:
                group.close()


def full_pass(*counts: int) -> Pass:
    """A full pass to which the workers bring so many rows, in the order of their seats."""
    return Pass(PassKind.FULL, dict(enumerate(counts)))


@contextmanager
def serving_shards(
    shards: Sequence[Peers],
    mode: ShardedMode,
    experts: Callable[[int], DenseExperts],
    steps: Sequence[Sequence[Pass]],
    layers: Sequence[int],
) -> Iterator[None]:
    """Shards in threads that serve steps of full passes, as the product does; their errors are raised at the end."""
    errors: list[BaseException] = []

    def serve(peers: Peers) -> None:
        try:
            serve_steps(steps, mode.shard_end(peers, experts(peers.seat)), PassLayers(full=layers))
        except StepAborted as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(peers,)) for peers in shards]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
