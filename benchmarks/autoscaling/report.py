"""How long requests wait and what workers that costs, by who decides how many there are: `autoscaling`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from textwrap import fill

from divisi.benchmarks.autoscaling.arrivals import HOURS, PATTERNS, Arrival, made, recorded
from divisi.benchmarks.autoscaling.deciders import ByQueue, ByServe, Decider, Fixed
from divisi.benchmarks.autoscaling.gang import Model, Outcome, SimulatedGang
from divisi.benchmarks.autoscaling.plot import Panel, plot
from divisi.deploy.queue_policy import QueueRule
from divisi.deploy.setting_groups import AutoscalingSettings
from divisi.deploy.settings import Settings

PEAK_PER_WORKER = 0.75
"""Requests a second, of the patterns' lengths: four fifths of what a worker of the model can do."""
SIZES = (4, 16, 64)
_MINUTE = 60.0


@dataclass(frozen=True)
class Case:
    """A pattern and the workers that its peak needs."""

    name: str
    arrivals: Sequence[Arrival]
    size: int
    model: Model
    seed: int = 0

    @property
    def end(self) -> float:
        """When the last request comes."""
        return self.arrivals[-1].at if self.arrivals else 0.0

    def rates(self) -> list[tuple[float, float]]:
        """Requests a second by minute."""
        counts: dict[int, int] = {}
        for arrival in self.arrivals:
            minute = int(arrival.at / _MINUTE)
            counts[minute] = counts.get(minute, 0) + 1
        return [(minute * _MINUTE, counts.get(minute, 0) / _MINUTE) for minute in range(int(self.end / _MINUTE) + 1)]


def default_rule(most: int, max_seqs: int) -> QueueRule:
    """The product's defaults, from its settings."""
    scaling = AutoscalingSettings(max=most)
    gang = {"expert_shards": 1, "autoscaling": {"max": most}}
    cache = {"max_seqs": max_seqs, "max_step_tokens": max(512, max_seqs)}
    settings = Settings.from_args({"model": {"model_dir": "/"}, "gang": gang, "cache": cache})
    tokens = settings.queued_tokens_per_worker
    return QueueRule(scaling.min, scaling.max, tokens, scaling.upscale_delay_s, scaling.downscale_delay_s)


def deciders(case: Case) -> dict[str, Decider]:
    """By name, in the order of the table. All may have twice the workers that the peak needs, 64 at most."""
    most = min(2 * case.size, 64)
    mean = math.ceil(case.size * len(case.arrivals) / (case.end or 1) / (PEAK_PER_WORKER * case.size))
    seqs = case.model.max_seqs
    return {
        "fixed, for the peak": Fixed(case.size),
        "fixed, for the mean": Fixed(max(mean, 1)),
        "by queue depth": ByQueue(default_rule(most, seqs)),
        f"Serve's default, {3 * seqs // 4} requests a worker": ByServe(most, 3 * seqs // 4),
        "Serve's default, 2 requests a worker": ByServe(most, 2),
    }


def ran(case: Case, name: str) -> Outcome:
    """One run."""
    return SimulatedGang(case.arrivals, deciders(case)[name], case.model, case.seed).run(case.end)


def row(case: Case, name: str, outcome: Outcome) -> str:
    """Of the table."""
    waits = " / ".join(f"{outcome.wait_s(quantile):.1f}" for quantile in (0.5, 0.95, 0.99))
    refused = outcome.refused / max(outcome.attempts, 1)
    hours, most = outcome.worker_s / 3600, max(number for _, number in outcome.timeline)
    cells = (case.name, str(case.size), name, waits, f"{refused:.1%}", f"{hours:.1f}", str(most), str(outcome.changes))
    return "| " + " | ".join(cells) + " |"


COLUMNS = ("arrivals", "workers for the peak", "how many there are", "wait s, p50 / p95 / p99", "429", "worker-hours",
           "most", "changes")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def cases(sizes: Sequence[int], hours: float, seed: int, model: Model) -> Iterator[Case]:
    """All patterns in all sizes."""
    for size in sizes:
        for name, pattern in PATTERNS.items():
            yield Case(name, made(pattern, size * PEAK_PER_WORKER, seed, hours), size, model, seed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it is told on the command line."""
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="workers that the peak needs")
    parser.add_argument("--hours", type=float, default=HOURS, help=f"of each pattern (default {HOURS:g})")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and lengths (default 1)")
    parser.add_argument("--start", type=float, default=Model.start_s, help="seconds until a new worker serves")
    parser.add_argument(
        "--log", type=Path, help="recorded arrivals, too: a server's JSON log, a trace in CSV, a report of bench"
    )
    parser.add_argument("--log-size", type=int, default=4, help="workers that the log's peak needs (default 4)")
    parser.add_argument("--processes", type=int, default=1, help="runs beside each other (default 1)")
    parser.add_argument("--out", type=Path, help="folder for autoscaling.md and autoscaling.svg")


def main(options: argparse.Namespace) -> int:
    """Simulate and print; the exit status."""
    model = replace(Model(), start_s=options.start)
    found = list(cases(options.sizes, options.hours, options.seed, model))
    if options.log is not None:
        found.append(Case("recorded", recorded(options.log), options.log_size, model, options.seed))
    runs = [(case, name) for case in found for name in deciders(case)]
    lines, panels = [HEAD], [Panel(f"{case.name}, {case.size} at the peak", case.rates()) for case in found]
    with Pool(options.processes) as pool:
        for (case, name), outcome in zip(runs, pool.imap(_run, runs), strict=True):
            lines.append(row(case, name, outcome))
            print(lines[-1], flush=True)
            panels[found.index(case)].lines[name] = outcome.timeline
    if options.out is not None:
        (options.out / "autoscaling.md").write_text("\n".join([_intro(options), *lines, ""]), encoding="utf-8")
        shown = [panel for case, panel in zip(found, panels, strict=True) if case.size == max(options.sizes)]
        (options.out / "autoscaling.svg").write_text(plot(shown), encoding="utf-8")
    return 0


def _intro(options: argparse.Namespace) -> str:
    model, command = Model(), f"python -m divisi.benchmarks autoscaling --seed {options.seed} --out benchmarks/results"
    told = (
        f"{options.hours:g} h of each pattern, Poisson, prompts of 300 tokens and answers of 150 in the mean; "
        f"{PEAK_PER_WORKER:g} requests a second and worker at the peak, four fifths of what one can do. A step takes "
        f"{1e3 * model.step_s:g} ms, {1e3 * model.decode_row_s:g} for each sequence of the fullest worker and "
        f"{1e3 * model.prefill_row_s:g} for each token of a prompt there (bench-s on a CPU, split; shards are taken to "
        f"be as many as needed); {model.max_seqs} sequences a worker, {model.max_step_tokens} tokens a step of all. "
        f"A new worker serves {options.start:g} s after the decision; when one goes, the others compute again what it "
        "had. All may have twice the workers of the peak, 64 at most. The policy, its defaults, the drain rate behind "
        "Retry-After and Serve's arithmetic are the products' own code. Wait: from a request's first attempt until its "
        "prompt begins to be computed; refused clients come again after the Retry-After that they were told. Serve's "
        "policy would see requests and not tokens: it is given those inside and those that wait to come again. "
        "[How many there were over time, largest size](autoscaling.svg)."
    )
    return "\n\n".join(["# Autoscaling, simulated", f"    {command}", fill(told, 150)]) + "\n"


def _run(run: tuple[Case, str]) -> Outcome:
    return ran(*run)
