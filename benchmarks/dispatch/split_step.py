"""A decode step of one attention worker and one expert shard, over shared memory and over gloo, beside one process.

Without Ray and HTTP: what is compared is the step. A pipe carries the header that the control mesh carries in a gang.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from divisi.benchmarks.contenders import CONTEXT, DivisiEngine, gang_spec, prompts
from divisi.cluster.assembly import (
    build_engine,
    cuts,
    even_layout,
    load_shard,
    pass_layers,
    served_config,
    sharded_mode,
)
from divisi.cluster.dispatch.protocol import Peers
from divisi.cluster.dispatch.transport.groups import PeerGroup, join_group
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.door import Credentials, Secret
from divisi.cluster.engine.step.plan import StepPlan
from divisi.cluster.gang.loops.shard_loop import serve_steps
from divisi.cluster.gang.loops.threads import SPIN_S
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import Address, GangShape, Membership
from divisi.cluster.spec import GangSpec
from divisi.model.checkpoint import Checkpoint

_SHAPE = GangShape(1, 1)
_CPU = torch.device("cpu")
_BATCHES = (1, 16, 32)
_STEPS = 32
_SPLIT: tuple[tuple[str, Literal["never", "always"], float | None], ...] = (
    ("shared memory", "never", SPIN_S),
    ("shared memory, two micro-batches", "always", SPIN_S),
    ("gloo", "never", None),
    ("gloo, two micro-batches", "always", None),
)
"""Which micro-batches, and how long who waits spins, where memory is shared."""
_CREDENTIALS = Credentials(Secret(bytes(32)))


def report(model_dir: Path, rounds: int) -> str:
    """Milliseconds per step, medians, as a Markdown table; in turns, so that a disturbance hits all of them.

    Raises AssertionError where a split gang answers with other tokens than one process.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = gang_spec(model_dir, _SHAPE, "bfloat16", 1)
    local = DivisiEngine.local(model_dir, "bfloat16")
    with contextlib.ExitStack() as stack:
        split = {
            name: stack.enter_context(_split_gang(replace(spec, micro_batches=wanted), spin_s))
            for name, wanted, spin_s in _SPLIT
        }
        contenders = {
            "local, 1 thread": (local, 1),
            **{f"split 1A+1E, 1 thread each, {name}": (engine, 1) for name, engine in split.items()},
            f"local, {threads} threads": (local, threads),
        }
        _check(contenders, served_config(spec).vocab_size)
        rows: dict[str, list[list[float]]] = {name: [[] for _ in _BATCHES] for name in contenders}
        for turn in range(rounds + 1):
            for column, batch in enumerate(_BATCHES):
                for name, (contender, count) in contenders.items():
                    torch.set_num_threads(count)
                    milliseconds = contender.decode(batch, _STEPS) / _STEPS * 1e3
                    if turn:
                        rows[name][column].append(milliseconds)
    torch.set_num_threads(threads)
    return f"{_table(rows)}\n\n{_planned(spec)}"


def _planned(spec: GangSpec) -> str:
    """Which steps the planner would cut."""
    rows = cuts(replace(spec, micro_batches="auto"), served_config(spec), spec.max_seqs).rows
    return f"Of up to {spec.max_seqs} rows, the planner cuts " + (f"from {rows.start} on." if rows else "none.")


def _check(contenders: Mapping[str, tuple[DivisiEngine, int]], vocabulary: int) -> None:
    """All give the same tokens, in every batch."""
    for batch in _BATCHES:
        asked = prompts(batch, CONTEXT, vocabulary)
        first, *others = (engine.generate(asked, _STEPS) for engine, _ in contenders.values())
        assert all(answers == first for answers in others), f"tokens of {batch} sequences differ"


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

    def announce(plan: StepPlan) -> None:
        """Begin the pass on both ends, as the loops do by a header."""
        step_pass = Pass(PassKind.FULL, {0: plan.num_rows}, {0: plan.second} if plan.second else {})
        pipe.send((step_pass,))
        end.begin(step_pass)

    try:
        yield DivisiEngine("divisi split", engine, end, config.vocab_size, announce)
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
        experts = load_shard(spec, config, checkpoint, even_layout(spec, config).served[0])
    peers = Peers.of(membership, 1, lambda largest: _join(membership, 1, largest, spin_s))
    end = sharded_mode(spec, config).shard_end(peers, experts)
    serve_steps(iter(pipe.recv, ()), end, pass_layers(config))
