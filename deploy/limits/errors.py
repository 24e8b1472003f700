"""Refusals and ends that limits cause; deploy/api/errors.py maps them to HTTP."""

from __future__ import annotations

from divisi.cluster.errors import DivisiError, GangNotReady, Overloaded


class KeyLimitReached(Overloaded):
    """The client's key has used up what it may; others are not affected."""


class RequestTimedOut(DivisiError):
    """The answer was not complete within `limits.request_timeout_s`."""


class ServerStopping(GangNotReady):
    """The server shuts down, and what still ran at the end of the grace was ended."""
