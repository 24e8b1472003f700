"""Experts elsewhere: a split step beside one process, a layer's messages beside the planner's model, forms of a reply.

With shared memory on this machine, and the model for networks that it does not have.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from divisi.benchmarks import machine
from divisi.benchmarks.dispatch import constants, replies, split_step
from divisi.benchmarks.dispatch.layers import MODES, Work, load_of, measure, shares_cores
from divisi.benchmarks.model import bench_model
from divisi.cluster.cores import usable_cores
from divisi.cluster.dispatch.planner import ETHERNET_100G, NVLINK, Load, hit_rate, layer_s, plan_mode
from divisi.cluster.seats import GangShape

_HEAD = """# Experts elsewhere

`python -m divisi.benchmarks dispatch --out benchmarks/results/dispatch.md`, medians. A step: bench-s, bf16, one thread
a rank, contenders in turns, greedy tokens compared first. Layers: messages of the 80 B model's rows without experts,
over shared memory, lower quartiles, each rank kept to a core, beside the planner's model. Its constants are of one
worker and one shard with 1 and with 96 rows, in processes of another run; who waits sleeps where ranks share cores.
What is called a model is computed from data sheets; nothing was measured there."""
_PARTS = ("step", "layers", "crowded", "replies", "model")
_ROWS = (1, 8, 16, 32, 64)
_SHAPES = {
    "layers": [GangShape(1, 1), GangShape(1, 2)],
    "crowded": [GangShape(2, 2), GangShape(2, 4), GangShape(2, 8)],
}
_MODEL_ROWS = (1, 16, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See Command."""
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the tables there, too")


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    parts = " ".join(options.parts)
    told = [f"{machine.describe()}; parts {parts}; load average at the start {os.getloadavg()[0]:.1f}"]
    torch.set_num_threads(usable_cores())
    for part in options.parts:
        told.append(_table(part, options))
        print(told[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n\n".join([_HEAD, *told]) + "\n", encoding="utf-8")
    return 0


def _table(part: str, options: argparse.Namespace) -> str:
    if part == "step":
        with tempfile.TemporaryDirectory() as scratch:
            return split_step.report(bench_model(options.model, Path(scratch)), options.rounds)
    if part in _SHAPES:
        return _layers(_SHAPES[part], options.rounds)
    return replies.report() if part == "replies" else _model()


def _layers(shapes: list[GangShape], rounds: int) -> str:
    """Measured ratios beside those of the model, with constants of this machine that were measured apart."""
    works = [Work(shape, _ROWS, rounds, shares_cores(shape)) for shape in shapes]
    links = {sleeps: constants.link(rounds, sleeps=sleeps) for sleeps in sorted({work.sleeps for work in works})}
    lines = [
        "| constants | woken, us | a message, us | a byte, at GB/s | picking, us | picked, at GB/s | counting, us |",
        "|---" * 7 + "|",
    ]
    for sleeps, link in links.items():
        who = "ranks that sleep while they wait" if sleeps else "ranks that spin"
        shown = (link.latency_s * 1e6, link.message_s * 1e6, link.bytes_per_s / 1e9, link.pick_s * 1e6,
                 link.picked_bytes_per_s / 1e9, link.count_s * 1e6)  # fmt: skip
        lines.append(f"| {who} | " + " | ".join(f"{value:.3g}" for value in shown) + " |")
    lines += [
        "",
        "| us per layer | rows | broadcast | the model's | all-to-all | the model's | ratio | the model's | off by |",
        "|---" * 9 + "|",
    ]
    for work in works:
        times, link = measure(work), links[work.sleeps]
        for rows in _ROWS:
            load = load_of(work.shape, rows)
            broadcast, exact = (times[mode, rows].whole_s * 1e6 for mode in MODES)
            told, exactly = (layer_s(mode, load, link) * 1e6 for mode in MODES)
            off = exactly / told / (exact / broadcast) - 1
            name = f"{load.workers}x{load.shards}"
            lines.append(
                f"| {name} | {rows} | {broadcast:.0f} | {told:.0f} | {exact:.0f} | {exactly:.0f} "
                f"| {exact / broadcast:.2f} | {exactly / told:.2f} | {off:+.0%} |"
            )
    return "\n".join(lines)


def _model() -> str:
    lines = ["| model: us per layer | rows | broadcast | all-to-all | ratio | planned |", "|---" * 6 + "|"]
    for workers, shards in ((1, 4), (4, 8), (8, 16), (8, 32)):
        for name, link in (("100 Gb/s", ETHERNET_100G), ("NVLink", NVLINK)):
            for rows in _MODEL_ROWS:
                load = Load(workers, shards, rows, 4096 + 80, 8192, hit_rate(10, 32, shards))
                broadcast, exact = (layer_s(mode, load, link) * 1e6 for mode in MODES)
                lines.append(
                    f"| {workers}x{shards}, {name} | {rows} | {broadcast:.0f} | {exact:.0f} | {exact / broadcast:.2f} "
                    f"| {plan_mode(load, link)} |"
                )
    return "\n".join(lines)
