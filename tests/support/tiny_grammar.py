"""Grammars over the fake model's vocabulary: 61 tokens, most of one character."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from divisi.cluster.engine.grammar import Grammars
from divisi.model.text.grammar.tokens import GrammarVocabulary
from tests.support.fake_runner import VOCAB

EOS = 0
_WORDS = ["true", "false", "null", '"}', '":', '","', "ab", "é"]
TOKENS = ["<eos>", *'{}[]":,.-', *"0123456789", *"abcdefghijklmnopqrstuvwxyz", *_WORDS]
TOKENS += [f"<special_{index}>" for index in range(VOCAB - len(TOKENS))]


class _Spelling:
    """What llguidance asks of a tokenizer."""

    def __init__(self) -> None:
        self.eos_token_id = EOS
        self.bos_token_id = None
        self.tokens = [token.encode() for token in TOKENS]
        self.special_token_ids = [index for index, token in enumerate(TOKENS) if token.startswith("<")]

    def __call__(self, text: bytes) -> list[int]:
        return [TOKENS.index(character) for character in text.decode()]


def vocabulary() -> GrammarVocabulary:
    tokenizer = LLTokenizer(TokenizerWrapper(_Spelling()), n_vocab=VOCAB, eos_token=EOS)
    return GrammarVocabulary(tokenizer, frozenset({EOS}))


def grammars(limits: LLParserLimits | None = None) -> Grammars:
    return Grammars(vocabulary, VOCAB, threads=2, limits=limits)


def schema(value: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(value | {"x-guidance": {"whitespace_flexible": False}}))


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def spell(token_ids: Sequence[int]) -> str:
    return "".join(TOKENS[token] for token in token_ids)
