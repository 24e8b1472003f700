"""What a load run asks: random text of a wanted length, or prompts out of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from divisi.deploy.settings import SettingsError

# Short, common words: a token each in most vocabularies, a few in small ones; the probe finds out.
WORDS = (  # noqa: SIM905 (as a list it would be eighty lines)
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name team minute idea body back parent face level office door art"
).split()
PROBES = (WORDS[0], " ".join(WORDS))
"""Prompts by whose tokens a server's counting is found out: one word, and each word once."""
Prompt = str | list[dict[str, Any]]
"""Text, or the messages of a conversation."""


@dataclass(frozen=True)
class Request:
    """How every body is made."""

    endpoint: str
    """"chat" or "completions"."""
    model: str
    output_tokens: int
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Below the base URL."""
        return "/chat/completions" if self.endpoint == "chat" else "/completions"

    def body(self, prompt: Prompt, output_tokens: int | None = None) -> dict[str, Any]:
        """A streamed request that reports its usage."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        if self.endpoint == "chat":
            asked: dict[str, Any] = {
                "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            }
        else:
            asked = {"prompt": prompt}
        limit = {"max_tokens": self.output_tokens if output_tokens is None else output_tokens}
        return {"model": self.model, **asked, **limit, **stream, **self.params}


@dataclass(frozen=True)
class Length:
    """How many tokens the server makes of so many of our words: `overhead + words * per_word`."""

    overhead: float
    per_word: float

    @classmethod
    def from_probes(cls, short: int, long: int) -> Length:
        """From the server's count of tokens for PROBES. Raises SettingsError."""
        per_word = (long - short) / (len(WORDS) - 1)
        if per_word <= 0:
            raise SettingsError(
                "--input-tokens: the server counts no more tokens for a longer prompt; use --prompts FILE"
            )
        return cls(long - len(WORDS) * per_word, per_word)

    def words(self, tokens: int) -> int:
        """Words that make about `tokens` tokens; at least one."""
        return max(1, round((tokens - self.overhead) / self.per_word))


def random_text(rng: random.Random, words: int) -> str:
    """`words` words; two of these texts have no common beginning worth caching."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


def random_prompts(seed: int, words: int) -> Iterator[Prompt]:
    """Endless texts of one length."""
    rng = random.Random(seed)
    while True:
        yield random_text(rng, words)


def read_prompts(path: Path, endpoint: str) -> list[Prompt]:
    """One prompt a line: text, or JSON with `prompt` or (for chat) `messages`. Raises SettingsError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--prompts: {path}: cannot be read: {error}") from None
    prompts = [_prompt(line, f"--prompts: {path}, line {number}", endpoint)
               for number, line in enumerate(lines, 1) if line.strip()]  # fmt: skip
    if not prompts:
        raise SettingsError(f"--prompts: {path}: holds no prompt; write one a line")
    return prompts


def _prompt(line: str, place: str, endpoint: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        return line
    try:
        entry = json.loads(line)
    except ValueError:
        return line  # text that happens to begin with a brace
    match entry:
        case {"prompt": str(text)}:
            return text
        case {"messages": [*messages]} if endpoint == "chat":
            return messages
    wanted = '"prompt" or "messages"' if endpoint == "chat" else '"prompt"'
    raise SettingsError(f"{place}: has no {wanted}")


def cycle(prompts: list[Prompt], seed: int) -> Iterator[Prompt]:
    """Endlessly through `prompts`, in an order that the seed shuffles."""
    rng = random.Random(seed)
    order: list[Prompt] = []
    while True:
        order = order or rng.sample(prompts, len(prompts))
        yield order.pop()


Source = Callable[[], dict[str, Any]]
"""Makes the next request's body."""
