"""`python -m divisi.benchmarks same BEFORE AFTER`: do two checkouts answer seeded requests with the same tokens?

Each gang serves all requests in both checkouts at the same time, with less memory than they want, so that some are
preempted. What a step holds depends on the requests alone and not on time, so that equal code gives equal bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from divisi.benchmarks import machine
from divisi.benchmarks.checkouts.checkout import Checkout, Inside, inside
from divisi.benchmarks.checkouts.compare import Comparison, Difference, MarginRule
from divisi.benchmarks.checkouts.workload import Spec, Workload, unused_fields
from divisi.model.config import ModelConfig
from divisi.model.random_checkpoint import write_random_checkpoint
from divisi.model.state import StateStore

SHAPES: dict[str, tuple[int, int, bool]] = {
    "local": (1, 0, False),
    "split 1x2": (1, 2, False),
    "split 2x2": (2, 2, False),
    "colocated 2": (2, 2, True),
}
"""Attention workers, expert shards, whether they share their ranks."""
DTYPES = ("float32", "bfloat16")
_PAGE_SIZE, _PAGES, _SEQUENCES, _STEP_TOKENS = 8, 44, 10, 96
"""Of each worker. A step is wider than the 48 rows from which the CPU's arithmetic differs."""
_LONGEST = 384


@dataclass(frozen=True, slots=True)
class Case:
    """One gang, and what it serves."""

    shape: str
    dtype: str
    requests: Sequence[Spec]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `same` is told on the command line."""
    parser.add_argument("before", type=Path, help="root of a checkout")
    parser.add_argument("after", type=Path, help="root of another, or of the same one")
    parser.add_argument("--requests", type=int, default=200, help="seeded requests for each gang (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default 0)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="gangs (default all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default both")
    parser.add_argument(
        "--margin",
        type=float,
        help="for commits that change arithmetic: greedy requests in fp32, which may part where the best two logits, "
        "or the router's last two, are closer than this (1e-4 is what the parity tests allow)",
    )


def main(options: argparse.Namespace) -> int:
    """Compare and print; 1 if anything differs."""
    checkouts = [Checkout("BEFORE", options.before), Checkout("AFTER", options.after)]
    with tempfile.TemporaryDirectory() as scratch, inside(checkouts, threads=1) as processes:
        print("\n".join([*map(str, checkouts), machine.describe()]), flush=True)
        model_dir = Path(scratch)
        config = write_random_checkpoint(model_dir)
        known = set(processes[0].fields) & set(processes[1].fields)
        requests = Workload(config.vocab_size, known, options.seed).requests(
            options.requests, options.margin is not None
        )
        print(_described(processes, requests, options), flush=True)
        rule = None if options.margin is None else MarginRule(options.margin, model_dir)
        dtypes = options.dtypes if rule is None else ["float32"]
        cases = [Case(shape, dtype, requests) for shape in options.shapes for dtype in dtypes]
        return report(processes, cases, model_dir, rule)


def report(processes: Sequence[Inside], cases: Sequence[Case], model_dir: Path, rule: MarginRule | None) -> int:
    """Serve and compare case after case; print the table and the first difference of each case; 1 if there is any."""
    print("| gang | dtype | choices | tokens | steps | preemptions | s | result |\n" + "|---" * 8 + "|")
    worst: list[str] = []
    for case in tqdm(cases, unit="gang", leave=False, disable=None):
        started = time.monotonic()
        before, after = serve(processes, case, model_dir)
        comparison = Comparison.of(case.requests, before["answers"], after["answers"], rule)
        seconds = time.monotonic() - started
        tqdm.write(_row(case, before, after, comparison, seconds))
        if comparison.differences:
            worst.append(f"{case.shape}, {case.dtype}: {_shown(comparison.differences[0])}")
        if not before["preemptions"] or not after["preemptions"]:
            worst.append(f"{case.shape}, {case.dtype}: no preemption: use more --requests")
    print("\n".join(worst) if worst else "no difference", flush=True)
    return 1 if worst else 0


def serve(processes: Sequence[Inside], case: Case, model_dir: Path) -> list[Any]:
    """What a gang in each checkout answers; both are at work at the same time."""
    message = {
        "do": "serve",
        "model_dir": str(model_dir),
        "shape": SHAPES[case.shape],
        "spec": _spec(model_dir, case),
        "requests": case.requests,
    }
    for process in processes:
        process.send(message)
    return [process.receive() for process in processes]


def _spec(model_dir: Path, case: Case) -> dict[str, object]:
    config, dtype = ModelConfig.load(model_dir).with_mtp(False), getattr(torch, case.dtype)
    return {
        "dtype": case.dtype,
        "page_size": _PAGE_SIZE,
        "kv_memory": _PAGES * StateStore.bytes_per_page(config, _PAGE_SIZE, dtype),
        "max_model_len": _LONGEST,
        "max_seqs": _SEQUENCES,
        "max_step_tokens": _STEP_TOKENS * SHAPES[case.shape][0],
        "step_deadline_s": 120.0,
    }


def _described(processes: Sequence[Inside], requests: Sequence[Spec], options: argparse.Namespace) -> str:
    lines = [f"{options.requests} requests of seed {options.seed}, {len(requests)} choices"]
    for one, other in (processes, reversed(processes)):
        if left_out := sorted(set(one.fields) - set(other.fields)):
            lines.append(f"left out, since only {one.name} has them: {', '.join(left_out)}")
    known = set(processes[0].fields) & set(processes[1].fields)
    if options.margin is not None:
        lines.append(f"greedy requests in fp32; they may part below a margin of {options.margin:g}")
    elif unused := unused_fields(known, requests):
        lines.append(f"fields that no request sets: {', '.join(unused)}")
    return "\n".join(lines)


def _row(case: Case, before: Any, after: Any, comparison: Comparison, seconds: float) -> str:
    def both(name: str) -> str:
        return f"{before[name]}" if before[name] == after[name] else f"{before[name]} / {after[name]}"

    tokens = sum(len(answer["tokens"]) for answer in before["answers"].values())
    cells = [case.shape, case.dtype, len(case.requests), tokens, both("steps"), both("preemptions"), f"{seconds:.0f}"]
    return f"| {' | '.join(map(str, cells))} | {comparison} |"


def _shown(difference: Difference) -> str:
    return f"first different request {difference}; seed {difference.seed}"
