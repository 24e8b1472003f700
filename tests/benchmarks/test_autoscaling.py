"""The simulated gang loses nothing, and the policy does what its table says, in short runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from divisi.benchmarks.__main__ import _run
from divisi.benchmarks.autoscaling.arrivals import PATTERNS, Arrival, made, recorded
from divisi.benchmarks.autoscaling.cases import PEAK_PER_WORKER, Case, recorded_cases
from divisi.benchmarks.autoscaling.deciders import ByServe, Fixed, Seen
from divisi.benchmarks.autoscaling.gang import Model, Outcome, SimulatedGang
from divisi.benchmarks.autoscaling.report import deciders, ran

HOURS, SIZE = 0.25, 4


def case(name: str) -> Case:
    return Case(name, made(PATTERNS[name], SIZE * PEAK_PER_WORKER, 3, HOURS), SIZE, Model())


def check(outcome: Outcome, arrivals: int) -> None:
    """Everybody was answered, and counted once."""
    assert len(outcome.waits) == arrivals
    assert outcome.attempts - outcome.refused == arrivals
    assert min(outcome.waits) >= 0


@pytest.mark.parametrize("name", PATTERNS)
def test_the_policy_waits_little_and_costs_little(name: str) -> None:
    tried = case(name)
    peak, mean, queue, serve, _ = (ran(tried, way) for way in deciders(tried))
    for outcome in (peak, mean, queue, serve):
        check(outcome, len(tried.arrivals))
    assert queue.worker_s < 0.85 * peak.worker_s, "no cheaper than workers for the peak"
    assert queue.wait_s(0.95) < max(0.5 * serve.wait_s(0.95), 2.0), "no shorter waits than with Serve's default"
    assert queue.wait_s(0.95) < 15.0


def test_a_run_is_the_same_again() -> None:
    tried = case("bursts")
    one, two = (ran(tried, "by queue depth") for _ in range(2))
    assert one == two
    assert made(PATTERNS["bursts"], 1.0, 1, 0.1) != made(PATTERNS["bursts"], 1.0, 2, 0.1)


class ToAndFro(Fixed):
    """Two workers and one in turn, each time that it is asked."""

    def decide(self, seen: Seen) -> int:
        return 3 - seen.workers


def test_what_a_worker_has_is_computed_by_the_others_when_it_goes() -> None:
    arrivals = made(PATTERNS["bursts"], 0.6, 1, 0.1)
    outcome = SimulatedGang(arrivals, ToAndFro(1), replace(Model(), start_s=0.2)).run(arrivals[-1].at)
    check(outcome, len(arrivals))
    assert outcome.changes > 100


def test_who_finds_no_room_comes_again() -> None:
    arrivals = [Arrival(0.0, 10, 50)] * 40
    outcome = SimulatedGang(arrivals, Fixed(1), Model()).run(1.0)
    check(outcome, 40)
    assert outcome.refused >= 8, "32 sequences fit"


def test_serves_policy_needs_its_half_minute() -> None:
    policy = ByServe(8, 2.0)
    told = [policy.decide(Seen(now, 0, 0, 16, 1)) for now in range(40)]
    assert told[:30] == [1] * 30
    assert told[30] == 8


def test_arrivals_are_read_from_a_log(tmp_path: Path) -> None:
    lines = [
        {"time": "2026-11-27T10:00:05.000+00:00", "status": 200, "duration_s": 4.0, "prompt_tokens": 7,
         "completion_tokens": 9},
        {"time": "2026-11-27T10:00:03.500+00:00", "status": 200, "duration_s": 3.0, "prompt_tokens": 5,
         "completion_tokens": 2},
        {"time": "2026-11-27T10:00:04.000+00:00", "status": 429, "duration_s": 0.01},
        {"time": "2026-11-27T10:00:04.000+00:00", "message": "loaded"},
    ]  # fmt: skip
    log = tmp_path / "requests.log"
    log.write_text("\n".join([*map(json.dumps, lines), "no JSON", "3"]))
    assert recorded(log) == [Arrival(0.0, 5, 2), Arrival(0.5, 7, 9)]
    log.write_text("nothing")
    with pytest.raises(ValueError, match="no line of an answered request"):
        recorded(log)


@pytest.mark.parametrize(
    "text",
    [
        "12.5,7,9\n12,5,2\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:47.5,7,9\n2023-11-16 18:15:47,5,2\n",
        "TIMESTAMP,Context,Generated\r\n2023-11-16 18:15:47.0000000,5,2\r\n2023-11-16 18:15:47.5000000,7,9\r\n",
    ],
    ids=["seconds", "times", "as Azure writes them"],
)
def test_arrivals_are_read_from_a_trace(tmp_path: Path, text: str) -> None:
    (trace := tmp_path / "trace.csv").write_text(text)
    assert recorded(trace) == [Arrival(0.0, 5, 2), Arrival(0.5, 7, 9)]
    trace.write_text(text + "13,many,2\n")
    with pytest.raises(ValueError, match=r"trace.csv:[34]: '13,many,2' is not the time"):
        recorded(trace)


def test_arrivals_are_read_from_a_report_of_bench(tmp_path: Path) -> None:
    records = [
        {"status": "ok", "sent": 1.5, "input_tokens": 7, "output_tokens": 9},
        {"status": "rejected", "sent": 1.2, "input_tokens": None, "output_tokens": None},
        {"status": "ok", "sent": 1.0, "input_tokens": 5, "output_tokens": 2},
    ]
    (report := tmp_path / "bench.json").write_text(json.dumps({"records": records}))
    assert recorded(report) == [Arrival(0.0, 5, 2), Arrival(0.5, 7, 9)]
    report.write_text("{}")
    with pytest.raises(ValueError, match="give `divisi bench` --records"):
        recorded(report)


def test_a_share_of_what_was_recorded_is_for_a_smaller_gang() -> None:
    """A minute with two requests a second, and one with half as many."""
    arrivals = [Arrival(second / 2, 5, 2) for second in range(120)] + [Arrival(60.0 + n, 5, 2) for n in range(60)]
    cold, warm, third, _ = recorded_cases(arrivals, [6, 2], 0, Model())
    assert cold.peak == 2.0
    assert third.arrivals == arrivals[::3]
    assert third.peak == pytest.approx(2.0 / 3)
    firsts = [decider.first for decider in deciders(cold).values()]
    assert firsts == [6, 5, 1, 1, 1], "the mean is three quarters of the peak, and a little for the last second"
    assert [decider.first for decider in deciders(warm).values()] == [6, 6, 6]
    with pytest.raises(ValueError, match="6 workers are not a number of gangs of 4"):
        list(recorded_cases(arrivals, [6, 4], 0, Model()))
    with pytest.raises(ValueError, match=r"--log: its 100 requests came within 49.5 s, and its peak"):
        list(recorded_cases(arrivals[:100], [6], 0, Model()))


def test_the_command_writes_what_was_recorded_below(tmp_path: Path) -> None:
    (trace := tmp_path / "trace.csv").write_text("".join(f"{at / 4},{9 + at % 3},5\n" for at in range(400)))
    (about := tmp_path / "about.md").write_text("From nowhere.\n")
    arguments = ["--log", str(trace), "--log-size", "2", "1", "--log-about", str(about), "--out", str(tmp_path)]
    assert _run("autoscaling", ["--sizes", "1", "--hours", "0.02", *arguments]) == 0
    made_up, found = (tmp_path / "autoscaling.md").read_text().split("## Recorded\n")
    assert "--log trace.csv --log-size 2 1" in made_up
    assert "| recorded" not in made_up
    assert "From nowhere.\n\n400 requests in 1.7 minutes: 4.01 a second, 4.00 in the busiest minute" in found
    assert sum(line.startswith("| recorded") for line in found.splitlines()) == 2 * (5 + 3)
    plot = ElementTree.fromstring((tmp_path / "autoscaling.svg").read_text())
    lines = [line.get("stroke") for line in plot.iter("{http://www.w3.org/2000/svg}polyline")]
    assert lines == [*lines[:5]] * 4 + lines[2:5], "a policy's colour is the same in all panels"


def test_the_command_writes_a_table_and_a_plot(tmp_path: Path) -> None:
    assert _run("autoscaling", ["--sizes", "2", "--hours", "0.05", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "autoscaling.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in table) == 1 + 3 * 5
    plot = ElementTree.fromstring((tmp_path / "autoscaling.svg").read_text())
    assert len(list(plot.iter("{http://www.w3.org/2000/svg}polyline"))) == 3 * 5
