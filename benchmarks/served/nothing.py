"""An engine whose steps compute nothing: each running request gets its next token, at a pace that the requests name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from divisi.cluster.engine.stats import EngineStats
from divisi.cluster.engine.step.plan import Run
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import Request, TokenEvent
from divisi.model.dispatcher import Dispatcher
from divisi.model.text import TextCodec, Tokenizer


def plain_tokens(model_dir: Path) -> list[int]:
    """Tokens that are text each, whatever stands before them."""
    tokenizer = TextCodec.load(model_dir).tokenizer
    return [token for token in range(tokenizer.vocab_size) if _is_plain(tokenizer, token)]


def expected_tokens(plain: Sequence[int], prompt: Sequence[int], count: int) -> list[int]:
    """The answer to a prompt: no two prompts with other first tokens have the same one."""
    return [plain[(prompt[0] + 7 * index) % len(plain)] for index in range(count)]


@dataclass(frozen=True, slots=True)
class EmptyPlan:
    """A step with a row for each running request."""

    rows: int
    rings: tuple[Run, ...] = ()
    scans: tuple[Run, ...] = ()
    alone: bool = False
    second: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """One full pass."""
        return (self.rows,)


class IdleEngine:
    """In the place of `divisi.cluster.engine.engine.Engine`. A request's seed is the time of a step in microseconds."""

    def __init__(self, plain: Sequence[int]) -> None:
        self._plain = plain
        self._running: dict[str, tuple[Request, list[int]]] = {}
        self._events: list[TokenEvent] = []
        self._next_at = 0.0
        self._pace_s = 0.0
        self._steps = self._generated = 0

    def submit(self, request: Request) -> None:
        """See Engine."""
        if request.request_id in self._running:
            raise RequestRejected(f"request id {request.request_id!r} is already being served")
        tokens = expected_tokens(self._plain, request.prompt, request.max_tokens)
        self._running[request.request_id] = request, tokens[len(request.answered) :][::-1]
        self._pace_s = request.sampling.seed / 1e6

    def cancel(self, request_id: str) -> None:
        """See Engine."""
        if self._running.pop(request_id, None) is not None:
            self._events.append(TokenEvent(request_id, (), None, finish_reason="cancelled"))

    def plan(self) -> EmptyPlan | None:
        """See Engine."""
        return EmptyPlan(len(self._running)) if self._running else None

    def resize(self, max_rows: int, *, crowded: bool) -> bool:
        """See Engine: there is always room."""
        return False

    def run_pass(self, plan: EmptyPlan, index: int, dispatcher: Dispatcher) -> None:
        """Wait for the step's time, as for a GPU."""
        now = time.monotonic()
        self._next_at = max(self._next_at + self._pace_s, now)
        time.sleep(self._next_at - now)  # it stands for the work of a step

    def commit(self, plan: EmptyPlan) -> list[TokenEvent]:
        """A token for each."""
        self._steps += 1
        self._generated += len(self._running)
        events = []
        for name, (request, left) in list(self._running.items()):
            index, token = request.max_tokens - len(left), left.pop()
            if not left:
                del self._running[name]
            events.append(TokenEvent(name, (token,), None, finish_reason=None if left else "length", index=index))
        return events

    def beside(self, sequences: int) -> None:
        """See StepEngine."""

    def take_events(self) -> list[TokenEvent]:
        """See Engine."""
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """See Engine."""
        return EngineStats(
            running=len(self._running), waiting=0, queued_tokens=0, free_pages=1, total_pages=1, free_slots=1,
            total_slots=1, steps=self._steps, aborted_steps=0, preemptions=0, prefill_tokens=0,
            generated_tokens=self._generated, drafted_tokens={}, accepted_tokens={}, step_seconds={},
        )  # fmt: skip


def _is_plain(tokenizer: Tokenizer, token: int) -> bool:
    raw = tokenizer.bytes_of(token)
    return token not in tokenizer.special_ids and raw.isascii() and raw.isalpha()
