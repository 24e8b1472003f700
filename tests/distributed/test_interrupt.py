"""A wait for a peer that says nothing is broken from another thread, and no other group of the process with it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from divisi.cluster.dispatch.transport.groups import PeerGroup, join_group
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.errors import StepAborted
from divisi.cluster.seats import GangShape
from tests.support.credentials import CREDENTIALS
from tests.support.gangs import CPU, membership_of
from tests.support.thread_gang import HOST


def pair(store: StoreServer, epoch: int) -> list[PeerGroup]:
    """Two ranks of this process."""
    membership = membership_of(GangShape(1, 1), store.address, epoch)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: join_group(membership, rank, CPU, 20.0, CREDENTIALS), range(2)))


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_wait_ends_when_another_thread_interrupts_the_group(waiting: int) -> None:
    store = StoreServer(HOST, CREDENTIALS)
    groups, others = pair(store, 1), pair(store, 2)
    failed: list[float] = []

    def wait() -> None:
        begin = time.monotonic()
        with pytest.raises(StepAborted, match="transfer failed"):
            groups[waiting].recv(torch.empty(8, dtype=torch.uint8), 1 - waiting).wait(begin + 60.0)
        failed.append(time.monotonic() - begin)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)  # it waits, or is about to: both have to end
    groups[waiting].interrupt()
    thread.join(30)
    assert failed
    assert failed[0] < 20.0
    sent, got = torch.arange(8, dtype=torch.uint8), torch.empty(8, dtype=torch.uint8)
    transfers = [others[0].send(sent, 1), others[1].recv(got, 0)]
    for transfer in transfers:
        transfer.wait(time.monotonic() + 20.0)
    assert torch.equal(sent, got)
    for group in (*groups, *others):
        group.close()
