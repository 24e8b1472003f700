"""A request on its way through the engine: what is known of it, what is committed, and what memory it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from divisi.cluster.drafting import Drafter
from divisi.cluster.engine.grammar import Guide
from divisi.cluster.engine.memory.sequence_memory import Holding
from divisi.cluster.request import Request, TokenLogprob
from divisi.cluster.triggers import Triggers


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """Mutable record of one request; only the scheduler changes it (and the engine its `prompt_logprobs`).

    While it decodes, `len(tokens) == length + 1`: the last token is chosen but its KV and state are not yet written.
    """

    request: Request
    arrival: tuple[float, int]
    """When it came to its ingress, and its number here, which decides between equals."""
    tokens: list[int]
    """The prompt, then what was generated, here or by another worker before."""
    max_length: int
    """Tokens at which the answer is cut: the prompt's plus the request's limit, or the model's context."""
    status: Status = Status.WAITING
    length: int = 0
    """Committed tokens: their KV is in the pages, their state in the slot and its ring."""
    admitted: Holding | None = None
    """What memory it holds while it runs."""
    cancelled: bool = False
    """Cancelled while a step that includes it was under way; takes effect when that step ends."""
    guide: Guide | None = None
    """Follows the answer through the request's grammar, if it has one."""
    allowed_ids: NDArray[np.int64] | None = None
    """The request's `allowed_token_ids`, which may be as many as the vocabulary has, as the sampler wants them."""
    drafted: int = 0
    """Tokens that the MTP layer has proposed for it."""
    accepted: int = 0
    """Those that stood."""
    drafter: Drafter = field(default_factory=Drafter)
    """What is known of its drafts."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """Of the first tokens of the prompt, as far as chunks have been committed. None when not asked for, or sent."""
    triggers: Triggers = field(init=False)
    """Where in the request's spans the answer stands."""

    def __post_init__(self) -> None:
        self.triggers = Triggers(self.request.spans)
        for token in self.request.answered:
            self.triggers.take(token)
        if (ids := self.request.sampling.allowed_token_ids) is not None:
            self.allowed_ids = np.array(ids, dtype=np.int64)

    @property
    def holding(self) -> Holding:
        """What memory it holds; it runs."""
        assert self.admitted is not None, "only a running sequence holds memory"
        return self.admitted

    @property
    def num_generated(self) -> int:
        """Tokens chosen so far."""
        return len(self.tokens) - len(self.request.prompt)

    def stops_at(self, token: int) -> bool:
        """Take note of the next committed token; returns whether it is a stop id where it stands."""
        counts = self.triggers.take(token)
        return token in self.request.stop_ids or (counts and token in self.request.content_stop_ids)

    def prompt_positions(self, start: int, end: int) -> range:
        """The positions in `start:end` whose logits give a prompt log-probability that is asked for and missing.

        The logits at a position tell the log-probability of the token after it. A sequence that was preempted
        computes its prompt again, but not these.
        """
        if self.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.prompt_logprobs) - 1), min(end, len(self.request.prompt) - 1))
