"""Experts elsewhere: a split step beside one process, a layer's messages beside the planner's model, forms of a reply.

With shared memory on this machine, and the model for networks that it does not have.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from divisi.benchmarks import machine
from divisi.benchmarks.dispatch import replies, split_step
from divisi.benchmarks.dispatch.layers import MODES, Work, load_of, measure
from divisi.benchmarks.model import bench_model
from divisi.cluster.dispatch.planner import CROWDED, ETHERNET_100G, MEMORY, NVLINK, Load, hit_rate, layer_s, plan_mode
from divisi.cluster.seats import GangShape

_PARTS = ("step", "layers", "crowded", "replies", "model")
_ROWS = (1, 16, 64)
_SHAPES = {
    "layers": [GangShape(1, 1), GangShape(1, 2)],
    "crowded": [GangShape(2, 2), GangShape(2, 4), GangShape(2, 8)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See Command."""
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=["step", "layers", "replies", "model"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    print(machine.describe())
    torch.set_num_threads(2)
    if "step" in options.parts:
        with tempfile.TemporaryDirectory() as scratch:
            print(split_step.report(bench_model(options.model, Path(scratch)), options.rounds), flush=True)
    for part, shapes in _SHAPES.items():
        if part in options.parts:
            print(_layers(shapes, options.rounds), flush=True)
    if "replies" in options.parts:
        print(replies.report(), flush=True)
    if "model" in options.parts:
        print(_model())
    return 0


def _layers(shapes: list[GangShape], rounds: int) -> str:
    lines = ["| us per layer | rows | broadcast | all-to-all | ratio | the model's ratio | off by |", "|---" * 7 + "|"]
    for shape in shapes:
        spin_s, link = (0.002, MEMORY) if shape.size <= 2 else (0.0, CROWDED)  # for two cores
        times = measure(Work(shape, _ROWS, rounds), spin_s)
        for rows in _ROWS:
            broadcast, exact = (times[mode, rows] for mode in MODES)
            load = load_of(shape, rows)
            told = layer_s("all_to_all", load, link) / layer_s("broadcast", load, link)
            off = told / (exact / broadcast) - 1
            name = f"{shape.attention_workers}x{shape.expert_shards}"
            lines.append(
                f"| {name} | {rows} | {broadcast * 1e6:.0f} | {exact * 1e6:.0f} | {exact / broadcast:.2f} | {told:.2f} "
                f"| {off:+.0%} |"
            )
    return "\n".join(lines)


def _model() -> str:
    lines = ["| model, 64 rows a worker | broadcast, us | all-to-all, us | planned |", "|---" * 4 + "|"]
    for workers, shards in ((1, 4), (4, 8), (8, 16), (8, 32)):
        load = Load(workers, shards, 64, 4096 + 80, 8192, hit_rate(10, 32, shards))
        for name, link in (("100 Gb/s", ETHERNET_100G), ("NVLink", NVLINK)):
            broadcast, exact = (layer_s(mode, load, link) * 1e6 for mode in MODES)
            lines.append(f"| {workers}x{shards}, {name} | {broadcast:.0f} | {exact:.0f} | {plan_mode(load, link)} |")
    return "\n".join(lines)
