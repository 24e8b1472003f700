"""What the planner's model is made of, measured here between a worker and a shard in processes of their own.

Each constant is what an end spends by its own clock, or waits, in passes of few and of many rows. The model is then
held against other numbers of rows, and against gangs of other shapes.
"""

from __future__ import annotations

from collections.abc import Callable

from divisi.benchmarks.dispatch.layers import Times, Work, load_of, measure
from divisi.cluster.dispatch.planner import Link, Mode
from divisi.cluster.seats import GangShape

_SHAPE = GangShape(1, 1)
_FEW, _MANY = 1, 96


def link(rounds: int, *, sleeps: bool) -> Link:
    """Of ranks that share memory, and give up their cores at once when they wait, or not."""
    times, load = measure(Work(_SHAPE, (_FEW, _MANY), rounds, sleeps)), load_of(_SHAPE, 1)
    row_bytes = load.request_bytes + load.reply_bytes

    def line(mode: Mode, part: Callable[[Times], float]) -> tuple[float, float]:
        """Seconds that a layer takes without rows, and that each byte of them adds."""
        few_s, many_s = part(times[mode, _FEW]), part(times[mode, _MANY])
        byte_s = (many_s - few_s) / ((_MANY - _FEW) * row_bytes)
        return few_s - _FEW * row_bytes * byte_s, byte_s

    whole_s, moved_s = line("broadcast", lambda layer: layer.whole_s)
    worker_s, _ = line("broadcast", lambda layer: layer.worker_s)
    shard_s, _ = line("broadcast", lambda layer: layer.shard_s)
    picking_worker_s, _ = line("all_to_all", lambda layer: layer.worker_s)
    counting_shard_s, _ = line("all_to_all", lambda layer: layer.shard_s)
    _, picked_and_moved_s = line("all_to_all", lambda layer: layer.whole_s)
    worked_s = min(worker_s + shard_s, whole_s)  # less is seen of what an end does once the other has its message
    return Link(
        latency_s=whole_s - worked_s,
        message_s=worked_s / 2,
        bytes_per_s=1.0 / moved_s,
        pick_s=picking_worker_s - worker_s,
        picked_bytes_per_s=1.0 / max(picked_and_moved_s - moved_s, 1e-15),
        count_s=counting_shard_s - shard_s,
    )
