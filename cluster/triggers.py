"""Token-id triggers: tokens that switch what holds for the part of an answer between them. Plain Python, no torch.

A `Span` is such a part, and travels in `Request.spans`. The scheduler gives each answer's `Triggers` every token of a
commit's list, in order, several of one step too; between steps `triggers.inside` is the span that the answer stands in:

    triggers = Triggers(request.spans)
    counts = triggers.take(token)    # for each committed token, and never for one that is merely proposed
    triggers.inside                  # the Span that the next token belongs to, or None

What holds inside is a field of the `Span`, which whoever plans or commits reads off `inside`: how far drafts may go.
`Request.content_stop_ids` end an answer only where `take` says that the token stands outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """A part of an answer. The tokens `begin` and `end` open and close it and are themselves outside.

    An answer stands in one span at most: inside of it no token but `end` is a trigger. `opened`: the prompt ends inside
    of it. `leading`: only the answer's first token opens it. `max_draft_tokens`: how far the MTP layer may run ahead
    inside; None: as outside.
    """

    begin: int
    end: int
    opened: bool = False
    leading: bool = False
    max_draft_tokens: int | None = None


class Triggers:
    """Follows one answer from span to span. Its state depends on the committed tokens alone."""

    def __init__(self, spans: Sequence[Span]) -> None:
        """`spans` differ in `begin`, and one at most is `opened`."""
        self.inside: Span | None = next((span for span in spans if span.opened), None)
        """The span that the next token belongs to."""
        self._opens = {span.begin: span for span in spans if not span.leading}
        self._opens_first = {span.begin: span for span in spans if span.leading and self.inside is None}

    def take(self, token: int) -> bool:
        """Take the next token of the answer; returns whether it stands outside of every span."""
        if self.inside is None:
            if self._opens or self._opens_first:
                self.inside = self._opens_first.get(token) or self._opens.get(token)
                self._opens_first = {}
            return True
        if token != self.inside.end:
            return False
        self.inside = None
        return True
