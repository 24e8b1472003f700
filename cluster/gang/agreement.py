"""How the leader decides that a step begins: plain data, no sockets. Imports no torch.

A worker announces the token count of its next step, 0 when it has nothing to do. Once it took part in a step the
leader waits for its next announcement, which says at the same time that it has finished; a worker that announced 0
is not waited for, and announces again when a request arrives.
"""

from __future__ import annotations


class StepAgreement:
    """Collects the workers' announcements for the next step."""

    def __init__(self, num_workers: int) -> None:
        self._announced: list[int | None] = [None] * num_workers

    def announce(self, worker: int, num_tokens: int) -> None:
        """Note a worker's token count; a later announcement for the same step replaces it."""
        self._announced[worker] = num_tokens

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Workers that take part in the running step and haven't announced their next."""
        return tuple(worker for worker, count in enumerate(self._announced) if count is None)

    def begin(self) -> tuple[int, ...] | None:
        """The token counts of a step that may begin now, else None. Those with tokens have to announce anew."""
        counts = self._announced
        if any(count is None for count in counts) or not any(counts):
            return None
        agreed = tuple(count or 0 for count in counts)
        self._announced = [None if count else 0 for count in agreed]
        return agreed
