"""`python -m divisi.benchmarks pairs BEFORE AFTER`: is the second checkout as fast as the first?

A pair is one run of the same work in a process of each checkout, cut in blocks of a few steps that take turns, one
process at work at a time: what disturbs the machine for longer than a block disturbs both. The order within a turn
changes from pair to pair. After a few pairs both processes are started anew, in the other order, since where a
process happens to have its memory can make it faster or slower for as long as it lives.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from divisi.benchmarks import machine
from divisi.benchmarks.checkouts.cells import CONTEXTS, MODELS, Cell, Part, parts_of
from divisi.benchmarks.checkouts.checkout import Checkout, Inside, inside
from divisi.benchmarks.checkouts.ratio import Ratios
from divisi.model.config import ModelConfig

_PAIRS_OF_A_PROCESS = 3


@dataclass(frozen=True, slots=True)
class Effort:
    """How many pairs, and what is checked."""

    pairs: int = 9
    most_pairs: int = 27
    """Both are rounded up to whole lives of a process."""
    threads: int = 2
    dtype: str = "bfloat16"
    same_tokens: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `pairs` is told on the command line."""
    parser.add_argument("before", type=Path, help="root of a checkout")
    parser.add_argument("after", type=Path, help="root of another, or of the same one")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of runs of each cell, at least 6 (default 9)")
    parser.add_argument("--most-pairs", type=int, default=27, help="where the interval is too wide (default 27)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["bench-s", "divisi-demo"], help="default both")
    parser.add_argument(
        "--contexts", nargs="+", choices=CONTEXTS, default=["short"], help="long ones: prefill, then decode at batch 1"
    )
    parser.add_argument("--checkpoints", type=Path, help="folder that keeps the random checkpoints for the next time")
    parser.add_argument("--targets", type=Path, help="JSON: ratios wanted by model and cell (default 0.98 for all)")
    parser.add_argument("--threads", type=int, default=2, help="threads of either checkout (default 2)")
    parser.add_argument(
        "--other-tokens", action="store_true", help="for commits that change arithmetic: bf16 tokens may differ"
    )


def main(options: argparse.Namespace) -> int:
    """Check tokens, then time and print; 1 if AFTER is slower or that is undecided. Raises SystemExit."""
    if options.pairs < 6:
        raise SystemExit(f"--pairs is {options.pairs}: fewer than 6 cannot say anything with 95 % confidence")
    checkouts = [Checkout("BEFORE", options.before), Checkout("AFTER", options.after)]
    effort = Effort(
        options.pairs, max(options.pairs, options.most_pairs), options.threads, same_tokens=not options.other_tokens
    )
    with tempfile.TemporaryDirectory() as scratch:
        parts = parts_of(options.models, options.contexts, options.checkpoints or Path(scratch), options.targets)
        print("\n".join([*map(str, checkouts), machine.describe()]))
        print(f"{effort.dtype}, {effort.threads} threads, local; load average {_load_average()}")
        return report(checkouts, parts, effort)


def report(checkouts: Sequence[Checkout], parts: Sequence[Part], effort: Effort) -> int:
    """Compare part after part, each one's tokens before its times; print the table; 1 unless all is fast enough."""
    print(f"\n{Ratios.HEADER}", flush=True)
    passed = True
    for part in parts:
        for cell, measured in zip(part.cells, _measure(checkouts, part, effort), strict=True):
            for (title, target), ratios in zip(cell.rows, measured, strict=True):
                print(f"| {part.model} {title} | {ratios.row(target)} |", flush=True)
                passed = passed and ratios.verdict(target).passed
    told = "the same tokens in all cells" if effort.same_tokens else "tokens were not compared"
    print(f"\n{told}; load average {_load_average()} at the end", flush=True)
    return 0 if passed else 1


def _measure(checkouts: Sequence[Checkout], part: Part, effort: Effort) -> list[list[Ratios]]:
    """Pairs of every cell in turn, in new processes every few pairs; more of them where a verdict wants more."""
    found = [[Ratios() for _ in cell.rows] for cell in part.cells]
    progress = tqdm(range(0, effort.most_pairs, _PAIRS_OF_A_PROCESS), part.model, leave=False, disable=None)
    for generation, first in enumerate(progress):
        wanted = [
            (cell, measured)
            for cell, measured in zip(part.cells, found, strict=True)
            if first < effort.pairs or not _is_final(cell, measured)
        ]
        if not wanted:
            break
        with _loaded(checkouts, part, effort, swapped=generation % 2 == 1) as processes:
            for cell, _ in wanted:
                _check_tokens(processes, part, cell, effort.same_tokens)
            for number in range(first, first + _PAIRS_OF_A_PROCESS):
                for cell, measured in wanted:
                    before, after = _pair(processes, part, cell, number)[0]
                    for ratios, *seconds in zip(measured, before, after, strict=True):
                        ratios.add(*seconds)
    return found


def _is_final(cell: Cell, measured: Sequence[Ratios]) -> bool:
    return all(ratios.verdict(target).final for (_, target), ratios in zip(cell.rows, measured, strict=True))


@contextmanager
def _loaded(checkouts: Sequence[Checkout], part: Part, effort: Effort, *, swapped: bool) -> Iterator[list[Inside]]:
    """A process of each checkout with the part's engine, in the checkouts' order whichever was started first."""
    order = -1 if swapped else 1
    message = {"do": "load", "model_dir": str(part.model_dir), "limits": part.limits}
    with inside(checkouts[::order], effort.threads) as processes:
        for process in processes:
            process.send(message | {"dtype": effort.dtype, "threads": effort.threads})
            process.receive()
        yield processes[::order]


def _check_tokens(processes: Sequence[Inside], part: Part, cell: Cell, same: bool) -> None:
    """A first pair, which warms both up. Raises SystemExit where the tokens differ."""
    if cell.chunks and not same:
        return  # a long prompt is long enough to do without
    _, answers = _pair(processes, part, cell, 0)
    if same and answers[0] != answers[1]:
        index = next(i for i, pair in enumerate(zip(*answers, strict=True)) if pair[0] != pair[1])
        raise SystemExit(f"{part.model} {cell.title}: prompt {index} has other tokens; no speed is reported")


def _pair(processes: Sequence[Inside], part: Part, cell: Cell, number: int) -> tuple[list[list[float]], list[Any]]:
    """Seconds of each process for the same work, one number for each of the cell's rows, and its tokens."""
    vocabulary = ModelConfig.load(part.model_dir).vocab_size
    seconds = [[0.0] * len(cell.rows) for _ in range(2)]
    answers: list[list[Any]] = [[], []]
    for run in range(cell.runs):
        rng = random.Random(f"{cell.title} {run}")
        prompts = [[rng.randrange(10, vocabulary) for _ in range(cell.length)] for _ in range(cell.prompts)]
        times, tokens = _run(processes, {"prompts": prompts} | _counts(cell), order=number % 2)
        for index in range(2):
            for row, spent in enumerate(by_row(cell, times[index], processes[index].name)):
                seconds[index][row] += spent
            answers[index] += tokens[index]
    return seconds, answers


def by_row(cell: Cell, blocks: Sequence[float], name: str) -> list[float]:
    """Seconds of the rows. Raises SystemExit where a prompt was not taken in by as many steps as is reckoned with."""
    if not cell.chunks:
        return [sum(blocks)]
    if len(blocks) != cell.blocks:
        raise SystemExit(f"{cell.title}: {name} took {len(blocks)} blocks of steps, not {cell.blocks}: other chunks")
    return [sum(blocks[: cell.chunks]), sum(blocks[cell.chunks :])]


def _counts(cell: Cell) -> dict[str, int]:
    return {"count": cell.count, "skip": cell.skip, "block": cell.block, "chunks": cell.chunks}


def _run(
    processes: Sequence[Inside], work: dict[str, Any], order: int
) -> tuple[list[list[float]], list[list[list[int]]]]:
    """The same run in both, a block of one and a block of the other; one process at work at a time.

    The seconds of each one's blocks, and its tokens.
    """
    turns = (order, 1 - order)
    seconds: list[list[float]] = [[], []]
    tokens: list[list[list[int]]] = [[], []]
    running = set(turns)
    message: dict[str, Any] = {"do": "run"} | work
    while running:
        for index in turns:
            processes[index].send(message)
            reply = processes[index].receive()
            if "tokens" in reply:
                tokens[index] = reply["tokens"]
                running.discard(index)
            else:
                seconds[index].append(reply["seconds"])
        message = {"do": "go on"}
    return [found[1:] for found in seconds], tokens  # the first pause ends no block


def _load_average() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())
