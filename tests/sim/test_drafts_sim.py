"""The engine drafting, under random traffic and faults: whatever the drafts, tokens are those of a request alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from llguidance import LLMatcher

from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.grammar import Guide
from divisi.cluster.engine.scheduler import Scheduler
from divisi.cluster.engine.step import sampling as step_sampling
from divisi.cluster.engine.step.drafts import Drafts
from divisi.cluster.engine.step.plan import Run, StepPlan
from divisi.model.dispatcher import Dispatcher
from tests.sim.test_engine_sim import Trace, run_traces
from tests.support import tiny_grammar
from tests.support.fake_runner import FakeRunner, _Layer

TRACES = 45
TRACES_FULL = 600


def draft_trace(seed: int) -> Trace:
    return Trace(seed, 1 + seed % 6, tiny_grammar.grammars() if seed % 3 == 0 else None)


@pytest.mark.timeout(1800)
def test_random_traces(full_tier: bool) -> None:
    size = TRACES_FULL if full_tier else TRACES
    assert run_traces(range(size), draft_trace) > size // 4, "memory is not tight"


@pytest.mark.verify
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(6))
def test_long_traces(seed: int, record_result: Callable[[str, object], None]) -> None:
    """Ragged depths, arrivals, cancellations, preemptions, aborts in every pass: 2,000 operations and more."""
    trace = Trace(seed, 1 + seed, tiny_grammar.grammars() if seed % 2 else None, arrivals=900)
    trace.run()
    record_result(f"operations, seed {seed}", trace.operations)
    assert trace.operations >= 2_000


def _count_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring's entries of rejected rows are replayed."""
    commit_ring = Scheduler._commit_ring
    monkeypatch.setattr(Scheduler, "_commit_ring", lambda self, run, _: commit_ring(self, run, run.num_rows))


def _replay_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that is asked for a position goes one further where it has an entry."""
    decode = _Layer.decode

    def further(layer: _Layer, slot: int, length: int, tokens: list[int]) -> list[int]:
        ring = layer.rings[slot]
        position, token = ring.get(length % layer.ring, (-1, 0))
        states = decode(layer, slot, length, tokens)
        if position == length and layer.number == 0:
            layer.states[slot] = hash((layer.states[slot], token))
        return states

    monkeypatch.setattr(_Layer, "decode", further)


def _keep_the_last_hidden_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """h of the last row, which may have been rejected, stands for that of the last token."""
    record = FakeRunner._record

    def recorded(runner: FakeRunner, batch: object) -> None:
        record(runner, batch)  # type: ignore[arg-type]
        for slot, kept in enumerate(runner._hidden):
            if kept:
                last = max(kept.values())
                runner._hidden[slot] = {entry: (position, last[1]) for entry, (position, _) in kept.items()}

    monkeypatch.setattr(FakeRunner, "_record", recorded)


def _judge_by_the_drafts_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    stands, before = step_sampling._stands, [[]]  # type: ignore[var-annotated]

    def judged(run: Run, tokens: list[int], drafts: list[int]) -> list[int]:
        other = before[0] if len(before[0]) == len(drafts) else drafts
        before[0] = drafts
        return stands(run, tokens, other)

    monkeypatch.setattr(step_sampling, "_stands", judged)


def _shift_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of drafts take the noise, and the early stops, of the position before."""

    def shifted(run: Run) -> list[int]:
        first = run.end - run.num_drafts
        return [first, *range(first, run.end)]

    monkeypatch.setattr(Run, "chosen_positions", property(shifted))


def _keep_the_drafts_of_an_aborted_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    run_pass = Engine.run_pass

    def again(engine: Engine, plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        kept = engine._drafts
        if index == 0 and kept._tokens:
            monkeypatch.setattr("divisi.cluster.engine.engine.Drafts", lambda: kept)
        run_pass(engine, plan, index, dispatcher)
        monkeypatch.setattr("divisi.cluster.engine.engine.Drafts", Drafts)

    monkeypatch.setattr(Engine, "run_pass", again)


def _do_not_roll_a_grammar_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(guide: Guide, proposed: Iterable[int]) -> LLMatcher | None:
        if guide.matcher is not None:
            guide.matcher.consume_tokens(list(proposed)[-1:])
        return guide.matcher

    monkeypatch.setattr(Guide, "look_ahead", taken)


@pytest.mark.parametrize(
    "plant",
    [
        _count_every_row,
        _replay_one_too_many,
        _keep_the_last_hidden_state,
        _judge_by_the_drafts_of_another,
        _shift_the_noise,
        _keep_the_drafts_of_an_aborted_attempt,
        _do_not_roll_a_grammar_back,
    ],
)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="trace of seed"):
        run_traces(range(TRACES), draft_trace)
