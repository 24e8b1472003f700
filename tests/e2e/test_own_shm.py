"""Servers whose ranks are on one machine, with and without a /dev/shm in common: both serve, and say how rows travel.

The shard's node is as in a container that shares the host's network alone: its own /dev/shm and processes' numbers.
What ranks share has no name and does not lie there, but the socket does over which it is handed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.namespaces import OWN_PIDS, OWN_SHM, can_unshare, in_a_mount_namespace

from .conftest import is_shard
from .test_deaths_owners import Nodes, cluster_of_nodes

pytestmark = [
    pytest.mark.verify,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not can_unshare(), reason="this machine lets nobody have a mount namespace of his own"),
]

ROLES = {"ingress": "worker", "attention": "worker", "experts": "shard"}
TOGETHER = "shared memory with expert:0"
APART = "gloo with expert:0, on this host but without memory that both opened"
ASKED = [
    {"prompt": "What is 17 + 25?", "temperature": 0},
    {"prompt": "Once upon a time", "temperature": 0},
    {"prompt": "Once upon a time", "temperature": 1.0, "seed": 7},
    {"prompt": "Once upon a time", "temperature": 1.0, "seed": 8},
]


@dataclass(frozen=True)
class Served:
    """What a server has answered, and how it says that rows have travelled."""

    texts: list[str]
    ways: list[str]
    """Of each epoch, in its order."""
    mapped: list[bool]
    """Whether the worker and the shard have a segment, by the kernel's word."""


def serve(log: Path, before: Sequence[Sequence[str]], *flags: str) -> Served:
    """One attention worker and one shard, each on a node of its own, before whose commands `before` comes."""
    with cluster_of_nodes() as nodes:
        nodes.add("--num-cpus=4", "--labels=role=worker", *flags, before=before[0])
        nodes.add("--num-cpus=2", "--labels=role=shard", *flags, before=before[1])
        placement = {role: {"labels": {"role": where}} for role, where in ROLES.items()}
        nodes.deploy("one", placement=repr({"placement": placement, "log": {"file": str(log)}}))
        texts = [text(f"{nodes.url}/one/v1/completions", body) for body in ASKED]
        found = re.findall(r"epoch (\d+): ((?:shared memory|gloo) with [^\"\n]*)", log.read_text())
        assert len({epoch for epoch, _ in found}) == len(found), f"more than a line of an epoch: {found}"
        return Served(texts, [way for _, way in found], mapped(nodes))


def text(url: str, body: Mapping[str, object]) -> str:
    asked = {"model": "divisi-demo", "max_tokens": 100, "ignore_eos": True, **body}
    return httpx.post(url, json=asked, timeout=120).raise_for_status().json()["choices"][0]["text"]


def mapped(nodes: Nodes) -> list[bool]:
    (worker,) = nodes.processes("AttentionWorker")
    (shard,) = [process for process in nodes.processes("ExpertShardActor") if is_shard(process)]
    return ["memfd:divisi" in Path(f"/proc/{rank.pid}/maps").read_text() for rank in (worker, shard)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """An undisturbed server."""
    return serve(tmp_path_factory.mktemp("together") / "log", ((), ()))


def test_ranks_of_one_machine_share_memory(together: Served) -> None:
    assert set(together.ways) == {TOGETHER}
    assert together.mapped == [True, True]
    assert len(set(together.texts)) == len(ASKED), "equal answers would show little"


def test_a_shard_with_its_own_shm_falls_back_and_serves(together: Served, tmp_path: Path) -> None:
    apart = serve(tmp_path / "log", ((), in_a_mount_namespace(OWN_SHM, *OWN_PIDS)))
    assert set(apart.ways) == {APART}
    assert apart.mapped == [False, False]
    assert apart.texts == together.texts


def test_a_server_that_may_not_write_to_shm_falls_back_and_serves(together: Served, tmp_path: Path) -> None:
    """Ray keeps its objects elsewhere then."""
    log, sealed = tmp_path / "log", in_a_mount_namespace("mount -t tmpfs -o ro none /dev/shm")
    apart = serve(log, (sealed, sealed), f"--plasma-directory={tmp_path}", "--object-store-memory=80000000")
    assert set(apart.ways) == {APART}
    assert apart.mapped == [False, False]
    assert "no segment can be handed over in /dev/shm/divisi-0: " in log.read_text()
    assert apart.texts == together.texts
