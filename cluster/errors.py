"""The error tree of the cluster layer. Imports no torch; the HTTP API maps these to status codes in one place."""

from __future__ import annotations

from divisi.model.errors import DivisiError

__all__ = [
    "AnswerLost",
    "DivisiError",
    "EpochEnded",
    "GangNotReady",
    "Overloaded",
    "RequestRejected",
    "StepAborted",
    "WorkerLeft",
    "WorkerLost",
]


class StepAborted(DivisiError):
    """A step could not finish. Nothing of it was committed, so the same plan can be run again.

    `seat` names the seat that failed to answer (`expert:2`), where that is known.
    """

    def __init__(self, reason: str, seat: str | None = None) -> None:
        super().__init__(reason if seat is None else f"{seat}: {reason}")
        self.reason = reason
        self.seat = seat

    def __reduce__(self) -> tuple[type[StepAborted], tuple[str, str | None]]:
        return type(self), (self.reason, self.seat)


class EpochEnded(StepAborted):
    """The epoch ends between two steps, in good order: others come or go."""

    def __reduce__(self) -> tuple[type[StepAborted], tuple[str, str | None]]:
        return type(self), (self.reason, self.seat)


class RequestRejected(DivisiError, ValueError):
    """The request can never be served as it is; the text gives the numbers and what to change."""


class Overloaded(DivisiError):
    """The queue is full for now. `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[Overloaded], tuple[str, float]]:
        return type(self), (self.reason, self.retry_after)


class GangNotReady(DivisiError):
    """The gang cannot serve now: it is starting, or refilling a seat."""


class WorkerLost(DivisiError):
    """The worker that computed an answer is gone, or cannot go on. Another can, from what has come."""


class WorkerLeft(DivisiError):
    """The worker that computed an answer hands it back, in good order. Another can go on from what has come."""


class AnswerLost(DivisiError):
    """An answer that has begun can be brought to no end."""
