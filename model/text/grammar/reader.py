"""Reads grammars with llguidance, as workers do, and says what is wrong with one that cannot be followed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from llguidance import LLMatcher, LLTokenizer, grammar_from

from divisi.model.text.codec import TextCodec
from divisi.model.text.errors import TextError
from divisi.model.text.grammar.tokens import GrammarVocabulary, refer_by_id

log = logging.getLogger(__name__)

Notation = Literal["llguidance", "grammar"]
"""llguidance's own, or Lark or GBNF as a client writes it."""


class GrammarError(TextError):
    """A grammar that is broken, unsupported or too large. `place` is where in a schema: `$.properties.a`."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(f"{place}: {message}" if place else message)


class Reader(Protocol):
    """What reads grammars: a `GrammarReader`, or a process that has one."""

    def read(self, grammar: str, notation: Notation = "llguidance") -> str:
        """The grammar in llguidance's notation. Raises GrammarError where it cannot be followed."""
        ...


class GrammarReader:
    """Reads grammars in this process, in whatever time they take."""

    def __init__(self, added: Mapping[str, int], eos_ids: frozenset[int], tokenizer: LLTokenizer | None = None) -> None:
        """`added`: ids of the added tokens; with `tokenizer`, grammars are also compiled as workers do."""
        self._added, self._eos_ids = added, eos_ids
        self._tokenizer = tokenizer

    @staticmethod
    def of(text: TextCodec, model_dir: Path | str | None = None) -> GrammarReader:
        """A reader for a model; `model_dir` as for `tokenizer`."""
        tokenizer = None
        if model_dir is not None:
            try:
                tokenizer = GrammarVocabulary.load(model_dir).tokenizer
            except TextError as error:  # the worker says so to whoever sends a grammar
                log.warning("%s", error)
        return GrammarReader(text.tokenizer.added_ids, text.eos_ids, tokenizer)

    def read(self, grammar: str, notation: Notation = "llguidance") -> str:
        """See `Reader`."""
        if notation == "grammar":
            try:
                grammar = refer_by_id(grammar_from("grammar", grammar), self._added, self._eos_ids)
            except ValueError as error:
                raise GrammarError(f"the grammar cannot be read: {_complaint(str(error))}") from error
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        if failed:
            raise GrammarError(_complaint(messages[0]))
        if self._tokenizer is not None:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
            if not matcher.is_error():
                matcher.compute_bitmask()
            if matcher.is_error():
                raise GrammarError(_complaint(matcher.get_error()))
        return grammar


def json_grammar(text: str, style: Mapping[str, object]) -> str:
    """The grammar of a JSON schema. Raises GrammarError where it is nested deeper than the library reads."""
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=style)  # type: ignore[arg-type]
    except ValueError as error:  # values in enum and const may be nested deeper than the compiler reads
        raise GrammarError(_complaint(str(error))) from None


def _complaint(message: str) -> str:
    """What the compiler says, without its drawing of the place."""
    lines = [line.strip() for line in message.strip().splitlines()] or ["it cannot be compiled"]
    if lines[0] == "NoExtensionBias":
        return "it refers to itself without ever ending"
    reasons = [line for line in lines[1:] if line.startswith("error: ")]
    first = lines[0].replace("Unimplemented keys:", "not supported:").partition("; following special tokens")[0]
    return " ".join([first, *reasons])[:400]
