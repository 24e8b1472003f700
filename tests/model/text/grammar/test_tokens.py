"""Grammars whose text has the letters of tokens: the answers are walks that take any token which the mask allows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import process_time
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from divisi.model.text import TextCodec
from divisi.model.text.grammar.compiler import GrammarCompiler
from divisi.model.text.grammar.reader import GrammarError, GrammarReader
from divisi.model.text.grammar.tokens import GrammarVocabulary, expressions, refer_by_id, unspeakable
from divisi.model.text.tags import CALL, THINK, THINK_END

IM_END = "<|im_end|>"


@pytest.fixture(scope="module")
def codec(model_dir: Path) -> TextCodec:
    return TextCodec.load(model_dir)


@pytest.fixture(scope="module")
def compiler(codec: TextCodec, model_dir: Path) -> GrammarCompiler:
    return GrammarCompiler(GrammarReader.of(codec, model_dir))


@pytest.fixture(scope="module")
def walk(codec: TextCodec, model_dir: Path) -> Callable[[str, int], list[int]]:
    vocabulary = GrammarVocabulary.load(model_dir)

    def answer(grammar: str, seed: int) -> list[int]:
        matcher, random = LLMatcher(vocabulary.tokenizer, grammar), Random(seed)
        tokens: list[int] = []
        while True:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            token = int(random.choice(np.flatnonzero(bits).tolist()))
            if token in vocabulary.eos_ids:
                assert matcher.is_accepting(), codec.tokenizer.decode(tokens)
                return tokens
            tokens.append(token)
            assert matcher.consume_token(token), (codec.tokenizer.decode(tokens), matcher.get_error())

    return answer


def const(text: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"v": {"const": text}}, "required": ["v"], "additionalProperties": False}


ADDED = (CALL, "</tool_call>", "<tool_response>", "</tool_response>", THINK, THINK_END, IM_END, "<|im_start|>")


@pytest.mark.parametrize("token", [*ADDED, "<|endoftext|>"])
def test_literals_are_spelled_with_ordinary_tokens(
    compiler: GrammarCompiler, codec: TextCodec, walk: Callable[[str, int], list[int]], token: str
) -> None:
    quoted, added = json.dumps(f"A {token}b"), set(codec.tokenizer.added_ids.values())
    for grammar in (
        compiler.regex(f"A {re.escape(token)}(b)"),
        compiler.choice([f"A {token}b"]),
        compiler.text(f"start: {quoted}"),
        compiler.text(f"root ::= {quoted}"),
    ):
        tokens = walk(grammar, 1)
        assert not added & set(tokens)
        assert codec.tokenizer.decode(tokens) == f"A {token}b"
    for seed in range(3):
        tokens = walk(compiler.json_schema(const(f"a{token}")), seed)
        assert not added & set(tokens)
        assert json.loads(codec.tokenizer.decode(tokens)) == {"v": f"a{token}"}


@pytest.mark.parametrize("seed", range(3))
def test_an_expression_around_choices(
    compiler: GrammarCompiler, codec: TextCodec, walk: Callable[[str, int], list[int]], seed: int
) -> None:
    expression = "A <think>[a-z]{1,5}</think> (yes|no)"
    for grammar in (
        compiler.regex(expression),
        compiler.text('start: "A <think>" /[a-z]{1,5}/ "</think> " ("yes" | "no")'),
        compiler.text('root ::= "A <think>" [a-z] [a-z]? "</think> " ("yes" | "no")'),
    ):
        assert re.fullmatch(expression, codec.tokenizer.decode(walk(grammar, seed)))


def test_a_token_named_in_lark_is_the_token(
    compiler: GrammarCompiler, codec: TextCodec, walk: Callable[[str, int], list[int]]
) -> None:
    lark = 'start: <think> "<think>" </think> WORD // not <this>\nWORD: /<no>|<yes>/ # nor <that>\n'
    tokens = walk(compiler.text(lark), 2)
    tags = [token for token in tokens if token in codec.tokenizer.added_ids.values()]
    assert tags == [codec.tokenizer.id_of(THINK), codec.tokenizer.id_of(THINK_END)]
    assert re.fullmatch("<think><think></think><(no|yes)>", codec.tokenizer.decode(tokens))


@pytest.mark.parametrize(
    ("token", "words"), [(IM_END, "ends an answer"), ("<nobody>", "none of this model's"), ("<nobody", "lexer error")]
)
def test_tokens_that_no_grammar_may_name(compiler: GrammarCompiler, token: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as caught:
        compiler.text(f'start: "a" {token} "b"')
    assert "special tokens are available" not in str(caught.value)


def test_references_leave_the_rest_alone() -> None:
    lark = 'start: a "<t>" %json {"const": "<t>"} /<t>\\/<t>/ <[3-5]> <[*]> // <t>\n# <t>\na: "\\"<t>" <t>'
    assert refer_by_id(lark, {"<t>": 7}, frozenset()) == lark[:-3] + "<[7]>"


def test_expressions_are_found_outside_of_strings_and_comments() -> None:
    lark = 'start: "/no/" A // /nor this/\nA: /a\\/{2,3}/ | /b"c/ # /d/\nB: /e/i'
    assert expressions(lark) == ["a\\/{2,3}", 'b"c', "e"]


@pytest.mark.parametrize("text", ["/" + "\\/" * 32_000, '"' + '\\"' * 32_000, "<a" * 32_000, "/" * 65_000])
def test_a_grammar_is_scanned_in_one_pass(text: str) -> None:
    """Looking for an end in vain from each of 32,000 places took minutes, with the interpreter lock held."""
    begin = process_time()
    refer_by_id(text, {}, frozenset())
    expressions(text)
    assert process_time() - begin < 1.0


def test_an_added_token_that_the_vocabulary_has_too(model_dir: Path) -> None:
    """As in tokenizers of the GPT-2 family."""
    content = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        content["model"]["vocab"][token["content"]] = token["id"]
    hidden = json.loads(unspeakable(json.dumps(content)))
    names = {token["content"]: token["id"] for token in hidden["added_tokens"]}
    assert not names.keys() & {token["content"] for token in content["added_tokens"]}
    assert names.items() <= hidden["model"]["vocab"].items()
    assert sorted(hidden["model"]["vocab"].values()) == sorted(content["model"]["vocab"].values())
