"""Which dispatch mode a gang gets: a cost model of one layer. Imports no torch.

A layer takes as long as its busiest end: the worker, which handles one message out and one back for each shard, or the
shard, with one of each for each worker. A message costs `message_s`, and a row its bytes both ways. All-to-all sends a
row to the shards that it visits only, and picks rows out and puts them back: `pick_s` for each shard, and their bytes.

Measured beside the model: `benchmarks/results/dispatch.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["broadcast", "all_to_all"]
_GAIN = 0.05
"""What all-to-all has to save before it is taken: an overflow of its buffers runs a step twice."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a message costs between two ranks."""

    message_s: float
    bytes_per_s: float
    pick_s: float
    """To find the rows that visit a shard, and to put its reply in place."""
    picked_bytes_per_s: float
    """How fast these rows are copied out and back."""


# measured on two Zen cores: ranks with cores of their own, and ranks that share them and sleep while they wait
MEMORY = Link(message_s=64e-6, bytes_per_s=2.1e9, pick_s=300e-6, picked_bytes_per_s=1.9e9)
CROWDED = Link(message_s=120e-6, bytes_per_s=2.1e9, pick_s=300e-6, picked_bytes_per_s=1.9e9)
# from data sheets
ETHERNET_100G = Link(message_s=7e-6, bytes_per_s=12.5e9, pick_s=4e-6, picked_bytes_per_s=1e12)
NVLINK = Link(message_s=6e-6, bytes_per_s=150e9, pick_s=4e-6, picked_bytes_per_s=1e12)


@dataclass(frozen=True, slots=True)
class Load:
    """A layer of a gang."""

    workers: int
    shards: int
    rows: int
    """Of each worker."""
    request_bytes: int
    """Of a row on its way out, with its ids and gates."""
    reply_bytes: int
    hit: float
    """Share of the rows that visit a shard."""


def hit_rate(experts_per_token: int, leaves: int, shards: int) -> float:
    """Mean share of rows that visit a shard, where each of a row's experts is on any leaf alike."""
    return 1.0 - (1.0 - 1.0 / min(shards, leaves)) ** experts_per_token


def layer_s(mode: Mode, load: Load, link: Link) -> float:
    """Seconds that a layer's messages take, the experts left out."""
    sent = load.hit if mode == "all_to_all" else 1.0
    messages = max(load.workers, load.shards)
    row_bytes = sent * (load.request_bytes + load.reply_bytes)
    bytes_moved = messages * load.rows * row_bytes
    picking = 0.0
    if mode == "all_to_all":
        picking = load.shards * (link.pick_s + load.rows * row_bytes / link.picked_bytes_per_s)
    return messages * link.message_s + bytes_moved / link.bytes_per_s + picking


def plan_mode(load: Load, link: Link) -> Mode:
    """The mode that costs less."""
    exact, broadcast = (layer_s(mode, load, link) for mode in ("all_to_all", "broadcast"))
    return "all_to_all" if exact < (1.0 - _GAIN) * broadcast else "broadcast"
