"""A decode step of one attention worker and one expert shard over gloo, beside the same step in one process.

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
from divisi.cluster.dispatch.groups import StoreServer, join_group
from divisi.cluster.dispatch.protocol import Peers, WorkerEnd
from divisi.cluster.gang.shard_loop import serve_steps
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import Address, GangShape, Membership
from divisi.cluster.spec import GangSpec
from divisi.model.checkpoint import Checkpoint
from divisi.model.dispatcher import Pending

_SHAPE = GangShape(1, 1)
_CPU = torch.device("cpu")
_BATCHES = (1, 16)
_STEPS = 32


def report(model_dir: Path, rounds: int) -> str:
    """Milliseconds per step, medians, as a Markdown table; the gang splits the threads that `local` has."""
    threads = torch.get_num_threads()
    local = DivisiEngine.local(model_dir, "bfloat16")
    rows: dict[str, list[list[float]]] = {"local": [[] for _ in _BATCHES], "split 1A+1E": [[] for _ in _BATCHES]}
    shares = max(threads // 2, 1)
    with _split_gang(gang_spec(model_dir, _SHAPE, "bfloat16", shares), shares) as split:
        for turn in range(rounds + 1):
            for column, batch in enumerate(_BATCHES):
                for name, contender, count in (("local", local, threads), ("split 1A+1E", split, shares)):
                    torch.set_num_threads(count)
                    milliseconds = contender.decode(batch, _STEPS) / _STEPS * 1e3
                    if turn:
                        rows[name][column].append(milliseconds)
    torch.set_num_threads(threads)
    return _table(rows, threads, shares)


def _table(rows: dict[str, list[list[float]]], threads: int, shares: int) -> str:
    titles = {"local": f"local, {threads} threads", "split 1A+1E": f"split 1A+1E, {shares} thread(s) each, gloo"}
    lines = ["| ms per decode step | " + " | ".join(f"batch {batch}" for batch in _BATCHES) + " |"]
    lines.append("|---" * (len(_BATCHES) + 1) + "|")
    for name, columns in rows.items():
        shown = [f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})" for times in columns]
        lines.append(f"| {titles[name]} | " + " | ".join(shown) + " |")
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
def _split_gang(spec: GangSpec, threads: int) -> Iterator[DivisiEngine]:
    config = served_config(spec)
    store = StoreServer("127.0.0.1")
    here = Address("127.0.0.1")
    membership = Membership(1, _SHAPE, ("worker", "shard"), (here, here), store.address)
    pipe, theirs = multiprocessing.Pipe()
    shard = multiprocessing.get_context("spawn").Process(
        target=_serve_shard, args=(spec, membership, threads, theirs), daemon=True
    )
    shard.start()
    engine, _ = build_engine(spec, config)
    group = join_group(membership, 0, _CPU, 60.0)
    end = sharded_mode(spec, config).worker_end(Peers.of(membership, 0, lambda: group))
    try:
        announcing = _Announcing(end, pipe, config.moe_layers[0])
        yield DivisiEngine("divisi split", engine, announcing, config.vocab_size)
    finally:
        pipe.send(())
        shard.join(10)
        group.close()


def _serve_shard(spec: GangSpec, membership: Membership, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    config = served_config(spec)
    with contextlib.closing(Checkpoint.open(spec.model_dir)) as checkpoint:
        experts = load_shard(spec, config, checkpoint, 0)
    group = join_group(membership, 1, _CPU, 60.0)
    end = sharded_mode(spec, config).shard_end(Peers.of(membership, 1, lambda: group), experts)
    serve_steps(iter(pipe.recv, ()), end, pass_layers(config))
    group.close()
