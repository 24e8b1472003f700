"""What each API key uses now, in one ingress replica, and whether it may use more."""

from __future__ import annotations

import math
from collections.abc import Callable

from divisi.cluster.errors import RequestRejected
from divisi.deploy.limits.errors import KeyLimitReached
from divisi.deploy.limits.keys import ApiKey
from divisi.deploy.limits.token_bucket import TokenBucket


class _Use:
    """One key: running answers, and tokens left."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        self.running = 0
        self.mean_s: float | None = None
        self.per_minute = per_minute
        self.bucket = None if per_minute is None else TokenBucket(per_minute, clock)


class KeyUses:
    """Limits are shared out evenly among the replicas: each grants its part of the tokens and, rounded up, of the
    requests. A prompt is charged when it is let in and generated tokens as they come; a key in debt waits.
    """

    def __init__(self, replicas: int, retry_after_s: float, clock: Callable[[], float]) -> None:
        self._replicas = replicas
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def check(self, key: ApiKey) -> None:
        """Raise KeyLimitReached where the key may not begin anything now."""
        use = self._use(key)
        limit = self._concurrent(key)
        if limit is not None and use.running >= limit:
            raise KeyLimitReached(
                f"the API key {key.name!r} has {use.running} answers running, which is its limit", self._wait_s(use)
            )
        if use.bucket is not None and (wait_s := use.bucket.wait_s()) > 0:
            raise KeyLimitReached(
                f"the API key {key.name!r} has used up its {key.tokens_per_minute} tokens per minute", wait_s
            )

    def check_size(self, key: ApiKey, answers: int) -> None:
        """Raise where so many answers exceed the key's limit now (KeyLimitReached) or always (RequestRejected)."""
        limit = self._concurrent(key)
        if limit is None:
            return
        if answers > limit:
            raise RequestRejected(
                f"the request asks for {answers} answers at once, but the API key {key.name!r} may have {limit}; "
                "ask for fewer choices or prompts in one request"
            )
        use = self._use(key)
        if use.running + answers > limit:
            raise KeyLimitReached(
                f"the API key {key.name!r} has {use.running} answers running, and {answers} more would exceed its "
                f"limit of {limit}",
                self._wait_s(use),
            )

    def enter(self, key: ApiKey, answers: int, prompt_tokens: int) -> None:
        """Answers begin."""
        self._use(key).running += answers
        self.charge(key, prompt_tokens)

    def charge(self, key: ApiKey, tokens: int) -> None:
        """Tokens were used."""
        if (bucket := self._use(key).bucket) is not None:
            bucket.charge(tokens)

    def leave(self, key: ApiKey, answers: int, lasted_s: float) -> None:
        """Answers have ended."""
        use = self._use(key)
        use.running -= answers
        use.mean_s = lasted_s if use.mean_s is None else 0.8 * use.mean_s + 0.2 * lasted_s

    def _use(self, key: ApiKey) -> _Use:
        """The key's use. A rate that was changed in the file begins with a full bucket."""
        per_minute = None if key.tokens_per_minute is None else key.tokens_per_minute / self._replicas
        use = self._uses.get(key.name)
        if use is None:
            use = self._uses[key.name] = _Use(per_minute, self._clock)
        elif use.per_minute != per_minute:
            use.per_minute = per_minute
            use.bucket = None if per_minute is None else TokenBucket(per_minute, self._clock)
        return use

    def _concurrent(self, key: ApiKey) -> int | None:
        return None if key.max_concurrent is None else math.ceil(key.max_concurrent / self._replicas)

    def _wait_s(self, use: _Use) -> float:
        """Until the next of the running answers is expected to end: they are spread over their mean duration."""
        return self._retry_after_s if use.mean_s is None else use.mean_s / max(use.running, 1)
