"""What is asked, and what came of it, by concurrency and length of the prompts."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from divisi.benchmarks.served.in_process import EngineAlone
from divisi.benchmarks.served.load import Burst, Stream

ANSWER_TOKENS = 128
STREAMS, PROMPT_TOKENS = (1, 8, 32, 64), (16, 256)


@dataclass(frozen=True, slots=True)
class Mix:
    """So many streams at once, each with prompts of so many random tokens, and how many one after another."""

    streams: int
    prompt_tokens: int
    requests: int

    @property
    def title(self) -> str:
        """For the tables."""
        return f"{self.prompt_tokens} in, {self.streams} stream{'s' if self.streams > 1 else ''}"

    def prompts(self, seed: int, vocabulary: int) -> list[list[list[int]]]:
        """By stream. No two begin alike, so that no cache helps anybody."""
        draw = random.Random(f"{seed} {self.streams} {self.prompt_tokens}")
        return [
            [[draw.randrange(10, vocabulary) for _ in range(self.prompt_tokens)] for _ in range(self.requests)]
            for _ in range(self.streams)
        ]


def mixes(streams: Sequence[int] = STREAMS, prompt_tokens: Sequence[int] = PROMPT_TOKENS) -> list[Mix]:
    """The table's rows. Few streams ask several times, or a row would be over in a second."""
    return [Mix(number, length, max(1, 4 // number)) for length in prompt_tokens for number in streams]


@dataclass
class Figures:
    """One contender at one mix: medians over the rounds are asked by name."""

    rounds: list[dict[str, float]] = field(default_factory=list)

    def add(self, **figures: float) -> None:
        """Those of one round."""
        self.rounds.append(figures)

    def median(self, name: str) -> float:
        """Over the rounds."""
        return statistics.median(found[name] for found in self.rounds)

    def spread(self, name: str) -> tuple[float, float]:
        """The lowest and the highest."""
        values = [found[name] for found in self.rounds]
        return min(values), max(values)


def completion_streams(mix: Mix, prompts: Sequence[Sequence[Sequence[int]]], model: str) -> list[Stream]:
    """Of any server that speaks OpenAI's completions: token ids in, text out, the end only at the length."""
    common: dict[str, Any] = {
        "model": model, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return [Stream([{**common, "prompt": prompt} for prompt in own]) for own in prompts]


def of_burst(burst: Burst) -> dict[str, float]:
    """Tokens per second, latencies in ms, and the client's processor time in ms per token."""
    answers = [answer for stream in burst.answers for answer in stream]
    if wrong := [answer.tokens for answer in answers if answer.tokens != ANSWER_TOKENS]:
        raise SystemExit(f"an answer has {wrong[0]} tokens in place of {ANSWER_TOKENS}; no speed is reported")
    return {
        "rate": burst.tokens / burst.seconds,
        "gap": statistics.median((a.last_s - a.first_s) / (a.tokens - 1) for a in answers) * 1e3,
        "first": statistics.median(a.first_s for a in answers) * 1e3,
        "client": burst.cpu_seconds / burst.tokens * 1e3,
    }


def of_engine(engine: EngineAlone, prompts: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
    """The same of the engine alone; `engine` is its processor time."""
    seconds, cpu, answers = engine.run(prompts, ANSWER_TOKENS)
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "rate": tokens / seconds,
        "gap": statistics.median((a.last_s - a.first_s) / (len(a.token_ids) - 1) for a in answers) * 1e3,
        "first": statistics.median(a.first_s for a in answers) * 1e3,
        "engine": cpu / tokens * 1e3,
    }


def with_clocks(clocks: Callable[[], dict[str, float]], run: Callable[[], Burst]) -> dict[str, float]:
    """A burst's figures, and processor time in ms per token by part of the server."""
    before = clocks()
    burst = run()
    after = clocks()
    figures = of_burst(burst)
    for part, seconds in after.items():
        figures[part] = (seconds - before[part]) / burst.tokens * 1e3
    figures["beyond"] = figures["plan"] + figures["loop"] + figures["threads"]
    return figures
