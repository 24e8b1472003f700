"""Who may ask how much: API keys, their limits, and admission. Plain Python: no Ray, no torch, no HTTP."""

from divisi.deploy.limits.errors import KeyLimitReached, RequestTimedOut, ServerStopping
from divisi.deploy.limits.gate import Gate, GateLimits, Ticket
from divisi.deploy.limits.key_file import KeyFile, KeyFileError
from divisi.deploy.limits.keys import ApiKey, KeyRing

__all__ = [
    "ApiKey",
    "Gate",
    "GateLimits",
    "KeyFile",
    "KeyFileError",
    "KeyLimitReached",
    "KeyRing",
    "RequestTimedOut",
    "ServerStopping",
    "Ticket",
]
