"""Memory that ranks of one host share: how they come to it, and what happens where they cannot."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.transport.groups import PeerGroup, join_group
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.errors import StepAborted
from divisi.cluster.seats import GangShape, Membership
from divisi.kernels.native.loader import load_library
from divisi.kernels.ring.ring import Outcome, Ring
from tests.support.credentials import CREDENTIALS
from tests.support.gangs import CPU, gang_groups, membership_of
from tests.support.namespaces import OWN_PIDS, OWN_SHM, can_unshare, in_a_mount_namespace

PAIR = GangShape(1, 1)
SHARED = HostMemory(4096, 0.001)


def message(size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize("spin_s", [0.0, 0.001])
def test_messages_come_whole_and_in_order_both_ways(spin_s: float) -> None:
    """More of them than there are slots, while nobody takes them yet."""
    with gang_groups(PAIR, memory=replace(SHARED, spin_s=spin_s)) as groups:
        for sender, receiver in ((0, 1), (1, 0)):
            sent = [message(size, seed) for seed, size in enumerate([1, 64, 4096, 7, 100, 0, 2000, 3, 4096])]

            def take(receiver: int, sent: list[Tensor]) -> list[Tensor]:
                got = [torch.zeros(len(data), dtype=torch.uint8) for data in sent]
                for data in got:
                    groups[receiver].recv(data, 1 - receiver).wait(soon())
                return got

            with ThreadPoolExecutor(1) as pool:
                puts = [groups[sender].send(data, receiver) for data in sent]
                got = pool.submit(take, receiver, sent)
                for put in puts:
                    put.wait(soon())
                assert all(torch.equal(a, b) for a, b in zip(got.result(), sent, strict=True))


def test_a_shorter_message_leaves_the_rest_of_the_room_alone() -> None:
    with gang_groups(PAIR, memory=SHARED) as groups:
        groups[0].send(message(5, 1), 1).wait(soon())
        room = torch.full((9,), 255, dtype=torch.uint8)
        groups[1].recv(room, 0).wait(soon())
        assert torch.equal(room[:5], message(5, 1))
        assert room[5:].tolist() == [255] * 4


@pytest.mark.parametrize("spin_s", [0.0, 0.05])
def test_waits_end_at_their_deadline(spin_s: float) -> None:
    with gang_groups(PAIR, memory=replace(SHARED, spin_s=spin_s)) as groups:
        begin = time.monotonic()
        with pytest.raises(StepAborted, match="expert:0"):
            groups[0].recv(message(5, 0), 1).wait(begin + 0.1)
        assert 0.1 <= time.monotonic() - begin < 5.0
        puts = [groups[0].send(message(8, i), 1) for i in range(6)]
        with pytest.raises(StepAborted, match="deadline"):
            puts[-1].wait(time.monotonic() + 0.1)


@pytest.mark.parametrize("spin_s", [0.0, 10.0])
def test_who_waits_notices_that_the_other_has_left(spin_s: float) -> None:
    with gang_groups(PAIR, memory=replace(SHARED, spin_s=spin_s)) as groups, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(lambda: groups[0].recv(message(5, 0), 1).wait(soon(30)))
        groups[1].close()
        with pytest.raises(StepAborted, match="expert:0"):
            waits.result(5)


@pytest.mark.parametrize("spin_s", [0.0, 10.0])
def test_who_waits_notices_that_the_other_has_died(spin_s: float) -> None:
    """Nobody has closed the ring: only the connection says it."""
    library = load_library()
    assert library is not None
    near, far = socket.socketpair()
    with near:
        ring = Ring(library, mmap.mmap(-1, Ring.size(64)), 0, 64, near.fileno(), spin_s)
        far.close()
        begin = time.monotonic()
        assert ring.take(message(8, 0).data_ptr(), 8, wait_s=30.0) is Outcome.GONE
        assert time.monotonic() - begin < 5.0


def test_what_is_too_long_ends_the_epoch_and_is_not_cut() -> None:
    with gang_groups(PAIR, memory=SHARED) as groups:
        with pytest.raises(StepAborted, match="longer than was agreed"):
            groups[0].send(message(4097, 0), 1)
        groups[1].send(message(10, 0), 0).wait(soon())
        with pytest.raises(StepAborted, match="longer than was agreed"):
            groups[0].recv(message(9, 0), 1).wait(soon())


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    """Compiled before ranks wait for each other, where nothing is compiled yet."""
    load_library()


def joined(memories: list[HostMemory], shape: GangShape = PAIR) -> list[PeerGroup]:
    store = StoreServer("127.0.0.1", CREDENTIALS)
    membership = membership_of(shape, store.address)
    with ThreadPoolExecutor(shape.size) as pool:
        joins = [
            pool.submit(join_group, membership, rank, CPU, 20.0, CREDENTIALS, memory=memories[rank])
            for rank in range(shape.size)
        ]
        return [join.result() for join in joins]


def check_transfer(groups: list[PeerGroup], one: int, other: int) -> None:
    got = torch.zeros(100, dtype=torch.uint8)
    receiving = groups[other].recv(got, one)
    groups[one].send(message(100, 3), other).wait(soon())
    receiving.wait(soon())
    assert torch.equal(got, message(100, 3))


@pytest.mark.parametrize("alone", [0, 1, 2])
def test_a_rank_that_cannot_open_it_stays_with_gloo(
    alone: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container with a /dev/shm of its own; the others share memory all the same. One line says so."""
    caplog.set_level(logging.INFO)
    elsewhere = tmp_path / "shm"
    memories = [SHARED, SHARED, SHARED]
    memories[alone] = replace(SHARED, folder=elsewhere)
    shape = GangShape(1, 2)
    groups = joined(memories, shape)
    try:
        for shard in (1, 2):
            check_transfer(groups, 0, shard)
            check_transfer(groups, shard, 0)
    finally:
        for group in groups:
            group.close()
    lines = [record.getMessage() for record in caplog.records if "gloo with" in record.getMessage()]
    assert len(lines) == (3 if alone == 0 else 2), lines
    assert all("without memory that both opened" in line for line in lines)


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    for group in joined([replace(SHARED, folder=folder)] * 2):
        group.close()
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700


_RANK = """
import sys, torch
from divisi.cluster.dispatch.transport.groups import join_group
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.seats import Address
from tests.support.credentials import CREDENTIALS
from tests.support.gangs import CPU, membership_of
from divisi.cluster.seats import GangShape
group = join_group(membership_of(GangShape(1, 1), Address("127.0.0.1", int(sys.argv[1]))), 1, CPU, 20.0, CREDENTIALS,
                   memory=HostMemory(4096, 0.001))
print("shared" if group._segments else "gloo", flush=True)
data = torch.zeros(5, dtype=torch.uint8)
while True:
    group.recv(data, 0).wait(float("1e9"))
    group.send(data, 0).wait(float("1e9"))
"""


@pytest.fixture
def other_process() -> Callable[[int], subprocess.Popen[str]]:
    def start(port: int, *before: str) -> subprocess.Popen[str]:
        command = [*before, sys.executable, "-c", _RANK, str(port)]
        root = Path(__file__).parents[4]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True)

    return start


def echo(group: PeerGroup, data: Tensor) -> Tensor:
    got = torch.zeros_like(data)
    receiving = group.recv(got, 1)
    group.send(data, 1).wait(soon(20))
    receiving.wait(soon(20))
    return got


def in_epoch(store: StoreServer) -> Membership:
    return membership_of(PAIR, store.address)


def test_a_killed_process_is_noticed_at_once(other_process: Callable[[int], subprocess.Popen[str]]) -> None:
    store = StoreServer("127.0.0.1", CREDENTIALS)
    other = other_process(store.address.port)
    try:
        group = join_group(in_epoch(store), 0, CPU, 60.0, CREDENTIALS, memory=SHARED)
        assert torch.equal(echo(group, message(5, 7)), message(5, 7))
        assert other.stdout is not None
        assert other.stdout.readline() == "shared\n"
        os.kill(other.pid, signal.SIGSTOP)  # so that it takes nothing more
        waiting = group.recv(message(5, 0), 1)
        os.kill(other.pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(StepAborted, match="expert:0"):
            waiting.wait(soon(30))
        assert time.monotonic() - begin < 2.0
        group.close()
    finally:
        other.kill()
        other.wait(10)


@pytest.mark.verify
@pytest.mark.skipif(not can_unshare(), reason="this machine lets nobody have a mount namespace of his own")
@pytest.mark.parametrize(
    ("namespaces", "way"),
    [
        pytest.param(in_a_mount_namespace(OWN_SHM), "gloo", id="own-shm"),
        pytest.param(in_a_mount_namespace("true", *OWN_PIDS), "shared", id="own-pids"),
        pytest.param(in_a_mount_namespace(OWN_SHM, *OWN_PIDS), "gloo", id="own-shm-and-pids"),
    ],
)
def test_what_keeps_a_process_from_sharing_memory_is_a_shm_of_its_own(
    namespaces: tuple[str, ...], way: str, other_process: Callable[..., subprocess.Popen[str]]
) -> None:
    """It serves all the same. Process numbers do not matter: the segment has no name, and comes through the socket."""
    store = StoreServer("127.0.0.1", CREDENTIALS)
    other = other_process(store.address.port, *namespaces)
    try:
        group = join_group(in_epoch(store), 0, CPU, 60.0, CREDENTIALS, memory=SHARED)
        assert torch.equal(echo(group, message(5, 7)), message(5, 7))
        assert other.stdout is not None
        assert other.stdout.readline() == f"{way}\n"
        group.close()
    finally:
        other.kill()
        other.wait(10)
