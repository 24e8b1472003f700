"""Requests as they come: made up, seeded, or read from what was recorded."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HOURS = 1.0
_PROMPT, _ANSWER = 300, 150


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes (seconds), and the tokens of its prompt and its answer."""

    at: float
    prompt: int
    answer: int


Rate = Callable[[float], float]
"""By the fraction of the time that has passed, the fraction of the peak's requests per second."""


def diurnal(passed: float) -> float:
    """A day: from a tenth at night to all of it at noon."""
    return 0.55 - 0.45 * math.cos(2 * math.pi * passed)


def bursts(passed: float) -> float:
    """A fifth, and all of it in twelve spells of a fiftieth of the time."""
    return 1.0 if passed * 12 % 1 > 0.76 else 0.2


def flash_crowd(passed: float) -> float:
    """A tenth; after a third of the time all of it at once, which then fades."""
    return 0.1 if passed < 1 / 3 else max(0.1, math.exp(-(passed - 1 / 3) * 8))


PATTERNS: dict[str, Rate] = {"diurnal": diurnal, "bursts": bursts, "flash crowd": flash_crowd}


def made(pattern: Rate, peak: float, seed: int, hours: float = HOURS) -> list[Arrival]:
    """A Poisson process with `peak` requests a second at most, of prompts and answers whose lengths vary a lot."""
    rng = random.Random(f"{pattern.__name__} {seed}")
    seconds, now = hours * 3600, 0.0
    found = []
    while (now := now + rng.expovariate(peak)) < seconds:
        if rng.random() < pattern(now / seconds):
            found.append(Arrival(now, _length(rng, _PROMPT), _length(rng, _ANSWER)))
    return found


def _length(rng: random.Random, mean: int) -> int:
    """Exponential: many short, few long."""
    return max(1, min(round(rng.expovariate(1 / mean)), 8 * mean))


def recorded(file: Path) -> list[Arrival]:
    """What somebody has recorded, in the order in which requests came; the first at 0.

    A file that ends in .csv is a trace: when each request came, in seconds or as ISO 8601, the tokens of its prompt,
    and of its answer, after a line of names if there is one. One that ends in .json is the report of `divisi bench
    --records`. Any other is the JSON log of a server. Of the last two, what was answered counts. Raises ValueError.
    """
    read = {".csv": _of_trace, ".json": _of_report}.get(file.suffix, _of_log)
    found = sorted(read(file), key=lambda arrival: arrival.at)
    if not found:
        raise ValueError(f"{file}: no line of an answered request in it; the server's log.format has to be json")
    return [Arrival(arrival.at - found[0].at, arrival.prompt, arrival.answer) for arrival in found]


def _of_trace(file: Path) -> Iterator[Arrival]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, line in enumerate(csv.reader(lines), start=1):
            try:
                at, prompt, answer = line
                yield Arrival(_seconds(at), int(prompt), int(answer))
            except ValueError as error:
                if number > 1:
                    wanted = "the time, the prompt's tokens, the answer's"
                    raise ValueError(f"{file}:{number}: {','.join(line)!r} is not {wanted}") from error


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def _of_report(file: Path) -> Iterator[Arrival]:
    report = json.loads(file.read_text(encoding="utf-8"))
    if "records" not in report:
        raise ValueError(f"{file}: there is no request in it; give `divisi bench` --records")
    for record in report["records"]:
        if record["status"] == "ok":
            yield Arrival(record["sent"], record["input_tokens"], record["output_tokens"])


def _of_log(file: Path) -> Iterator[Arrival]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
            if fields.get("status") == 200 and (answer := fields.get("completion_tokens")):
                ended = datetime.fromisoformat(fields["time"]).timestamp()
                yield Arrival(ended - fields["duration_s"], fields["prompt_tokens"], answer)
        except (ValueError, AttributeError, KeyError):
            continue  # a line of something else
