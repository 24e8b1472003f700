"""What a client reads of one answer, and when. Plain data: no sockets, no clock."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Choice:
    """One of an answer's choices, put together from its chunks."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[str, float]] = field(default_factory=list)
    calls: dict[int, list[str]] = field(default_factory=dict)
    """Name and arguments of each."""
    ends: list[tuple[str, Any]] = field(default_factory=list)
    """Finish reason and stop reason; more than one is a fault."""

    def take(self, chunk: dict[str, Any]) -> bool:
        """Add what a chunk says; whether it has tokens."""
        delta = chunk.get("delta", {})
        self.text += chunk.get("text") or delta.get("content") or ""
        for call in delta.get("tool_calls") or ():
            known = self.calls.setdefault(call["index"], ["", ""])
            known[0] += call["function"].get("name") or ""
            known[1] += call["function"].get("arguments") or ""
        if (told := chunk.get("logprobs")) is not None:
            self.logprobs += zip(told["tokens"], told["token_logprobs"], strict=True)
        if chunk.get("finish_reason") is not None:
            self.ends.append((chunk["finish_reason"], chunk.get("stop_reason")))
        tokens = chunk.get("token_ids") or []
        self.tokens += tokens
        return bool(tokens)


@dataclass
class Answer:
    """One attempt of a client to get an answer; times are in seconds of the harness's clock."""

    ask: str
    slot: int
    begun: float = 0.0
    ended: float = 0.0
    choices: dict[int, Choice] = field(default_factory=lambda: defaultdict(Choice))
    usage: dict[str, int] | None = None
    prompt: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When tokens came."""
    done: bool = False
    """It came to its end in good order."""
    error: str = ""
    """Why it did not: `status 503 gang_not_ready: ...`, `event answer_lost: ...`, or the transport's word."""

    def take(self, line: str, now: float) -> None:
        """One line of the event stream."""
        if line == "data: [DONE]":
            self.done = not self.error
        if not line.startswith("data: {"):
            return
        data = json.loads(line[6:])
        if (error := data.get("error")) is not None:
            self.error = f"event {error['code']}: {error['message']}"
            return
        self.prompt = data.get("prompt_token_ids") or self.prompt
        if (usage := data.get("usage")) is not None:
            self.usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        for chunk in data["choices"]:
            self.prompt = chunk.get("prompt_token_ids") or self.prompt
            if self.choices[chunk["index"]].take(chunk):
                self.times.append(now)

    def is_open(self, now: float) -> bool:
        """Whether it had begun by then, and had not ended."""
        return self.begun <= now and not (self.ended and self.ended < now)

    @property
    def num_tokens(self) -> int:
        """Of all choices."""
        return sum(len(choice.tokens) for choice in self.choices.values())

    def gaps(self) -> list[tuple[float, float]]:
        """From when to when no token came, the wait for the first one among them."""
        at = [self.begun, *self.times]
        return [(earlier, later) for earlier, later in itertools.pairwise(at)] if self.times else []
