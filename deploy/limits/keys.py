"""API keys: how they are made, hashed, and found again. Only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "dv-"
HASH_PREFIX = "sha256:"
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
MIN_KEY_CHARS = 16
MAX_KEY_CHARS = 512


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the server knows it. A limit of None is none."""

    name: str
    """For logs and limits; the key itself is nowhere."""
    hash: str
    """`sha256:` and 64 hexadecimal digits."""
    max_concurrent: int | None = None
    """Requests at once."""
    tokens_per_minute: int | None = None
    """Prompt and generated tokens; as many may be used in a burst."""
    admin: bool = False
    """Whether it may change the gang."""


def new_key() -> str:
    """A random key with 256 bits of entropy."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """A key as it is stored. Plain SHA-256 is enough, and fast: the keys are random and long, not guessed."""
    return HASH_PREFIX + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def is_hash(text: str) -> bool:
    """Whether a text is a stored key."""
    return _HASH.fullmatch(text) is not None


class KeyRing:
    """The keys that are valid now."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> ApiKey | None:
        """The key that a client presents. Takes the same time wherever, and whether, it is found."""
        if len(presented) > MAX_KEY_CHARS:
            return None
        hashed = hash_key(presented).encode()
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(key.hash.encode(), hashed):
                found = key
        return found
