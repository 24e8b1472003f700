"""Two forms of a shard's reply: one fp32 sum of its subtree, or a rounded sum of each of its virtual shards.

A message out and one back between two threads of a process, over shared memory and over gloo; 64 rows of the 80 B
model. Rounded sums need as few virtual shards as there may ever be shards: here eight.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from divisi.cluster.dispatch.transport.groups import PeerGroup, join_group
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.door import Credentials, Secret
from divisi.cluster.gang.loops.threads import SPIN_S
from divisi.cluster.seats import Address, GangShape, Membership

_ROWS, _WIDTH, _LEAVES, _TURNS = 64, 2048, 8, 200
_REQUEST = _ROWS * (2 * _WIDTH + 80)
_SHAPE = GangShape(1, 1)
_CREDENTIALS = Credentials(Secret(bytes(32)))


def report() -> str:
    """A Markdown table."""
    lines = ["| reply of 64 rows, us out and back | kB | shared memory | gloo |", "|---" * 4 + "|"]
    store = StoreServer("127.0.0.1", _CREDENTIALS)
    forms = {f"{_LEAVES // e} rounded (bf16), {e} shards": _ROWS * _LEAVES // e * 2 * _WIDTH for e in (2, 4, 8)}
    forms = {"one fp32 sum, any number of shards": _ROWS * 4 * _WIDTH} | forms
    times = [_measure(store, epoch, list(forms.values()), shared=not epoch) for epoch in (0, 1)]
    for name, size, memory_s, gloo_s in zip(forms, forms.values(), *times, strict=True):
        lines.append(f"| {name} | {size / 1e3:.0f} | {memory_s * 1e6:.0f} | {gloo_s * 1e6:.0f} |")
    return "\n".join(lines)


def _measure(store: StoreServer, epoch: int, sizes: list[int], *, shared: bool) -> list[float]:
    names = tuple(map(str, _SHAPE.seats))
    membership = Membership(epoch, _SHAPE, names, (Address("127.0.0.1"),) * 2, store.address)
    memory = HostMemory(max(*sizes, _REQUEST), SPIN_S) if shared else None

    def join(rank: int) -> PeerGroup:
        return join_group(membership, rank, torch.device("cpu"), 60.0, _CREDENTIALS, memory=memory)

    with ThreadPoolExecutor(2) as pool:
        worker, shard = pool.map(join, range(2))
        answering = pool.submit(_answer, shard, sizes)
        times = [_ask(worker, size) for size in sizes]
        answering.result()
    for group in (worker, shard):
        group.close()
    return times


def _ask(group: PeerGroup, size: int) -> float:
    request_B, reply_B = (torch.zeros(n, dtype=torch.uint8) for n in (_REQUEST, size))
    times = []
    for _ in range(_TURNS):
        begin = time.perf_counter()
        for transfer in (group.send(request_B, 1), group.recv(reply_B, 1)):
            transfer.wait(time.monotonic() + 30)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _answer(group: PeerGroup, sizes: list[int]) -> None:
    request_B = torch.zeros(_REQUEST, dtype=torch.uint8)
    for size in sizes:
        reply_B = torch.zeros(size, dtype=torch.uint8)
        for _ in range(_TURNS):
            for start, data_B in ((group.recv, request_B), (group.send, reply_B)):
                start(data_B, 0).wait(time.monotonic() + 30)
