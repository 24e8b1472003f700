"""A decode step of one attention worker and one expert shard, over shared memory and over gloo, beside one process.

Without Ray and HTTP: what is compared is the step. A pipe carries the header that the control mesh carries in a gang.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from divisi.benchmarks.contenders import DivisiEngine, gang_spec
from divisi.cluster.assembly import build_engine, load_shard, pass_layers, served_config, sharded_mode
from divisi.cluster.dispatch.groups import PeerGroup, join_group
from divisi.cluster.dispatch.host_memory import HostMemory
from divisi.cluster.dispatch.protocol import Peers, WorkerEnd
from divisi.cluster.dispatch.rendezvous import StoreServer
from divisi.cluster.door import Credentials, Secret
from divisi.cluster.gang.loops.shard_loop import serve_steps
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import Address, GangShape, Membership
from divisi.cluster.spec import GangSpec
from divisi.model.checkpoint import Checkpoint
from divisi.model.dispatcher import Pending

_SHAPE = GangShape(1, 1)
_CPU = torch.device("cpu")
_BATCHES = (1, 16)
_STEPS = 32
_SPIN_S = 0.002
_CREDENTIALS = Credentials(Secret(bytes(32)))


def report(model_dir: Path, rounds: int) -> str:
    """Milliseconds per step, medians, as a Markdown table; in turns, so that a disturbance hits all of them."""
    threads = torch.get_num_threads()
    spec = gang_spec(model_dir, _SHAPE, "bfloat16", 1)
    local = DivisiEngine.local(model_dir, "bfloat16")
    with _split_gang(spec, _SPIN_S) as memory, _split_gang(spec, None) as gloo:
        contenders = {
            "local, 1 thread": (local, 1),
            "split 1A+1E, 1 thread each, shared memory": (memory, 1),
            "split 1A+1E, 1 thread each, gloo": (gloo, 1),
            f"local, {threads} threads": (local, threads),
        }
        rows: dict[str, list[list[float]]] = {name: [[] for _ in _BATCHES] for name in contenders}
        for turn in range(rounds + 1):
            for column, batch in enumerate(_BATCHES):
                for name, (contender, count) in contenders.items():
                    torch.set_num_threads(count)
                    milliseconds = contender.decode(batch, _STEPS) / _STEPS * 1e3
                    if turn:
                        rows[name][column].append(milliseconds)
    torch.set_num_threads(threads)
    return _table(rows)


def _table(rows: dict[str, list[list[float]]]) -> str:
    lines = ["| ms per decode step | " + " | ".join(f"batch {batch} | : local" for batch in _BATCHES) + " |"]
    lines.append("|---" * (2 * len(_BATCHES) + 1) + "|")
    medians = {name: [statistics.median(times) for times in columns] for name, columns in rows.items()}
    first = next(iter(medians.values()))
    for name, columns in rows.items():
        shown = [
            f"{median:.2f} ({min(times):.2f} to {max(times):.2f}) | {median / base:.2f}"
            for median, times, base in zip(medians[name], columns, first, strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


class _Announcing:
    """Begins each step's pass on both ends at its first layer, as the loops do by a header before it."""

    def __init__(self, end: WorkerEnd, pipe: Connection, first_layer: int) -> None:
        self._end, self._pipe, self._first_layer = end, pipe, first_layer

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        if layer == self._first_layer:
            step_pass = Pass(PassKind.FULL, {0: x_TD.shape[0]})
            self._pipe.send((step_pass,))
            self._end.begin(step_pass)
        return self._end.dispatch(layer, x_TD, expert_ids_TK, gates_TK)


@contextlib.contextmanager
def _split_gang(spec: GangSpec, spin_s: float | None) -> Iterator[DivisiEngine]:
    """A worker here and a shard in a process of its own, who share memory if `spin_s` says how long waiting spins."""
    config = served_config(spec)
    store = StoreServer("127.0.0.1", _CREDENTIALS)
    here = Address("127.0.0.1")
    membership = Membership(1, _SHAPE, ("worker", "shard"), (here, here), store.address)
    pipe, theirs = multiprocessing.Pipe()
    shard = multiprocessing.get_context("spawn").Process(
        target=_serve_shard, args=(spec, membership, spin_s, theirs), daemon=True
    )
    shard.start()
    engine, _ = build_engine(spec, config)
    peers = Peers.of(membership, 0, lambda largest: _join(membership, 0, largest, spin_s))
    end = sharded_mode(spec, config).worker_end(peers)
    try:
        announcing = _Announcing(end, pipe, config.moe_layers[0])
        yield DivisiEngine("divisi split", engine, announcing, config.vocab_size)
    finally:
        pipe.send(())
        shard.join(10)


def _join(membership: Membership, rank: int, largest: int, spin_s: float | None) -> PeerGroup:
    memory = None if spin_s is None else HostMemory(largest, spin_s)
    return join_group(membership, rank, _CPU, 60.0, _CREDENTIALS, memory=memory)


def _serve_shard(spec: GangSpec, membership: Membership, spin_s: float | None, pipe: Connection) -> None:
    torch.set_num_threads(1)
    config = served_config(spec)
    with contextlib.closing(Checkpoint.open(spec.model_dir)) as checkpoint:
        experts = load_shard(spec, config, checkpoint, 0)
    peers = Peers.of(membership, 1, lambda largest: _join(membership, 1, largest, spin_s))
    end = sharded_mode(spec, config).shard_end(peers, experts)
    serve_steps(iter(pipe.recv, ()), end, pass_layers(config))
