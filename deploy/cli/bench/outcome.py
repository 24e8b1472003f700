"""What became of each request, and the numbers over all of them. Times in seconds, tokens as the server counts them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["running", "ok", "rejected", "error", "aborted"]
"""rejected: 429. error: any other refusal, or a broken stream. aborted: this program gave it up."""
PERCENTILES = (50, 90, 95, 99)


@dataclass
class Outcome:
    """One request. Instants are of one monotonic clock; `due` is when it should have been sent."""

    due: float
    sent: float = 0.0
    first: float | None = None
    last: float | None = None
    end: float = 0.0
    longest_gap: float = 0.0
    status: Status = "running"
    error: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    accepted_tokens: int | None = None
    """Of the output: drafts of the server that stood."""

    def take(self, event: Mapping[str, Any], now: float) -> None:
        """Take in one event of the stream: when it came, whether it shows anything, and its usage."""
        if usage := event.get("usage"):
            self.input_tokens = usage.get("prompt_tokens")
            self.output_tokens = usage.get("completion_tokens")
            details = usage.get("completion_tokens_details") or {}
            self.accepted_tokens = details.get("accepted_prediction_tokens")
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        for choice in event.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if _shows_something(choice):
                self._tick(now)

    def _tick(self, now: float) -> None:
        if self.last is None:
            self.first = now
        else:
            self.longest_gap = max(self.longest_gap, now - self.last)
        self.last = now

    @property
    def ttft(self) -> float | None:
        """From sending to the first text."""
        return None if self.first is None else self.first - self.sent

    @property
    def itl(self) -> float | None:
        """Mean time from one token to the next: by the server's count of tokens, since a chunk may hold several."""
        if self.first is None or self.last is None or (self.output_tokens or 0) < 2:
            return None
        assert self.output_tokens is not None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def latency(self) -> float:
        """From sending to the end of the stream."""
        return self.end - self.sent

    def record(self, origin: float) -> dict[str, Any]:
        """As JSON, instants relative to `origin`."""
        return {
            "sent": self.sent - origin,
            "late": self.sent - self.due,
            "status": self.status,
            "error": self.error,
            "finish_reason": self.finish_reason,
            "ttft": self.ttft,
            "itl": self.itl,
            "longest_gap": self.longest_gap if self.first is not None else None,
            "latency": self.latency,
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "accepted_tokens": self.accepted_tokens,
        }


def _shows_something(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls"))


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest of the sorted `values`, of which there is at least one."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True)
class Distribution:
    """Mean, percentiles and maximum of a quantity; all None where nothing was measured."""

    count: int
    mean: float | None
    percentiles: dict[int, float | None]
    max: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution:
        """Over the values that are there."""
        known = [value for value in values if value is not None]
        if not known:
            return cls(0, None, dict.fromkeys(PERCENTILES), None)
        marks: dict[int, float | None] = {percent: percentile(known, percent) for percent in PERCENTILES}
        return cls(len(known), sum(known) / len(known), marks, max(known))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        marks = {f"p{percent}": value for percent, value in self.percentiles.items()}
        return {"count": self.count, "mean": self.mean, **marks, "max": self.max}


def _tokens_per_step(outcomes: Iterable[Outcome]) -> float | None:
    """A draft that stands saves a step."""
    told = [(each.output_tokens or 0, each.accepted_tokens) for each in outcomes if each.accepted_tokens is not None]
    steps = sum(tokens - accepted for tokens, accepted in told)
    return sum(tokens for tokens, _ in told) / steps if steps else None


@dataclass(frozen=True)
class Summary:
    """The numbers of a run. Latencies are those of the requests that ended well; rates are over `seconds`."""

    seconds: float
    counts: dict[str, int]
    errors: dict[str, int]
    ttft: Distribution
    itl: Distribution
    longest_gap: Distribution
    latency: Distribution
    late: Distribution
    input_tokens: int
    cached_tokens: int | None
    output_tokens: int
    tokens_per_step: float | None
    """Of an answer, where the server says how many of its tokens were drafted."""
    without_usage: int
    """Requests that ended well, but whose tokens the server did not count; they add nothing to the token rates."""
    finish_reasons: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], seconds: float) -> Summary:
        """Count `outcomes` of a run that took `seconds` from the first request sent to the last one's end."""
        good = [outcome for outcome in outcomes if outcome.status == "ok"]
        cached = [outcome.cached_tokens for outcome in good if outcome.cached_tokens is not None]
        names: tuple[Status, ...] = ("ok", "rejected", "error", "aborted", "running")
        statuses = Counter(outcome.status for outcome in outcomes)
        return cls(
            seconds=seconds,
            counts={"sent": len(outcomes), **{name: statuses[name] for name in names}},
            errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common(10)),
            ttft=Distribution.of(outcome.ttft for outcome in good),
            itl=Distribution.of(outcome.itl for outcome in good),
            longest_gap=Distribution.of(outcome.longest_gap for outcome in good if outcome.first is not None),
            latency=Distribution.of(outcome.latency for outcome in good),
            late=Distribution.of(outcome.sent - outcome.due for outcome in outcomes),
            input_tokens=sum(outcome.input_tokens or 0 for outcome in good),
            cached_tokens=sum(cached) if cached else None,
            output_tokens=sum(outcome.output_tokens or 0 for outcome in good),
            tokens_per_step=_tokens_per_step(good),
            without_usage=sum(outcome.output_tokens is None for outcome in good),
            finish_reasons=dict(Counter(outcome.finish_reason or "none" for outcome in good)),
        )

    def per_second(self, amount: float) -> float:
        """`amount` over the time of the run; 0 before it began."""
        return amount / self.seconds if self.seconds > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """As JSON; times in seconds."""
        return {
            "seconds": self.seconds,
            "counts": self.counts,
            "errors": self.errors,
            "finish_reasons": self.finish_reasons,
            "requests_per_second": self.per_second(self.counts["ok"]),
            "input_tokens_per_second": self.per_second(self.input_tokens),
            "output_tokens_per_second": self.per_second(self.output_tokens),
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "tokens_per_step": self.tokens_per_step,
            "requests_without_usage": self.without_usage,
            "ttft": self.ttft.record(),
            "itl": self.itl.record(),
            "longest_gap": self.longest_gap.record(),
            "latency": self.latency.record(),
            "late": self.late.record(),
        }
