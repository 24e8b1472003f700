"""What an ingress knows of an answer, so that no death of a worker ends it. Plain Python: no Ray, no sockets, no clock.

An answer is computed by one attempt after another. When a worker dies, leaves or falls silent, the next attempt goes to
another (or to who fills the same seat): the request with the tokens that have come, under another name, so that the
worker that still computes the former attempt, or comes back with it, is not taken at its word. What an attempt tells
is placed by its index: tokens that are there are dropped, and nothing is appended after a hole.

The request passes gate and key once, and keeps its age. What the client reads depends on nothing of this: stops, usage
and parsers follow the journal's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from divisi.cluster.errors import AnswerLost, WorkerLeft, WorkerLost
from divisi.cluster.request import Request, TokenEvent

MAX_DEATHS = 3
"""So many workers in a row may die under an answer without a new token of it: it may be what they die of."""
_STAND_BACK_S = 1.0
"""From the second death on, an answer that never had a token lets those go first that had some."""


class Journal:
    """One answer. `request` is the first attempt's."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.resumed = 0
        """Attempts after the first."""
        self._tokens = list(request.answered)
        self._begun = False
        """Whether the client was told anything."""
        self._deaths = 0
        """Since the last new token."""
        self._drafted = self._accepted = 0
        """By the former attempts."""
        self._told_drafts = (0, 0)

    @property
    def stand_back_s(self) -> float:
        """Seconds that the next attempt is to wait."""
        return _STAND_BACK_S if self._deaths > 1 and not self._tokens else 0.0

    def attempt(self) -> Request:
        """The request to send now."""
        if not self.resumed:
            return self.request
        told = None if self._begun else self.request.prompt_logprobs
        name = f"{self.request.request_id}#{self.resumed}"
        return replace(self.request, request_id=name, answered=tuple(self._tokens), prompt_logprobs=told)

    def take(self, events: Iterable[TokenEvent]) -> list[TokenEvent]:
        """What is new in the events of the attempt under way. Raises AnswerLost where one is missing before them."""
        fresh = []
        for event in events:
            known = len(self._tokens) - event.index
            if known < 0:
                raise AnswerLost(f"{-known} tokens of the answer are missing after the first {len(self._tokens)}")
            if known and event.token_ids:
                if len(event.token_ids) <= known and event.finish_reason is None:
                    continue
                event = _without_first(event, known)
            if self.resumed:
                event = self._own(event)
            if event.token_ids:
                self._tokens += event.token_ids
                self._deaths = 0
            self._begun = True
            self._told_drafts = event.drafted, event.accepted
            fresh.append(event)
        return fresh

    def interrupted(self, error: WorkerLost | WorkerLeft) -> int:
        """Nothing more comes of the attempt under way; returns how many tokens the next one has to compute again.

        Raises AnswerLost when too many workers have died under this answer.
        """
        if isinstance(error, WorkerLost):
            self._deaths += 1
            if self._deaths > MAX_DEATHS:
                raise AnswerLost(
                    f"{self._deaths} attention workers in a row were lost while they computed this answer, and none "
                    "brought a token of it; they may have died of it"
                ) from error
        self.resumed += 1
        self._drafted, self._accepted = self._told_drafts
        return len(self.request.prompt) + len(self._tokens)

    def _own(self, event: TokenEvent) -> TokenEvent:
        """As the answer's own event: what was drafted counts for all attempts together."""
        drafted, accepted = self._drafted + event.drafted, self._accepted + event.accepted
        return replace(event, request_id=self.request.request_id, drafted=drafted, accepted=accepted)


def _without_first(event: TokenEvent, known: int) -> TokenEvent:
    """The event without its first tokens."""
    logprobs = None if event.logprobs is None else event.logprobs[known:]
    return replace(event, token_ids=event.token_ids[known:], logprobs=logprobs, index=event.index + known)
