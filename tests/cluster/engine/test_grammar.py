from __future__ import annotations

import string
from concurrent.futures import Future
from pathlib import Path
from random import Random

import numpy as np
import pytest
from llguidance import LLParserLimits
from numpy.typing import NDArray

from divisi.cluster.engine.grammar import Grammars, Guide, Guided
from divisi.model.random_checkpoint.tokenizer import write_random_tokenizer
from divisi.model.text.errors import TextError
from divisi.model.text.grammar.tokens import GrammarVocabulary
from tests.support.fake_runner import VOCAB
from tests.support.tiny_grammar import EOS, TOKENS, grammars, regex, vocabulary

PROMPT = [50, 51]
WAIT_S = 30.0


def allowed(masks: Future[NDArray[np.int32]], row: int = 0) -> list[str]:
    bits = np.unpackbits(masks.result(WAIT_S).view(np.uint8), axis=1, count=VOCAB, bitorder="little")
    return [TOKENS[token] for token in np.flatnonzero(bits[row])]


def tokens(text: str) -> list[int]:
    return [TOKENS.index(character) for character in text]


def compiled(source: Grammars, grammar: str) -> Guide:
    return source.compile(grammar).result(WAIT_S)


def test_masks_follow_the_committed_tokens() -> None:
    source = grammars()
    guide = compiled(source, regex("a(bc|d)x?"))
    answer = list(PROMPT)
    seen = []
    for text in ("", "a", "d", "x"):
        answer += tokens(text)
        seen.append((allowed(source.start([Guided(guide, answer, 2)])), guide.is_complete))
    assert seen == [(["a", "ab"], False), (["b", "d"], False), (["<eos>", "x"], True), (["<eos>"], True)]


def test_asking_again_without_a_new_token_changes_nothing() -> None:
    """As when a step is aborted, even before its masks were fetched."""
    source = grammars()
    guide = compiled(source, regex("ab{3}c"))
    answer = [*PROMPT, *tokens("abb")]
    pending = [source.start([Guided(guide, answer, 2)]) for _ in range(20)]
    assert [allowed(masks) for masks in pending] == [["b"]] * 20
    assert guide.error is None


def test_guides_of_one_grammar_go_their_own_ways() -> None:
    source = grammars()
    first, second = compiled(source, regex("[ab]c|d")), compiled(source, regex("[ab]c|d"))
    masks = source.start([Guided(first, tokens("a"), 0), Guided(second, [], 0)])
    assert allowed(masks, 0) == ["c"]
    assert allowed(masks, 1) == ["a", "b", "d"]


def test_the_tokenizer_is_read_once_and_only_for_a_grammar() -> None:
    calls = []

    def load() -> GrammarVocabulary:
        calls.append(1)
        return vocabulary()

    source = Grammars(load, VOCAB)
    assert not calls
    for pattern in ("a", "b", "a"):
        assert compiled(source, regex(pattern)).error is None
    assert calls == [1]


def test_many_grammars_do_not_pile_up() -> None:
    source = grammars()
    for count in range(1, 200):
        guide = compiled(source, regex(f"a{{{count}}}"))
        assert allowed(source.start([Guided(guide, tokens("a" * (count - 1)), 0)])) == ["a"]


@pytest.mark.parametrize("grammar", [regex("(a"), "start: missing", "{", ""], ids=["regex", "lark", "json", "empty"])
def test_a_grammar_that_cannot_be_compiled_is_an_error_of_its_guide(grammar: str) -> None:
    source = grammars()
    bad, good = compiled(source, grammar), compiled(source, regex("a"))
    assert bad.error
    masks = source.start([Guided(bad, [], 0), Guided(good, [], 0)])
    assert allowed(masks, 0) == []
    assert allowed(masks, 1) == ["a"]
    assert not bad.is_complete


def test_a_limit_that_a_grammar_exceeds_on_the_way_stops_its_guide_only() -> None:
    """Here the size of the parser's sets, which an ambiguous grammar exceeds after some tokens."""
    limits = LLParserLimits(step_max_items=60, verbose_errors=False)
    source = grammars(limits)
    bad = compiled(source, 'start: list\nlist: "a" | list list\n')
    good = compiled(source, regex("a+"))
    answer: list[int] = []
    for _ in range(60):
        masks = source.start([Guided(bad, answer, 0), Guided(good, answer, 0)])
        assert "a" in allowed(masks, 1)
        if bad.error:
            break
        assert "a" in allowed(masks, 0)
        answer += tokens("a")
    assert bad.error
    assert answer
    assert allowed(masks, 0) == []
    assert not bad.is_complete
    assert good.error is None


def test_an_answer_that_exhausts_its_lexer_leaves_others_of_its_grammar_alone() -> None:
    source = grammars(LLParserLimits(max_lexer_states=2000, verbose_errors=False))
    pattern, random = regex("([a-z]*[a-m][a-z]{14})+"), Random(1)
    before = compiled(source, pattern)
    bad, answer = compiled(source, pattern), []
    while not bad.error:
        assert len(answer) < 5000
        answer += tokens("".join(random.choices(string.ascii_lowercase, k=50)))
        source.start([Guided(bad, answer, 0)]).result(WAIT_S)
    after = compiled(source, pattern)
    for guide in (before, after):
        assert "a" in allowed(source.start([Guided(guide, tokens("bcd"), 0)]))
        assert guide.error is None


def test_reading_the_tokenizer_can_begin_early() -> None:
    calls = []

    def load() -> GrammarVocabulary:
        calls.append(1)
        return vocabulary()

    source = Grammars(load, VOCAB)
    source.prepare()
    assert compiled(source, regex("a")).error is None
    assert calls == [1]


def test_a_token_outside_the_grammar_is_an_error() -> None:
    source = grammars()
    guide = compiled(source, regex("ab"))
    assert allowed(source.start([Guided(guide, tokens("b"), 0)])) == []
    assert guide.error is not None
    assert "\n" not in guide.error


@pytest.mark.parametrize("error", [TextError("tokenizer.json is missing"), OSError("disk"), ValueError("odd")])
def test_a_tokenizer_that_cannot_be_read_fails_each_request_and_is_logged(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Where files lie and how a library fails is the log's matter, not a client's."""

    def load() -> GrammarVocabulary:
        raise error

    source = Grammars(load, VOCAB)
    for _ in range(2):
        told = compiled(source, regex("a")).error
        assert told is not None
        assert str(error) not in told
    assert str(error) in caplog.text


def test_only_the_end_of_the_text_follows_a_complete_answer() -> None:
    source = grammars()
    guide = compiled(source, regex("ab"))
    masks = source.start([Guided(guide, tokens("ab"), 0)])
    assert allowed(masks) == [TOKENS[EOS]]
    assert guide.is_complete


@pytest.mark.parametrize("inside", [f"<[{EOS}]>", "<[*]>"])
def test_no_answer_ends_before_its_grammar_does(inside: str) -> None:
    """Even where the grammar itself names the token that ends answers."""
    source = grammars()
    guide = compiled(source, f'start: "a" {inside} "b"')
    assert allowed(source.start([Guided(guide, [], 0)])) == ["a"]
    assert TOKENS[EOS] not in allowed(source.start([Guided(guide, tokens("a"), 0)]))
    assert guide.error is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_tokenizer_file_may_begin_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    write_random_tokenizer(tmp_path, 700, 4096)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    source = Grammars(lambda: GrammarVocabulary.load(tmp_path, 4096), 4096)
    assert compiled(source, regex("a")).error is None
