"""Tools of everyday use, asked for as people do, without naming their parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from divisi.model.demo.corpus.tools import Tool
from divisi.model.demo.corpus.words import CITIES, NOUNS, Split, Words

_CITY, _NAME, _THING, _TEXT, _COUNT, _DAY, _TIME, _UNIT = (
    "city",
    "name",
    "thing",
    "text",
    "count",
    "day",
    "time",
    "unit",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow", "tonight")


@cache
def _tools() -> Mapping[Split, Sequence[Mapping[str, Any]]]:
    """By split: name, description, parameters by kind of value, and ways to ask."""
    found: Mapping[Split, Sequence[Mapping[str, Any]]] = json.loads(
        Path(__file__).with_name("everyday.json").read_text(encoding="utf-8")
    )
    return found


def everyday_tool(words: Words) -> Tool:
    """One of those that belong to the words' split."""
    known = words.random.choice(_tools()[words.split])
    name, kinds = known["name"], known["parameters"]
    verb, _, noun = name.partition("_")
    properties = {key: _schema(kind) for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(kinds)}
    function: dict[str, Any] = {"name": name, "description": known["description"], "parameters": parameters}
    return Tool(name, verb, noun, {"type": "function", "function": function}, (), _Ways(kinds, known["requests"]))


def _schema(kind: str) -> dict[str, Any]:
    if kind == _COUNT:
        return {"type": "integer"}
    if kind == _UNIT:
        return {"type": "string", "enum": ["celsius", "fahrenheit"]}
    return {"type": "string"}


class _Ways:
    def __init__(self, kinds: Mapping[str, str], ways: Sequence[str]) -> None:
        self._kinds, self._ways = kinds, ways

    def __call__(self, words: Words) -> tuple[str, dict[str, Any]]:
        arguments = {key: _value(words, kind) for key, kind in self._kinds.items()}
        return words.random.choice(self._ways).format(**arguments), arguments


def _value(words: Words, kind: str) -> str | int:
    random = words.random
    if kind == _COUNT:
        return words.integer() if random.random() < 0.5 else random.randrange(1, 60)
    if kind == _UNIT:
        return random.choice(("celsius", "fahrenheit"))
    if kind == _DAY:
        return random.choice(_DAYS)
    if kind == _TIME:
        return f"{random.randrange(24)}:{random.randrange(60):02d}"
    if kind == _CITY:
        return words.of(CITIES) if random.random() < 0.6 else words.invented().capitalize()
    if kind == _NAME:
        return words.proper()
    if kind == _THING:
        return words.of(NOUNS) if random.random() < 0.5 else words.invented()
    return words.text()
