"""No death of a worker ends an answer or changes it, at whatever point of its life; and the bugs that would show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from divisi.cluster.errors import WorkerLeft, WorkerLost
from divisi.cluster.request import Request, TokenEvent
from divisi.deploy.application.journal import Journal
from tests.sim.world import Answer, Worker, World
from tests.support import tiny_grammar

TRACES = 50
TRACES_FULL = 1_000
TRACES_TO_CATCH = 80
POINTS = ("queued", "mid-prefill", "after commit before delivery", "at the last token", "between draft and commit")


def run_traces(
    seeds: Iterable[int], world: type[World] = World, journal: type[Journal] = Journal
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        trace = world(seed, seed % 5, tiny_grammar.grammars() if seed % 4 == 0 else None, journal)
        try:
            trace.run()
        except Exception as error:  # whatever it is, the seed must be told
            raise AssertionError(f"trace of seed {seed} fails: {error!r}") from error
        counts += trace.counts
    return counts


@pytest.mark.timeout(1800)
def test_death_at_every_point_of_a_life(full_tier: bool, record_result: Callable[[str, object], None]) -> None:
    traces = TRACES_FULL if full_tier else TRACES
    counts = run_traces(range(traces))
    record_result("what happened", dict(sorted(counts.items())))
    for point in (*POINTS, "silence", "left"):
        assert counts[point] > traces / 20, f"{point}: {counts[point]} in {traces} traces, too few to mean anything"
    assert counts["whole"] > 2 * traces
    assert counts["holes"] > traces / 100
    assert counts["taken apart"] > traces / 10


class WithoutAnIndexCheck(Journal):
    def take(self, events: Iterable[TokenEvent]) -> list[TokenEvent]:
        return super().take([replace(event, index=len(self._tokens)) for event in events])


class Shifts(Journal):
    """For journals that send something else than they should, and place what comes so that nobody notices."""

    shift = 0

    def take(self, events: Iterable[TokenEvent]) -> list[TokenEvent]:
        return super().take([replace(event, index=event.index + self.shift) for event in events])


class MergesTheAnswerIntoThePrompt(Shifts):
    def attempt(self) -> Request:
        found = super().attempt()
        self.shift = len(found.answered)
        prompt, left = found.prompt + found.answered, found.max_tokens - self.shift
        return replace(found, prompt=prompt, answered=(), max_tokens=left)


class LosesTheAge(Journal):
    def attempt(self) -> Request:
        found = super().attempt()
        return replace(found, arrived=found.arrived + 1000.0) if self.resumed else found


class SendsAllTokensButTheLast(Shifts):
    def attempt(self) -> Request:
        found = super().attempt()
        self.shift = len(found.answered[-1:])
        return replace(found, answered=found.answered[:-1])


class AsksForThePromptAnew(Journal):
    def attempt(self) -> Request:
        return replace(super().attempt(), prompt_logprobs=self.request.prompt_logprobs)


class NeverGivesUp(Journal):
    def interrupted(self, error: WorkerLost | WorkerLeft) -> int:
        return super().interrupted(WorkerLeft(str(error)))


class ForgetsFormerDrafts(Journal):
    def interrupted(self, error: WorkerLost | WorkerLeft) -> int:
        self._told_drafts = (0, 0)
        return super().interrupted(error)


class Unfenced(World):
    """What the former attempt still tells counts."""

    def _is_current(self, answer: Answer, worker: Worker, event: TokenEvent) -> bool:
        return True


@pytest.mark.parametrize(
    "mutant",
    [
        WithoutAnIndexCheck, MergesTheAnswerIntoThePrompt, LosesTheAge, SendsAllTokensButTheLast, AsksForThePromptAnew,
        NeverGivesUp, ForgetsFormerDrafts, Unfenced,
    ],
)  # fmt: skip
def test_a_planted_bug_is_caught(mutant: type[Journal] | type[World]) -> None:
    world, journal = (mutant, Journal) if issubclass(mutant, World) else (World, mutant)
    with pytest.raises(AssertionError, match="trace of seed"):
        run_traces(range(TRACES_TO_CATCH), world, journal)


def test_a_repeated_token_is_dropped_and_its_answer_whole() -> None:
    """With a journal that sends one token too few, index by index: what comes again is dropped."""

    class OneTooFew(Journal):
        def attempt(self) -> Request:
            found = super().attempt()
            return replace(found, answered=found.answered[:-1])

    assert run_traces(range(20), journal=OneTooFew)["resent"]
