"""A model's tokens as llguidance sees them: text is spelled with ordinary tokens alone, added ones go by their id.

Where a grammar leaves no choice, llguidance takes the tokenizer's own encoding of what must come. A literal
`<tool_call>` would become the tag, which the grammar's bytes then refuse, and `<|im_end|>` would end the answer. So the
added tokens get names here that no text contains.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llguidance import LLTokenizer

from divisi.model.text.codec import TextCodec
from divisi.model.text.errors import TextError, TokenizerError


class GrammarVocabulary(NamedTuple):
    """The tokens that masks are about; `eos_ids` end an answer whose grammar is complete."""

    tokenizer: LLTokenizer
    eos_ids: frozenset[int]

    @staticmethod
    def load(model_dir: str | Path, vocab_size: int | None = None) -> GrammarVocabulary:
        """Read a model's tokenizer, for a model of `vocab_size` rows; takes about 6 us per token, most of it with the
        interpreter lock held. Raises TextError.
        """
        folder = Path(model_dir)
        eos_ids = TextCodec.load(folder).eos_ids
        if not eos_ids:
            raise TokenizerError(f"{folder}: no file names a token that ends an answer; set eos_token_id")
        description = unspeakable((folder / "tokenizer.json").read_text(encoding="utf-8-sig"))
        try:
            tokenizer = LLTokenizer(description, n_vocab=vocab_size, eos_token=sorted(eos_ids))
        except ValueError as error:
            raise TokenizerError(f"{folder / 'tokenizer.json'} cannot be used for grammars: {error}") from error
        return GrammarVocabulary(tokenizer, eos_ids)


def unspeakable(description: str) -> str:
    """A `tokenizer.json` in which no text is an added token. Their ids stay; a grammar refers to them as `<[id]>`."""
    content = json.loads(description)
    vocabulary = content["model"]["vocab"]
    mark = secrets.token_hex(16)  # nobody can guess it, so nobody can write it
    for token in content["added_tokens"]:
        name = f"<{mark}-{token['id']}>"
        if (token_id := vocabulary.pop(token["content"], None)) is not None:
            vocabulary[name] = token_id
        token.update(content=name, special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
    return json.dumps({**content, "post_processor": None}, ensure_ascii=False)


# Whatever begins also matches, up to the line's end if need be: to look for an end in vain at every quote costs a time
# that grows with the square of the text.
_LARK = re.compile(
    r"""
    (?://|\#)[^\n]*
    | "(?:[^"\\\n]|\\.)*"?
    | /(?P<expression>(?:[^/\\\n]|\\.)+)/?
    | <(?P<name>[^<>\s\["][^<>\s"]*)>
    """,
    re.VERBOSE,
)
"""Comments, strings, regular expressions, and names of tokens outside of these."""


def expressions(lark: str) -> list[str]:
    """The regular expressions in a Lark grammar."""
    return [found["expression"] for found in _LARK.finditer(lark) if found["expression"]]


def refer_by_id(lark: str, added: Mapping[str, int], eos_ids: frozenset[int]) -> str:
    """A Lark grammar whose tokens, such as `<think>` outside of strings, are references by id.

    Raises TextError for a token that the model lacks, or that ends an answer wherever it stands.
    """

    def reference(found: re.Match[str]) -> str:
        if found["name"] is None:
            return found[0]
        token_id = added.get(found[0])
        if token_id is None:
            raise TextError(f"the token {found[0][:64]} is none of this model's; write text in quotes")
        if token_id in eos_ids:
            raise TextError(f"the token {found[0][:64]} ends an answer and cannot stand inside of one; leave it out")
        return f"<[{token_id}]>"

    return _LARK.sub(reference, lark)
