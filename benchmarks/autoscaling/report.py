"""How long requests wait and what workers that costs, by who decides how many there are: `autoscaling`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path
from textwrap import fill

from divisi.benchmarks.autoscaling.arrivals import HOURS, recorded
from divisi.benchmarks.autoscaling.cases import PEAK_PER_WORKER, SIZES, Case, made_cases, recorded_cases
from divisi.benchmarks.autoscaling.deciders import ByQueue, ByServe, Decider, Fixed
from divisi.benchmarks.autoscaling.gang import Model, Outcome, SimulatedGang
from divisi.benchmarks.autoscaling.plot import Panel, plot
from divisi.deploy.application.queue_policy import QueueRule
from divisi.deploy.settings import Settings
from divisi.deploy.settings.gang import AutoscalingSettings


def default_rule(most: int, max_seqs: int) -> QueueRule:
    """The product's defaults, from its settings."""
    scaling = AutoscalingSettings(max=most)
    gang = {"expert_shards": 1, "autoscaling": {"max": most}}
    cache = {"max_seqs": max_seqs, "max_step_tokens": max(512, max_seqs)}
    settings = Settings.from_args({"model": {"model_dir": "/"}, "gang": gang, "cache": cache})
    tokens = settings.queued_tokens_per_worker
    return QueueRule(scaling.min, scaling.max, tokens, scaling.upscale_delay_s, scaling.downscale_delay_s)


def deciders(case: Case) -> dict[str, Decider]:
    """By name, in the order of the table. All may have twice the workers that the peak needs, 64 at most.

    Of a warm case only the policies: fixed numbers do in it what they do in the other.
    """
    most, seqs = min(2 * case.size, 64), case.model.max_seqs
    mean = math.ceil(case.size * len(case.arrivals) / (case.end or 1) / case.peak)
    fixed = {"fixed, for the peak": Fixed(case.size), "fixed, for the mean": Fixed(max(mean, 1))}
    policies: dict[str, Decider] = {
        "by queue depth": ByQueue(default_rule(most, seqs)),
        f"Serve's default, {3 * seqs // 4} requests a worker": ByServe(most, 3 * seqs // 4),
        "Serve's default, 2 requests a worker": ByServe(most, 2),
    }
    if not case.warm:
        return fixed | policies
    for policy in policies.values():
        policy.first = case.size
    return policies


def ran(case: Case, name: str) -> Outcome:
    """One run."""
    return SimulatedGang(case.arrivals, deciders(case)[name], case.model, case.seed).run(case.end)


def row(case: Case, name: str, outcome: Outcome) -> str:
    """Of the table."""
    waits = " / ".join(f"{outcome.wait_s(quantile):.1f}" for quantile in (0.5, 0.95, 0.99))
    refused = outcome.refused / max(outcome.attempts, 1)
    hours = f"{outcome.worker_s / 3600:.{2 if case.recorded else 1}f}"  # what was recorded may be minutes
    most = max(number for _, number in outcome.timeline)
    cells = (case.name, str(case.size), name, waits, f"{refused:.1%}", hours, str(most), str(outcome.changes))
    return "| " + " | ".join(cells) + " |"


COLUMNS = ("arrivals", "workers for the peak", "how many there are", "wait s, p50 / p95 / p99", "429", "worker-hours",
           "most", "changes")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it is told on the command line."""
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="workers that the peak needs")
    parser.add_argument("--hours", type=float, default=HOURS, help=f"of each pattern (default {HOURS:g})")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and lengths (default 1)")
    parser.add_argument("--start", type=float, default=Model.start_s, help="seconds until a new worker serves")
    parser.add_argument(
        "--log", type=Path, help="recorded arrivals, too: a server's JSON log, a trace in CSV, a report of bench"
    )
    parser.add_argument(
        "--log-size", type=int, nargs="+", default=[4],
        help="workers that the log's peak needs (default 4); any further number gets its share of the requests",
    )  # fmt: skip
    parser.add_argument("--log-about", type=Path, help="text for autoscaling.md: where the log is from")
    parser.add_argument("--processes", type=int, default=1, help="runs beside each other (default 1)")
    parser.add_argument("--out", type=Path, help="folder for autoscaling.md and autoscaling.svg")


def main(options: argparse.Namespace) -> int:
    """Simulate and print; the exit status."""
    model = replace(Model(), start_s=options.start)
    found = list(made_cases(options.sizes, options.hours, options.seed, model))
    if options.log is not None:
        found += recorded_cases(recorded(options.log), options.log_size, options.seed, model)
    runs = [(case, name) for case in found for name in deciders(case)]
    tables: list[list[str]] = [[] for _ in found]
    panels = [Panel(f"{case.name}, {case.size} at the peak", case.rates()) for case in found]
    with Pool(options.processes) as pool:
        for (case, name), outcome in zip(runs, pool.imap(_run, runs), strict=True):
            number = found.index(case)
            tables[number].append(row(case, name, outcome))
            print(tables[number][-1], flush=True)
            panels[number].lines[name] = outcome.timeline
    if options.out is not None:
        (options.out / "autoscaling.md").write_text(_page(options, found, tables), encoding="utf-8")
        largest = {False: max(options.sizes, default=0), True: options.log_size[0]}
        shown = [panel for case, panel in zip(found, panels, strict=True) if case.size == largest[case.recorded]]
        (options.out / "autoscaling.svg").write_text(plot(shown), encoding="utf-8")
    return 0


def _page(options: argparse.Namespace, found: Sequence[Case], tables: Sequence[Sequence[str]]) -> str:
    """What was made up, and then what was recorded."""
    parts = {case.recorded: [HEAD] for case in found}
    for case, table in zip(found, tables, strict=True):
        parts[case.recorded] += table
    texts = [_intro(options), *parts.get(False, ())]
    if True in parts:
        texts += ["", _about_recorded(options, next(case for case in found if case.recorded)), *parts[True]]
    return "\n".join([*texts, ""])


def _intro(options: argparse.Namespace) -> str:
    model, log = Model(), f"{_log_options(options)} " if options.log else ""
    command = f"python -m divisi.benchmarks autoscaling --seed {options.seed} {log}--out benchmarks/results"
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


def _log_options(options: argparse.Namespace) -> str:
    about = f" --log-about {options.log_about}" if options.log_about else ""
    return f"--log {options.log.name} --log-size {' '.join(map(str, options.log_size))}{about}"


def _about_recorded(options: argparse.Namespace, case: Case) -> str:
    """Of the first case, which has all of it."""
    arrivals = case.arrivals
    prompt = sum(arrival.prompt for arrival in arrivals) / len(arrivals)
    answer = sum(arrival.answer for arrival in arrivals) / len(arrivals)
    told = (
        f"{len(arrivals):,} requests in {case.end / 60:.1f} minutes: {len(arrivals) / (case.end or 1):.2f} a second, "
        f"{case.peak:.2f} in the busiest minute; prompts of {prompt:.0f} tokens and answers of {answer:.0f} in the "
        "mean. The model, who decides and the columns are those of above. A number of workers that is an nth of the "
        "largest gets every nth request, as one of n gangs that take turns would. Since nobody knows how many there "
        "were before, policies begin with one worker, and once more with those for the peak; fixed numbers do the same "
        "in both."
    )
    about = [options.log_about.read_text(encoding="utf-8").strip()] if options.log_about else []
    return "\n\n".join(["## Recorded", *about, fill(told, 150)]) + "\n"


def _run(run: tuple[Case, str]) -> Outcome:
    return ran(*run)
