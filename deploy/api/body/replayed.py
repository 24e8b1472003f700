"""What clients send back of earlier answers: keys that mean nothing here are dropped, and counted.

SDKs, agents and proxies keep an answer's message as an object and replay all of it, their own additions too. Refusing
one of these keys would end the conversation for good, since the client cannot unsay it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

Place = Literal["message", "part", "call", "tool"]

KNOWN_DROPPED: Mapping[Place, frozenset[str]] = {
    "message": frozenset(
        {"annotations", "audio", "cache_control", "created_at", "function_call", "id", "index", "metadata", "model"}
        | {"parsed", "provider_specific_fields", "reasoning_details", "refusal", "timestamp", "tool_calls", "usage"}
    ),
    "part": frozenset({"annotations", "cache_control", "data", "id", "index", "logprobs", "signature"}),
    "call": frozenset(
        {"cache_control", "description", "extra_content", "index", "parsed_arguments", "provider_specific_fields"}
        | {"thought_signature"}
    ),
    "tool": frozenset({"allowed_callers", "cache_control", "defer_loading", "eager_input_streaming", "input_examples"}),
}
"""What is known to come, by place: the labels of the metric. Any other name is counted as `other`."""

_MOST_SHOWN = 8
_MOST_CHARS = 64


class Dropped:
    """The keys that one request lost."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """By place and label."""
        self._shown: dict[str, None] = {}

    @property
    def shown(self) -> Sequence[str]:
        """Names for a log line: few and short ones, whatever the client sent."""
        return list(self._shown)

    def note(self, place: Place, name: str) -> None:
        """One key was dropped."""
        self.counts[place, name if name in KNOWN_DROPPED[place] else "other"] += 1
        if len(self._shown) < _MOST_SHOWN:
            self._shown[f"{place}.{name[:_MOST_CHARS]}"] = None


class Replayed(BaseModel):
    """A part of a conversation: exact types for the keys that it has, others go to the `Dropped` of the context."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)
    place: ClassVar[Place]

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, dict) and isinstance(info.context, Dropped):
            for name in data.keys() - cls.model_fields.keys():
                info.context.note(cls.place, name)
        return data
