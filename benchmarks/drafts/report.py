"""Multi-token prediction: what drafts gain on the demo model, what they cost others, what the layer costs unused."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from divisi.benchmarks import machine
from divisi.benchmarks.drafts import beside, depths, unused

_PARTS = ("depths", "unused", "beside")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `__main__.Command`."""
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="tables (default all)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of fixed and adaptive depths (default 9)")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of the other two (default 9)")
    parser.add_argument("--batches", type=int, nargs="+", default=list(depths.BATCHES), help="sequences at once")
    parser.add_argument("--threads", type=int, default=2, help="threads of the engines (default 2)")
    parser.add_argument("--out", type=Path, help="write the tables to this file, too")


def main(options: argparse.Namespace) -> int:
    """Measure and print; 1 where something wanted is not so."""
    torch.set_num_threads(options.threads)
    reports: dict[str, Callable[[], tuple[str, bool]]] = {
        "depths": lambda: depths.report(options.rounds, options.batches),
        "unused": lambda: unused.report(options.pairs),
        "beside": lambda: beside.report(options.pairs),
    }
    print(f"{machine.describe()}; {options.threads} threads", flush=True)
    texts, passed = [machine.describe()], True
    for part in options.parts:
        text, met = reports[part]()
        print(f"\n{text}", flush=True)
        texts.append(text)
        passed = passed and met
    if options.out is not None:
        command = f"    python -m divisi.benchmarks drafts {' '.join(sys.argv[2:])}"
        options.out.write_text("\n\n".join(["# Drafts", command, *texts]) + "\n", encoding="utf-8")
    return 0 if passed else 1
