"""The scheduler under a virtual clock, in many random traces, and the bugs that such traces would catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from divisi.cluster.engine.scheduler import Scheduler
from tests.sim.invariants import Fault, Violation
from tests.sim.mutants import MUTANTS
from tests.sim.simulation import Simulation, run_traces

TRACES_QUICK = 600
TRACES_FULL = 10_000
TRACES_TO_CATCH = 200


@pytest.mark.timeout(600)
def test_random_traces(full_tier: bool, record_result: Callable[[str, object], None]) -> None:
    traces = TRACES_FULL if full_tier else TRACES_QUICK
    counts, worst = run_traces(range(traces))
    record_result("traces", traces)
    record_result("what happened", dict(sorted(counts.items())))
    record_result("largest part of the starvation bound", round(worst, 3))
    for what in ("preemptions", "aborted steps", "cancellations during a step", "cancelled", "stop", "refused",
                 "begun elsewhere"):  # fmt: skip
        assert counts[what] > traces / 4, f"{what}: {counts[what]} in {traces} traces, too few to mean anything"


def test_a_trace_depends_on_nothing_but_its_seed() -> None:
    assert run_traces(range(30)) == run_traces(range(30))


@pytest.mark.parametrize(("mutant", "fault"), MUTANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_bug_is_reported_for_what_it_is(
    mutant: type[Scheduler] | type[Simulation], fault: Fault, record_result: Callable[[str, object], None]
) -> None:
    caught: list[tuple[int, Fault]] = []
    for seed in range(TRACES_TO_CATCH):
        try:
            (mutant(seed) if issubclass(mutant, Simulation) else Simulation(seed, mutant)).run()
        except Violation as violation:
            caught.append((seed, violation.fault))
            if len(caught) == 5:
                break
    assert caught, f"{mutant.__name__} is not caught in {TRACES_TO_CATCH} traces"
    assert {found for _, found in caught} == {fault}, f"(seed, fault): {caught}"
    record_result("first caught by trace", caught[0][0])


def test_every_kind_of_fault_is_planted() -> None:
    assert {fault for _, fault in MUTANTS} == set(Fault)
