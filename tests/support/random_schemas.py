"""Seeded random JSON schemas: nested objects and arrays, enums, unicode, recursion, bounded numbers and strings."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ["id", "name", "größe", "城市", "a b", 'quo"te', "emoji 👩‍🚀", "ünïcode", "deep", "x-y", "$price", "list_of"]
_WORDS = ["red", "grün", "青", "", "two words", 'a "b" \\ c', "👍", "line\nbreak", "0", "null"]
_PATTERNS = [r"^[a-z]{2,6}$", r"^\d{4}-\d{2}$", r"^(ab|cd)+e?$", r"^[A-Z][a-z]*$"]
_FORMATS = ["date", "time", "uuid", "ipv4", "email"]


def random_schema(seed: int) -> dict[str, Any]:
    """Schema number `seed`; an object at the top. One in six refers to itself."""
    draw = random.Random(seed)
    schema = _object(draw, 3)
    if seed % 6 == 0:
        child = {"anyOf": [{"type": "null"}, {"$ref": "#"}]} if seed % 12 else {"$ref": "#/$defs/node"}
        node = {"type": "object", "properties": {"value": _leaf(draw), "next": {"$ref": "#/$defs/node"}}}
        schema["$defs"] = {"node": {**node, "required": ["value"], "additionalProperties": False}}
        schema["properties"]["child"] = child
        schema["required"].append("child")
    return schema


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(_NAMES, draw.randint(1, 4))
    required = [name for name in names if draw.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _any(draw, depth - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _any(draw: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0 or draw.random() < 0.5:
        return _leaf(draw)
    kind = draw.choice(["object", "array", "tuple", "anyOf"])
    if kind == "object":
        return _object(draw, depth)
    if kind == "array":
        low = draw.randint(0, 2)
        return {"type": "array", "items": _any(draw, depth - 1), "minItems": low, "maxItems": low + draw.randint(0, 3)}
    parts = [_any(draw, depth - 1) for _ in range(draw.randint(2, 3))]
    if kind == "tuple":
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    return {"anyOf": parts}


def _leaf(draw: random.Random) -> dict[str, Any]:
    low = draw.randint(-1000, 1000)
    exact = draw.sample(_WORDS, draw.randint(1, 4))
    leaves: list[dict[str, Any]] = [
        {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 40, "multipleOf": draw.randint(1, 5)},
        {"type": "number", "minimum": low / 8, "maximum": low / 8 + 3},
        {"type": "string", "maxLength": draw.randint(1, 12)},
        {"type": "string", "minLength": 2, "maxLength": draw.randint(2, 8)},
        {"type": "string", "pattern": draw.choice(_PATTERNS), "maxLength": 12},
        {"type": "string", "format": draw.choice(_FORMATS), "maxLength": 60},
        {"enum": [*exact, draw.randint(0, 9), None, True]},
        {"const": draw.choice([*exact, 3.5, False])},
        {"type": ["boolean", "null"]},
    ]
    return draw.choice(leaves)
