"""The judge of answers: what every client read, against what it would have read without the blows. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.e2e.chaos.blows import Blow
from tests.e2e.chaos.reading import Answer, Choice

LONGEST_GAP_S = 10.0
LONGEST_GAP_WITHOUT_WORKERS_S = 25.0
MOST_UNDECIDED = 2
LOGPROB_TOLERANCE = 1e-3
FRONTS = ("ingress", "proxy")
_FRONT_BACK_S = 5.0
"""A killed ingress or proxy may fail requests for so long."""
_GANG_BACK_S = LONGEST_GAP_WITHOUT_WORKERS_S
"""A new request may be told 503 for so long after a blow to the gang."""
_SOON_S = 1.5
"""What a blow causes begins by then: tokens that were on their way still come."""

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Struck:
    """A blow as it fell."""

    blow: Blow
    begin: float
    end: float
    """When the stopped were continued; of a deadly blow, as `begin`."""
    processes: int
    """Struck; 0 where none of the kind was there."""
    streams: int
    """Theirs that were open."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an answer parts from its reference; `token` is a position where the tokens themselves do."""

    choice: int
    what: str
    token: int | None = None


Undecided = Callable[[Answer, Difference], bool]
"""Of a reference: whether its model could as well have gone another way there."""


@dataclass
class Verdict:
    """What was found."""

    whole: int = 0
    prefixes: int = 0
    """Broken answers, of which every token read was right."""
    undecided: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """New requests that were told 503 while the gang was struck."""
    broken: list[str] = field(default_factory=list)
    """Streams of struck ingresses and fronts."""
    long_gaps: list[str] = field(default_factory=list)
    """Over the limit, with an excuse."""
    faults: list[str] = field(default_factory=list)


def judge(
    references: Mapping[str, Answer],
    answers: Sequence[Answer],
    struck: Sequence[Struck],
    no_workers: Sequence[Span] = (),
    undecided: Undecided = lambda *_: False,
    longest_gap_s: float = LONGEST_GAP_S,
) -> Verdict:
    """Every answer, every error and every gap. `no_workers` are the times in which no worker lived."""
    verdict = Verdict()
    for answer in answers:
        _judge_content(references[answer.ask], answer, verdict, undecided)
        if not answer.done:
            _judge_error(answer, struck, verdict)
        for gap in answer.gaps():
            if gap[1] - gap[0] > longest_gap_s:
                _judge_gap(answer, gap, struck, no_workers, verdict)
    if len(verdict.undecided) > MOST_UNDECIDED:
        verdict.faults.append(f"{len(verdict.undecided)} answers parted at ties, more than {MOST_UNDECIDED}")
    return verdict


def _judge_content(reference: Answer, answer: Answer, verdict: Verdict, undecided: Undecided) -> None:
    found = difference(reference, answer)
    who = f"{answer.ask} in slot {answer.slot}, begun at {answer.begun:.1f} s"
    if found is None:
        verdict.whole += answer.done
        verdict.prefixes += not answer.done and bool(answer.times)
    elif found.token is not None and undecided(reference, found):
        verdict.undecided.append(f"{who}: {found.what}")
    else:
        verdict.faults.append(f"{who}: {found.what}")


def _judge_error(answer: Answer, struck: Sequence[Struck], verdict: Verdict) -> None:
    who, at = f"{answer.ask} in slot {answer.slot} at {answer.ended:.1f} s: {answer.error}", answer.ended
    fronts = [hit for hit in struck if hit.blow.kind in FRONTS and hit.begin <= at <= hit.end + _FRONT_BACK_S]
    gang = [hit for hit in struck if hit.blow.kind not in FRONTS and hit.begin <= at <= hit.end + _GANG_BACK_S]
    refused = answer.error.startswith("status 503 gang_not_ready")
    if refused and (gang or fronts) and not answer.times:
        verdict.refused.append(who)
    elif fronts and not answer.error.startswith("event"):
        verdict.broken.append(who)
    else:
        verdict.faults.append(f"no killed ingress or proxy explains it: {who}")


def _judge_gap(
    answer: Answer, gap: Span, struck: Sequence[Struck], no_workers: Sequence[Span], verdict: Verdict
) -> None:
    seconds = gap[1] - gap[0]
    text = f"{answer.ask} in slot {answer.slot}: no token from {gap[0]:.1f} to {gap[1]:.1f} s ({seconds:.1f} s)"
    fronts = [(hit.begin, hit.end + _FRONT_BACK_S) for hit in struck if hit.blow.kind in FRONTS]
    if seconds - _covered(gap, fronts) <= LONGEST_GAP_S:
        verdict.long_gaps.append(f"{text}; its ingress or front was struck")
    elif any(_overlap(span, gap) for span in no_workers) and seconds <= LONGEST_GAP_WITHOUT_WORKERS_S:
        verdict.long_gaps.append(f"{text}; no worker lived")
    else:
        verdict.faults.append(text)


def _covered(gap: Span, spans: Sequence[Span]) -> float:
    """Seconds of a gap that lie in any of the spans."""
    covered, at = 0.0, gap[0]
    for begin, end in sorted(spans):
        covered += max(min(end, gap[1]) - max(begin, at), 0.0)
        at = max(at, end)
    return covered


def difference(reference: Answer, answer: Answer) -> Difference | None:
    """The first thing in which an answer is not its reference, or not the beginning of it if it broke off."""
    for index in sorted({*reference.choices, *answer.choices}):
        wanted, found = reference.choices.get(index, Choice()), answer.choices.get(index, Choice())
        if (what := _token_difference(wanted.tokens, found.tokens, answer.done)) is not None:
            return Difference(index, *what)
        if (text := _choice_difference(wanted, found, answer.done)) is not None:
            return Difference(index, text)
    if answer.done and answer.usage != reference.usage:
        return Difference(0, f"usage is {answer.usage}, not {reference.usage}")
    return None


def _token_difference(wanted: Sequence[int], found: Sequence[int], whole: bool) -> tuple[str, int] | None:
    for at, (one, other) in enumerate(zip(wanted, found, strict=False)):
        if one != other:
            return f"token {at} is {other}, not {one}", at
    if len(found) > len(wanted) or (whole and len(found) < len(wanted)):
        return f"it has {len(found)} tokens, not {len(wanted)}", min(len(found), len(wanted))
    return None


def _choice_difference(wanted: Choice, found: Choice, whole: bool) -> str | None:
    ends = found.ends if whole or found.ends else wanted.ends
    if ends != wanted.ends:
        return f"it ends by {found.ends}, not {wanted.ends}"
    if not (found.text == wanted.text if whole else wanted.text.startswith(found.text)):
        return f"its text is not the reference's: {found.text[-40:]!r}"
    for call, (name, arguments) in found.calls.items():
        known = wanted.calls.get(call, ["", ""])
        if not (known == [name, arguments] if whole else known[1].startswith(arguments)):
            return f"its call {call} is {name}({arguments[-40:]}), not {known[0]}"
    if whole and found.calls.keys() != wanted.calls.keys():
        return f"it has {len(found.calls)} calls, not {len(wanted.calls)}"
    if whole and len(found.logprobs) != len(wanted.logprobs):
        return f"it has {len(found.logprobs)} log-probabilities, not {len(wanted.logprobs)}"
    for at, (one, other) in enumerate(zip(wanted.logprobs, found.logprobs, strict=False)):
        if one[0] != other[0] or abs(one[1] - other[1]) > LOGPROB_TOLERANCE:
            return f"log-probability {at} is {other}, not {one}"
    return None


def gap_of(hit: Struck, answers: Sequence[Answer]) -> float:
    """The longest time without a token, of all that had some and were open, that a blow could have caused; in s."""
    span = hit.begin, hit.end + _SOON_S
    gaps = [
        later - earlier
        for answer in answers
        if answer.times and answer.times[0] < hit.begin and answer.is_open(hit.begin)
        for earlier, later in answer.gaps()
        if _overlap((earlier, later), span)
    ]
    return max(gaps, default=0.0)


def _overlap(one: Span, other: Span) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
