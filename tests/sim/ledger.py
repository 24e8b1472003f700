"""What each request was told, held against the oracle, and how long the earliest one has been kept waiting.

**The starvation bound.** Age is arrival at the ingress; an answer that another worker has begun may be older than all
that is here. At any moment let the *earliest* be the oldest of the requests that run. While a request is the earliest,
it ends within

    own_steps = ceil(prompt / chunk) + max(answer - 1, 0)

committed steps, where `answer` is its longest possible answer and `chunk` the least number of tokens of the earliest
prompt that fit a step: `max_step_tokens - (max_seqs - 1)` (everybody else decodes), or `max_prompt_logit_rows` where
that is less and prompt log-probabilities are asked for.

Proof. Running sequences are in order of age, and preemption takes the youngest, so that the earliest keeps its memory;
if nothing runs, the head of the queue is admitted at once, as it was accepted only because it fits alone. Each
committed step gives the earliest a chunk (`chunk` tokens or all that are left) or a decoded token. If it had `g` tokens
of its answer when it became the earliest (from another worker, or before a preemption) and has to compute them again,
that takes ceil((prompt + g) / chunk) <= ceil(prompt / chunk) + g steps, and `g` fewer decodes follow.

Every committed step is charged to the earliest. It stays that until its end, or until an older one is admitted and
*displaces* it, which only one that was begun elsewhere can; it may then be preempted, and its charge begins anew.

The queue is in order of age too, and nothing is admitted before its head. What is charged while request R is unfinished
is therefore R itself; what is older, here when R comes or coming later; or what is younger and ran when R came. Each is
charged at most its `own_steps`, and once more whenever it is displaced. So R ends within

    own_steps of R, of all that are unfinished when it comes and are older or run,
    of all older ones that come later, and of each that is displaced meanwhile.

Both bounds are checked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.engine.sequence import Sequence, Status
from divisi.cluster.engine.step.plan import Outcome
from divisi.cluster.request import EndReason, Request, TokenLogprob
from tests.sim.hash_model import expected_answer
from tests.sim.invariants import Fault, Violation


@dataclass
class Record:
    """One accepted request."""

    sequence: Sequence
    tokens: list[int]
    reason: EndReason
    stop_id: int | None
    own_steps: int
    """The bound on the steps that are charged to it."""
    all_steps: int
    """The bound on the steps between its arrival and its end."""
    age: tuple[float, int]
    """Ascending by arrival at the ingress."""
    arrived_at_step: int
    charged: int = 0
    """Steps since it became the earliest."""
    told: list[int] = field(default_factory=list)
    cancelled: bool = False
    prompt_logprobs: list[list[TokenLogprob | None]] = field(default_factory=list)


class Ledger:
    """The books of one trace."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._steps = self._accepted = 0
        self._earliest: Record | None = None
        self.unfinished: dict[str, Record] = {}
        self.ended: Counter[str] = Counter()
        """Terminal events by their reason."""
        self.worst_wait = 0.0
        """The largest fraction of its bound that a request has taken."""

    def accept(self, sequence: Sequence, request: Request) -> None:
        """A request was accepted."""
        tokens, reason, stop_id = expected_answer(request, self._config.max_model_len)
        own, age = own_steps(request, self._config), (request.arrived, self._accepted)
        self._accepted += 1
        ahead = 0
        for other in self.unfinished.values():
            if other.age < age or _runs(other):
                ahead += other.own_steps
            if age < other.age:
                other.all_steps += own
        record = Record(sequence, tokens, reason, stop_id, own, ahead + own, age, self._steps)
        record.told += request.answered
        self.unfinished[request.request_id] = record

    def cancel(self, request_id: str) -> None:
        """A request, if it is unfinished, is about to be cancelled."""
        if record := self.unfinished.get(request_id):
            record.cancelled = True

    def charge(self) -> Record | None:
        """A step was planned: who is charged for it once it is committed."""
        before = self._earliest
        running = [record for record in self.unfinished.values() if _runs(record)]
        self._earliest = now = min(running, key=lambda record: record.age, default=None)
        if before is not None and now is not None and now.age < before.age and before in self.unfinished.values():
            before.charged = 0
            for record in self.unfinished.values():
                record.all_steps += before.own_steps
        return now

    def committed(self, charged: Record | None) -> None:
        """A step was committed; what it did is told next."""
        self._steps += 1
        if charged is not None:
            charged.charged += 1

    def check_waits(self) -> None:
        """After a committed step: nobody waits too long, and who was cancelled has ended."""
        for name, record in self.unfinished.items():
            if record.cancelled:
                raise Violation(Fault.CANCEL_IGNORED, f"request {name} has outlived its last step")
            if record.charged > record.own_steps:
                what = f"request {name} has been the earliest for {record.charged} steps, of {record.own_steps}"
                raise Violation(Fault.STARVATION, what)
            if self._steps - record.arrived_at_step >= record.all_steps:
                raise Violation(Fault.STARVATION, f"request {name} has not ended in {record.all_steps} steps")

    def tell(self, outcome: Outcome) -> None:
        """A request is told something."""
        name = outcome.sequence.request.request_id
        record = self.unfinished.get(name)
        if record is None or record.sequence is not outcome.sequence:
            raise Violation(Fault.SECOND_TERMINAL, f"request {name}: {outcome[1:]}")
        if record.cancelled and outcome.finish_reason != "cancelled":
            raise Violation(Fault.CANCEL_IGNORED, f"request {name}: {outcome[1:]}")
        record.told += outcome.token_ids
        if record.told != record.tokens[: len(record.told)]:
            raise Violation(Fault.WRONG_ANSWER, f"request {name}: {record.told}, expected {record.tokens}")
        if outcome.finish_reason is None and record.reason == "length" and len(record.told) == len(record.tokens):
            raise Violation(Fault.WRONG_ANSWER, f"request {name} goes on after {record.told}")
        if outcome.finish_reason is not None:
            self._end(name, record, outcome)

    def tell_prompt_logprobs(self, sequence: Sequence, entries: list[TokenLogprob | None]) -> None:
        """A request is told the log-probabilities of its prompt."""
        prompt = sequence.request.prompt
        record = self.unfinished[sequence.request.request_id]
        record.prompt_logprobs.append(entries)
        found = [entry and (entry.token_id, entry.logprob) for entry in entries]
        if found != [None, *[(token, -position) for position, token in enumerate(prompt[1:], 1)]]:
            raise Violation(Fault.WRONG_ANSWER, f"request {sequence.request.request_id}: prompt {prompt}, told {found}")

    def _end(self, name: str, record: Record, outcome: Outcome) -> None:
        reason = outcome.finish_reason
        if not (reason == "cancelled" and record.cancelled):
            expected = (record.tokens, record.reason, record.stop_id)
            if (record.told, reason, outcome.stop_id) != expected:
                raise Violation(Fault.WRONG_ANSWER, f"request {name}: {record.told}, {outcome[2:]}, not {expected}")
            wanted = int(record.sequence.request.prompt_logprobs is not None)
            if len(record.prompt_logprobs) != wanted:
                told = len(record.prompt_logprobs)
                raise Violation(Fault.WRONG_ANSWER, f"request {name}: prompt log-probabilities told {told} times")
        self.ended[str(reason)] += 1
        self.worst_wait = max(self.worst_wait, (self._steps - record.arrived_at_step) / record.all_steps)
        del self.unfinished[name]


def _runs(record: Record) -> bool:
    return record.sequence.status in (Status.PREFILL, Status.DECODE)


def own_steps(request: Request, config: SchedulerConfig) -> int:
    """The bound that the module proves."""
    prompt = len(request.prompt)
    chunk = config.max_step_tokens - config.max_seqs + 1
    if request.prompt_logprobs is not None:
        chunk = min(chunk, config.max_prompt_logit_rows)
    answer = min(request.max_tokens, config.max_model_len - prompt)
    return -(-prompt // chunk) + max(answer - 1, 0)
