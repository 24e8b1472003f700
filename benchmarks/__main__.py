"""`python -m divisi.benchmarks [speed | http]`: the tables of benchmarks/README.md; `drafts`: multi-token prediction;
`same`, `pairs`: two checkouts; `served`, `steps`: a whole server; `transports`: what carries tokens to the ingress;
`profile`: a step by operation; `dispatch`: experts elsewhere; `delta`: two forms of the delta rule; `autoscaling`: a
simulation of how many attention workers there are."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import torch

from divisi.benchmarks import delta_forms, machine, profile, speed
from divisi.benchmarks.autoscaling import report as autoscaling
from divisi.benchmarks.checkouts import pairs, same
from divisi.benchmarks.dispatch import report as dispatch
from divisi.benchmarks.dispatch import split_step
from divisi.benchmarks.drafts import report as drafts
from divisi.benchmarks.http_cost import report as http_cost
from divisi.benchmarks.model import bench_model
from divisi.benchmarks.served import report as served
from divisi.benchmarks.served import steps, transports


class Command(Protocol):
    """A module with a table of its own."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """What it is told on the command line."""
        ...

    def main(self, options: argparse.Namespace) -> int:
        """Measure and print; the exit status."""
        ...


_COMMANDS: dict[str, Command] = {
    "same": same, "pairs": pairs, "served": served, "steps": steps, "transports": transports, "drafts": drafts,
    "profile": profile, "dispatch": dispatch, "delta": delta_forms,
    "autoscaling": autoscaling,
}  # fmt: skip
_HTTP_TOKENS = {False: 512, True: 128}
"""Tokens of each stream, by --quick."""


def main() -> None:
    """Measure and print; exits with an error if the answers are wrong, or a comparison fails."""
    if (name := next(iter(sys.argv[1:]), "")) in _COMMANDS:
        sys.exit(_run(name, sys.argv[2:]))
    _measure()


def _run(name: str, arguments: list[str]) -> int:
    command = _COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"python -m divisi.benchmarks {name}", description=command.__doc__)
    command.add_arguments(parser)
    return command.main(parser.parse_args(arguments))


def _measure() -> None:
    parser = argparse.ArgumentParser(prog="python -m divisi.benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=["speed", "http"],
        default="speed",
        help="speed of the model beside transformers (default), or the cost of a streamed token in the HTTP process",
    )
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder; without it, a random one of configs/bench-s.json"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, interleaved (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default 2)")
    parser.add_argument("--quick", action="store_true", help="shorter runs, to see that it works")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = bench_model(options.model, Path(scratch))
        print(machine.describe())
        if options.what == "http":
            print(http_cost.report(model_dir, options.rounds, _HTTP_TOKENS[options.quick]))
            return
        print(
            f"bf16, {options.threads} threads, {model_dir.name}, {options.rounds} rounds, medians (lowest to highest)"
        )
        print(speed.check_correct(model_dir), flush=True)
        contenders = speed.load_contenders(model_dir, compiled=not options.no_compile)
        result = speed.measure(contenders, speed.cells(options.quick), options.rounds)
        low, high = min(result.bandwidths) / 1e9, max(result.bandwidths) / 1e9
        print(f"memory read at {low:.0f} to {high:.0f} GB/s between the rounds\n")
        print(speed.table(result, contenders[0].name), flush=True)
        print(f"\n{split_step.report(model_dir, options.rounds)}")


if __name__ == "__main__":
    main()
