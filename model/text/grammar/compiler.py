"""Grammars that an answer must follow: from what a client sends to llguidance's text form, checked for what they cost.

Imports no torch. A grammar that passes here is followed by the worker token by token (`cluster.grammar`). What is too
large is refused by counting: bytes, nesting, nodes and repetitions first, then the fuel that llguidance's compiler
burns. What takes too long all the same is `process`'s business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import grammar_from

from divisi.model.text.grammar.reader import GrammarError, Reader, json_grammar
from divisi.model.text.grammar.regex_size import written_out_size
from divisi.model.text.grammar.schema_formats import ENFORCED, NOTES, may_be_text
from divisi.model.text.grammar.tokens import expressions

# One line of JSON with at most one blank after a comma or colon: a model that has lost its way could otherwise write
# white space until its tokens run out.
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMA_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS = frozenset({"items", "additionalProperties", "additionalItems"})
_COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
_VALUES = frozenset(
    {"type", "enum", "const", "required", "pattern", "format", "$ref", "$anchor", "$id", "$schema"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"}
    | {"discriminator"}
)
_KNOWN = _SCHEMA_MAPS | _SCHEMA_LISTS | _SCHEMAS | _COUNTS | _VALUES | _ANNOTATIONS

_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What is refused by its size."""

    max_bytes: int = 65536
    """Of a grammar's text."""
    max_depth: int = 32
    """Nesting of a schema."""
    max_nodes: int = 4096
    """Subschemas and enum values of a schema, or choices."""
    max_count: int = 10_000
    """Largest `maxItems`, `maxLength` and the like."""
    max_expression: int = 20_000
    """Atoms of a regular expression with its counted repetitions written out."""

    def check_expression(self, expression: str, place: str = "") -> None:
        """Raise GrammarError for a regular expression whose repetitions make it too large, or hide in comments."""
        if _VERBOSE.search(expression):
            raise GrammarError("the flag x is not supported; write the expression without comments and blanks", place)
        if (size := written_out_size(expression)) > self.max_expression:
            raise GrammarError(
                f"the expression has {size} parts with its repetitions written out, at most {self.max_expression} "
                "are taken; lower the counts in braces",
                place,
            )


@dataclass(frozen=True, slots=True)
class Enforceable:
    """A schema without the formats that say something to people only."""

    schema: dict[str, Any] | bool
    notes: tuple[str, ...]
    """These formats."""


class GrammarCompiler:
    """Turns schemas, expressions and choices into grammars. Safe to call from several threads."""

    def __init__(self, reader: Reader, limits: GrammarLimits | None = None) -> None:
        self._reader = reader
        self._limits = limits or GrammarLimits()

    def json_object(self) -> str:
        """Any JSON object."""
        return _json_grammar({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | bool) -> str:
        """JSON that a schema describes. Raises GrammarError naming the keyword that cannot be kept, and its place."""
        return self.checked(_json_grammar(self.enforceable(schema).schema))

    def enforceable(self, schema: Mapping[str, Any] | bool) -> Enforceable:
        """What of a schema a grammar can hold an answer to, unread. Raises GrammarError as `json_schema` does."""
        self.check_size(json.dumps(schema), "the schema")
        walk = _SchemaWalk(self._limits)
        return Enforceable(walk.walk(schema, "$", 1), tuple(sorted(walk.notes)))

    def regex(self, expression: str) -> str:
        """Text that an expression matches as a whole."""
        self.check_size(expression, "the expression")
        self._limits.check_expression(expression)
        return self.checked(grammar_from("regex", expression))

    def choice(self, choices: Sequence[str]) -> str:
        """One of several texts."""
        if len(choices) > self._limits.max_nodes:
            raise GrammarError(f"{len(choices)} choices, at most {self._limits.max_nodes} are taken")
        self.check_size("".join(choices), "the choices")
        return self.checked(grammar_from("lark", "start: " + " | ".join(map(_lark_string, choices))))

    def text(self, grammar: str) -> str:
        """A grammar in Lark's or GBNF's notation. In Lark, `<think>` outside of quotes is the token of that name."""
        self.check_size(grammar, "the grammar")
        for expression in expressions(grammar):
            self._limits.check_expression(expression)
        return self._reader.read(grammar, "grammar")

    def check_size(self, text: str, what: str) -> None:
        """Raise GrammarError for a text that is larger than the limit."""
        size = len(text.encode("utf-8", errors="surrogatepass"))
        if size > self._limits.max_bytes:
            raise GrammarError(f"{what} has {size} bytes, at most {self._limits.max_bytes} are taken")

    def checked(self, grammar: str) -> str:
        """`grammar` itself, if it can be followed. Raises GrammarError with the compiler's complaint."""
        return self._reader.read(grammar)


class _SchemaWalk:
    """Visits every subschema once, counting, and refuses what would be ignored or cost too much.

    Returns each without the formats that are notes, and keeps their names.
    """

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits = limits
        self._nodes = 0
        self.notes: set[str] = set()

    def walk(self, schema: object, place: str, depth: int) -> Any:
        self._count(1, place)
        if depth > self._limits.max_depth:
            raise GrammarError(f"nested more than {self._limits.max_depth} deep", place[:128])
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise GrammarError(f"a schema is an object or a boolean, not {type(schema).__name__}", place)
        walked = {keyword: self._keyword(keyword, value, place, depth) for keyword, value in schema.items()}
        if self._is_note(schema, place):
            del walked["format"]
        return walked

    def _keyword(self, keyword: str, value: object, place: str, depth: int) -> object:
        """Its value, the subschemas in it walked."""
        where = f"{place}.{keyword[:64]}"
        if keyword in _SCHEMA_MAPS and isinstance(value, Mapping):
            for name in value if keyword == "patternProperties" else ():
                self._limits.check_expression(name, where)
            return {name: self.walk(part, f"{where}.{name[:64]}", depth + 1) for name, part in value.items()}
        if keyword in _SCHEMA_LISTS and isinstance(value, list):
            return [self.walk(part, f"{where}[{index}]", depth + 1) for index, part in enumerate(value)]
        if keyword in _SCHEMAS:
            return self.walk(value, where, depth + 1)
        if keyword == "enum" and isinstance(value, list):
            self._count(len(value), where)
        elif keyword in _COUNTS:
            self._check_count(value, where)
        elif keyword == "pattern" and isinstance(value, str):
            self._limits.check_expression(value, where)
        elif keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise GrammarError(f"{str(value)[:64]!r} points outside the schema; put the definition in $defs", where)
        elif keyword not in _KNOWN:
            raise GrammarError(f"the keyword {keyword[:64]!r} is not supported; leave it out", place)
        return value

    def _is_note(self, schema: Mapping[str, Any], place: str) -> bool:
        """Whether its format is one; GrammarError where it is neither that nor enforced."""
        found = schema.get("format")
        if not isinstance(found, str) or found in ENFORCED:
            return False
        if found in NOTES:
            self.notes.add(found)
        elif may_be_text(schema):
            raise GrammarError(f"the format {found[:64]!r} is not known; leave it out, or write a pattern", place)
        return found in NOTES

    def _count(self, nodes: int, place: str) -> None:
        self._nodes += nodes
        if self._nodes > self._limits.max_nodes:
            raise GrammarError(f"more than {self._limits.max_nodes} subschemas and enum values", place[:128])

    def _check_count(self, value: object, where: str) -> None:
        if isinstance(value, (int, float)) and value > self._limits.max_count:
            raise GrammarError(f"{value} is more than the limit of {self._limits.max_count}; ask for less", where)


def _json_grammar(schema: object) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return json_grammar(json.dumps(schema), _JSON_STYLE)


def _lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
