"""How many tokens are drafted for whom: plain Python, without torch or a clock.

Each draft that stands is one token more from a step, and each costs a row in the full pass and one in a draft pass.
What rows cost is measured (`step_times/`), never assumed. How likely a draft is to stand is learnt from those before
it, by sequence and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import NamedTuple, Protocol

from divisi.cluster.step_times.times import StepTimes

MOST_DRAFTS = 8
_PRIOR = 4.0
"""Trials that what is known of all sequences counts for, in a new one."""
_FADE = 0.93
"""What a step's trials still count in the next one. What is no longer tried is forgotten too, and so tried again."""
_FADE_OF_ALL = 0.99
"""The same for what is known of all sequences, from which each begins."""
_FIRST_GUESS = 0.85
_LARGEST_UNIT = 1e9
_KEPT_STEPS = 16
"""For which a decision holds while the same sequences draft: it takes longer to compute than a small model's layer."""
_PROBE_EVERY = 32
"""Steps after which those that draft nothing draft one: where nothing is drafted, nothing is learnt."""
_EXPLORE_EVERY, _EXPLORED_FIRST = 64, (6, 12, 18, 24, 48)
"""Steps after which all draft as far as they may: what the table says of steps that are never taken is never put
right. Between the steps in which one draft more is tried."""
_NEARLY = 0.75
"""Of the best rate, that such a step must promise."""
_WORTHWHILE = 1.03
"""Times as many tokens per second must be expected of drafts as of none: what isn't known of them is to their harm."""
_AS_GOOD = 0.95
"""Of the best rate: as good where it takes more drafts. Measured times are no better than that, and what a step costs
outside of the table (headers, messages, caches that others have emptied) is shared by more tokens then."""
_LENT = 0.5
"""Steps' worth of time that the drafts of one sequence may cost all those together that have none."""


@dataclass(slots=True)
class Survival:
    """How often drafts stood, by position, those before them standing too; older trials count less."""

    stood: list[float] = field(default_factory=lambda: [0.0] * MOST_DRAFTS)
    """Steps in which the drafts up to a position stood, and none after it."""
    tried: list[float] = field(default_factory=lambda: [0.0] * MOST_DRAFTS)
    """Steps in which those up to it were tried: the last one that stood and the one after it."""
    unit: float = 1.0
    """What a step counts as in both: more with each, in place of less for all before it."""

    def note(self, drafted: int, accepted: int) -> None:
        """So many were drafted in a step, at least one, and the first of them accepted."""
        self.tried[min(accepted + 1, drafted) - 1] += self.unit
        if accepted:
            self.stood[accepted - 1] += self.unit

    def fade(self, kept: float = _FADE) -> None:
        """A step has passed."""
        self.unit /= kept
        if self.unit > _LARGEST_UNIT:
            self.tried = [count / self.unit for count in self.tried]
            self.stood = [count / self.unit for count in self.stood]
            self.unit = 1.0

    def chances(self, priors: Sequence[float]) -> list[float]:
        """That the draft at each position stands if those before it do; `priors`: how likely that is in general."""
        weight = _PRIOR * self.unit
        return [
            (stood + weight * prior) / (tried + weight)
            for stood, tried, prior in zip(_reaching(self.stood), _reaching(self.tried), priors, strict=False)
        ]

    def chances_in_turn(self, guess: float, most: int = MOST_DRAFTS) -> list[float]:
        """The same of the first so many, where a position's prior is the chance of the one before it, and the first
        one's a guess.
        """
        weight, found = _PRIOR * self.unit, []
        for stood, tried in islice(zip(_reaching(self.stood), _reaching(self.tried), strict=True), most):
            guess = (stood + weight * guess) / (tried + weight)
            found.append(guess)
        return found


@dataclass(slots=True, eq=False)
class Drafter:
    """What is known of one sequence's drafts."""

    survival: Survival = field(default_factory=Survival)
    idle_steps: int = 0
    """Since it drafted last."""
    limit: int = 0
    """Drafts that it may have in the step that is planned."""
    context: int = 0
    """Tokens before its first row in it."""


class Company(NamedTuple):
    """What else is in the step of those that may draft."""

    plain: int = 0
    """Sequences of this worker that decode and may not draft."""
    prefill_rows: int = 0
    elsewhere: int = 0
    """Sequences of other workers that decode without drafts; drafts here make them wait."""
    context: int = 0
    """Tokens before the rows of those that may not draft."""


ALONE = Company()


class DraftPolicy(Protocol):
    """Decides how many tokens each of some sequences drafts in a step."""

    def depths(self, drafters: Sequence[Drafter], company: Company) -> list[int]:
        """Drafts for each, at most its limit, of those that have one."""
        ...

    def note(self, drafter: Drafter, drafted: int, accepted: int) -> None:
        """A step of a sequence is committed."""
        ...


class FixedDepth:
    """As many as the limits allow, or `most` if that is less."""

    def __init__(self, most: int = MOST_DRAFTS) -> None:
        self.most = most

    def depths(self, drafters: Sequence[Drafter], company: Company) -> list[int]:
        """See DraftPolicy."""
        return [min(drafter.limit, self.most) for drafter in drafters]

    def note(self, drafter: Drafter, drafted: int, accepted: int) -> None:
        """See DraftPolicy."""


class _Slot(NamedTuple):
    """A draft that could be made. The one with the most tokens for its time sorts first, the earlier of equals."""

    worth: float
    """Minus the chance that it stands, for each second that it costs."""
    place: int
    drafter: int
    chance: float
    seconds: float
    """For reading the tokens before it."""


class MostTokensPerSecond:
    """The drafts with which the expected tokens per second of all sequences together are highest, by measured times.

    Those that draft lend their time from those that don't, who get nothing for it. It is therefore limited: the drafts
    of one sequence cost all others together no more than `_LENT` steps a step. One that drafts beside 16 that don't
    slows them by a thirtieth; of eight beside eight, each step may take half as long again.
    """

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._all = Survival()
        self._steps = 0
        self._decided: tuple[Sequence[Drafter], Sequence[int]] = ((), ())
        """For whom, and in which company but for its context, the depths are."""
        self._depths: list[int] = []

    def depths(self, drafters: Sequence[Drafter], company: Company) -> list[int]:
        """See DraftPolicy. Until anything is measured, as far as the limits allow."""
        limits = [drafter.limit for drafter in drafters]
        if not self._times.is_known:
            return limits
        self._steps += 1
        self._all.fade(_FADE_OF_ALL)
        if self._is_to_explore(company):
            return self._explored(drafters, company)
        if self._steps % _PROBE_EVERY == 0:
            self._decided = (), ()
            return self._probed(self._chosen(drafters, company), drafters, company)
        circumstances = drafters, company[:-1]
        if self._steps % _KEPT_STEPS == 0 or circumstances != self._decided:
            self._decided, self._depths = circumstances, self._chosen(drafters, company)
        return list(map(min, self._depths, limits))  # an answer that nears its end may have fewer

    def note(self, drafter: Drafter, drafted: int, accepted: int) -> None:
        """See DraftPolicy."""
        drafter.survival.fade()
        if not drafted:
            drafter.idle_steps += 1
            return
        drafter.idle_steps = 0
        drafter.survival.note(drafted, accepted)
        self._all.note(drafted, accepted)

    def _is_to_explore(self, company: Company) -> bool:
        """Where nobody has to wait for it who drafts nothing."""
        due = self._steps in _EXPLORED_FIRST or self._steps % _EXPLORE_EVERY == _EXPLORED_FIRST[-1]
        return due and not company.plain and not company.elsewhere

    def _chosen(self, drafters: Sequence[Drafter], company: Company) -> list[int]:
        slots = self._likely(drafters, company)
        return _deep(slots[: self._best(slots, drafters, company)], len(drafters))

    def _explored(self, drafters: Sequence[Drafter], company: Company) -> list[int]:
        """All drafts that may be, where that promises nearly as much as the best of them."""
        slots = self._likely(drafters, company)
        best = slots[: self._best(slots, drafters, company)]
        promised = self._rate(slots, drafters, company)
        tried = slots if promised >= _NEARLY * self._rate(best, drafters, company) else best
        return _deep(tried, len(drafters))

    def _likely(self, drafters: Sequence[Drafter], company: Company) -> list[_Slot]:
        """The slots, by what is known of each sequence's drafts."""
        priors = self._all.chances_in_turn(_FIRST_GUESS, max([drafter.limit for drafter in drafters]))
        chances = [drafter.survival.chances(priors[: drafter.limit]) for drafter in drafters]
        return self._slots(drafters, chances, company)

    def _slots(self, drafters: Sequence[Drafter], chances: Sequence[Sequence[float]], company: Company) -> list[_Slot]:
        """All drafts that could be made, the best first; of one sequence always the earlier before the later.

        `chances` are of a draft to stand if those before it do. What a row costs besides reading is taken as the same
        for all here; `_best` counts exactly.
        """
        sequences, most = len(drafters) + company.plain, sum(map(len, chances))
        full, draft = self._times.full(sequences, most), self._times.draft(1)
        _, more, draft_read = self._times.reading
        row = (full[most] - full[0]) / most + draft[1] / len(drafters)
        slots = []
        for index, (drafter, of_one) in enumerate(zip(drafters, chances, strict=True)):
            seconds, all_stand = drafter.context * (more + draft_read), 1.0
            cost = max(row + seconds, 1e-9)
            for place, chance in enumerate(of_one):
                all_stand *= chance
                slots.append(_Slot(-all_stand / cost, place, index, all_stand, seconds))
        return slots if len(drafters) == 1 else sorted(slots)

    def _best(self, slots: Sequence[_Slot], drafters: Sequence[Drafter], company: Company) -> int:
        """How many of the slots to take: the most that are as good as the best number. Costs jump, so that every number
        is looked at.
        """
        times, sequences = self._times, len(drafters) + company.plain
        full, draft = times.full(sequences, len(slots)), times.draft(len(drafters))
        first = times.first_draft(len(drafters))
        others, alone = sequences + company.elsewhere, self._without_s(drafters, company)
        least = _WORTHWHILE * others / alone
        tokens, seconds, rates = float(others), alone, []
        passes, lent, before = [0] * MOST_DRAFTS, _LENT * alone, full[0]
        for count, (_, place, _, chance, reading) in enumerate(slots, 1):
            rows, after = passes[place], full[count]
            passes[place] = rows + 1
            tokens += chance
            own = draft if place else first
            seconds += own[rows + 1] - own[rows] + after - before + reading
            before = after
            affordable = (seconds - alone) * (others - passes[0]) <= lent * passes[0]
            rates.append(tokens / seconds if affordable else 0.0)
        wanted = max(least, _AS_GOOD * max(rates, default=0.0))
        return next((count for count in range(len(rates), 0, -1) if rates[count - 1] > wanted), 0)

    def _rate(self, slots: Sequence[_Slot], drafters: Sequence[Drafter], company: Company) -> float:
        """Expected tokens per second with those drafts."""
        times, sequences, most = self._times, len(drafters) + company.plain, len(slots)
        full, draft = times.full(sequences, most), times.draft(len(drafters))
        rows = [sum([slot.place == place for slot in slots]) for place in range(MOST_DRAFTS)]
        drafting = times.first_draft(len(drafters))[rows[0]] + sum([draft[count] for count in rows[1:]])
        seconds = self._without_s(drafters, company) + full[most] - full[0] + drafting
        tokens = sequences + company.elsewhere + sum([slot.chance for slot in slots])
        return tokens / (seconds + sum([slot.seconds for slot in slots]))

    def _without_s(self, drafters: Sequence[Drafter], company: Company) -> float:
        """Seconds of a step without drafts."""
        times = self._times
        read = (company.context + sum([drafter.context for drafter in drafters])) * times.reading.first
        prefill = times.prefill(company.prefill_rows) if company.prefill_rows else 0.0
        return times.full(len(drafters) + company.plain, 0)[0] + read + prefill

    def _probed(self, depths: list[int], drafters: Sequence[Drafter], company: Company) -> list[int]:
        """With one draft more for those that draft, and one for those that had none for long, if drafts that all stand
        were worth their time.
        """
        tried = [
            min(depth + 1, drafter.limit) if depth or drafter.idle_steps >= _PROBE_EVERY // 2 else 0
            for drafter, depth in zip(drafters, depths, strict=True)
        ]
        if tried == depths:
            return depths
        hoped = self._slots(drafters, [[1.0] * drafter.limit for drafter in drafters], company)
        return tried if self._best(hoped, drafters, company) else depths


def _reaching(up_to: Sequence[float]) -> list[float]:
    """Of counts by the position up to which something was so: how often it was so at each."""
    return [*accumulate(reversed(up_to))][::-1]


def _deep(slots: Sequence[_Slot], drafters: int) -> list[int]:
    """How many of them each drafter has."""
    depths = [0] * drafters
    for slot in slots:
        depths[slot.drafter] += 1
    return depths
