"""Which dispatch mode a gang gets, and which steps are cut in two: a cost model of one layer. Imports no torch.

A worker has a message for each shard and a reply from it, one after another, and the last of the shards one for each
worker. In all-to-all the worker also picks out the rows that visit a shard and puts its reply in place, and the shard
lays out as many as have come. The bytes are under way for as long as the busiest end has them. Once a layer, however
many messages it has, an end waits until the other is awake. Ranks that share cores take at least the time of all that
they do.

A layer in one micro-batch takes attention, experts and messages one after another; in two, each half as many rows, it
takes the busier end's part twice, while the other end's is hidden. But both ends read their weights for each half.

Measured beside the model: `python -m divisi.benchmarks dispatch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["broadcast", "all_to_all"]
_GAIN = 0.05
"""What all-to-all has to save before it is taken: an overflow of its buffers runs a step twice."""

_CUT_GAIN = 1.05
"""The factor that two micro-batches have to promise."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a message out and its reply cost two ranks."""

    latency_s: float
    """To be woken, out and back; none where who waits spins."""
    message_s: float
    """Of each end: to hand one over and to take one."""
    bytes_per_s: float
    """From one end to the other."""
    pick_s: float
    """Of the worker in all-to-all: to find the rows that visit a shard, and to put its reply in place."""
    picked_bytes_per_s: float
    """How fast it copies these rows out and back."""
    count_s: float
    """Of the shard in all-to-all: to lay out as many rows as have come."""


# measured on two Zen cores, each a rank's own
MEMORY = Link(0.0, 13e-6, 7e9, pick_s=110e-6, picked_bytes_per_s=3.7e9, count_s=47e-6)
# from data sheets, half of a message at each end; a GPU counts rows where it computes them
ETHERNET_100G = Link(0.0, 3.5e-6, 12.5e9, pick_s=4e-6, picked_bytes_per_s=1e12, count_s=0.0)
NVLINK = Link(0.0, 3e-6, 150e9, pick_s=4e-6, picked_bytes_per_s=1e12, count_s=0.0)


@dataclass(frozen=True, slots=True)
class Load:
    """A layer of a gang."""

    workers: int
    shards: int
    rows: float
    """Of each worker."""
    request_bytes: int
    """Of a row on its way out, with its ids and gates."""
    reply_bytes: int
    hit: float
    """Share of the rows that visit a shard."""
    cores: float = math.inf
    """That all ranks share; without a bound, each has its own."""


def hit_rate(experts_per_token: int, leaves: int, shards: int) -> float:
    """Mean share of rows that visit a shard, where shards serve alike."""
    return visit_rate(experts_per_token, 1.0 / min(shards, leaves))


def visit_rate(experts_per_token: int, share: float) -> float:
    """Share of rows that visit who serves such a share of the leaves, where each expert is on any leaf alike."""
    return 1.0 - (1.0 - share) ** experts_per_token


def layer_s(mode: Mode, load: Load, link: Link) -> float:
    """Seconds that a layer's messages take, the experts left out."""
    workers, shards, exact = load.workers, load.shards, mode == "all_to_all"
    visited_bytes = load.rows * (load.hit if exact else 1.0) * (load.request_bytes + load.reply_bytes)
    moved_s = visited_bytes / link.bytes_per_s
    worker_s = shard_s = link.message_s
    if exact:
        worker_s += link.pick_s + visited_bytes / link.picked_bytes_per_s
        shard_s += link.count_s
    one_after_another_s = shards * worker_s + workers * shard_s + max(workers, shards) * moved_s
    shared_s = workers * shards * (worker_s + shard_s + moved_s) / load.cores
    return link.latency_s + max(one_after_another_s, shared_s)


def plan_mode(load: Load, link: Link) -> Mode:
    """The mode that costs less."""
    exact, broadcast = (layer_s(mode, load, link) for mode in ("all_to_all", "broadcast"))
    return "all_to_all" if exact < (1.0 - _GAIN) * broadcast else "broadcast"


@dataclass(frozen=True, slots=True)
class Core:
    """What a thread computes products of few rows with."""

    bytes_per_s: float
    """Of weights, as they come from memory."""
    row_bytes_per_s: float
    """Of weights times rows, once they are there."""
    ask_s: float
    """To ask for a layer of a micro-batch, however few rows it has."""
    beside: float
    """How much longer a product takes while another core has one: they share the memory."""

    def product_s(self, weight_bytes: float, rows: float) -> float:
        """Seconds that rows take with such weights."""
        return weight_bytes * max(1.0 / self.bytes_per_s, rows / self.row_bytes_per_s)


# a thread of a Zen core, bf16 weights; where one takes 1 two take 0.64
ZEN = Core(bytes_per_s=12e9, row_bytes_per_s=36e9, ask_s=60e-6, beside=1.28)


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer of the model computes with."""

    weight_bytes: float
    """Of its mixer, router and shared expert, on each attention worker."""
    state_bytes: float
    """Of memory that a row reads and writes there."""
    expert_bytes: float
    """Of one expert."""
    held: float
    """Experts of a shard."""
    visited: float
    """How many of these a row visits, in the mean."""

    def attention_s(self, rows: float, core: Core) -> float:
        """Seconds that a worker's rows take, messages and experts left out."""
        return core.product_s(self.weight_bytes, rows) + rows * self.state_bytes / core.bytes_per_s

    def experts_s(self, rows: float, core: Core) -> float:
        """Seconds that a shard takes for so many rows of all workers."""
        touched = self.held * (1.0 - math.pow(1.0 - self.visited / self.held, rows))
        return touched * core.product_s(self.expert_bytes, rows * self.visited / touched)


def cut_gain(layer: Layer, mode: Mode, load: Load, link: Link, core: Core) -> float:
    """How much longer a layer of such a load takes in one micro-batch than in two, as a factor."""
    half = replace(load, rows=load.rows / 2)
    attention_s, experts_s = _ends_s(layer, load, core)
    whole_s = attention_s + experts_s + layer_s(mode, load, link) + core.ask_s
    busier_s = core.beside * max(_ends_s(layer, half, core))
    return whole_s / (2 * (busier_s + layer_s(mode, half, link) + core.ask_s))


def _ends_s(layer: Layer, load: Load, core: Core) -> tuple[float, float]:
    """A worker's and a shard's seconds of computing."""
    return layer.attention_s(load.rows, core), layer.experts_s(load.workers * load.rows, core)


def cut_rows(layer: Layer, mode: Mode, load: Load, link: Link, core: Core, most: int) -> range:
    """How many rows of a worker, `most` at most, are worth two micro-batches; from some number on, or none."""
    least = most + 1
    while least > 2 and cut_gain(layer, mode, replace(load, rows=least - 1), link, core) > _CUT_GAIN:
        least -= 1
    return range(least, most + 1)
