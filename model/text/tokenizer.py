"""Byte-level BPE tokenizer of a model directory (`tokenizer.json`), with each token's bytes at hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from divisi.model.text.errors import TokenizerError

_KEPT = frozenset(map(chr, range(33))) | {'"', "\\"}
"""Letters that templates look for when they strip or escape."""


class Controls(NamedTuple):
    """Added tokens in a text."""

    names: list[str]
    spans: list[tuple[int, int]]


class Tokenizer:
    """Text to token ids and back.

    Only byte-level tokenizers, the kind of this model family: every token is a fixed string of bytes and text is
    the UTF-8 reading of their concatenation. That makes incremental decoding exact at a constant cost per token.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        description = json.loads(backend.to_str())
        _require_byte_level(description.get("decoder"))
        self._backend = backend
        self._bytes, self.special_ids = _token_bytes(backend)
        self.added_ids = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
        """Ids of the added tokens, which the letters of their content become wherever they stand in a text."""
        self.has_normalizer = description.get("normalizer") is not None
        # Runs of blanks, which some tokenizers add, control nothing.
        controls = [token for token in description["added_tokens"] if token["content"].strip()]
        self._control_ids = {token["id"] for token in controls}
        self._controls = _any_of([token["content"] for token in controls])
        self._control_letters = frozenset("".join(token["content"] for token in controls)) - _KEPT
        self._normalized_controls = self.has_normalizer and any(token["normalized"] for token in controls)
        self.longest_token = max((len(raw) for raw in self._bytes), default=1)
        """Bytes of the longest token: a bound on how many tokens a text has at least."""

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Read `tokenizer.json`; raises TokenizerError where it is missing or isn't byte-level BPE."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} is missing: save the tokenizer in its fast form beside the weights")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
        except Exception as error:  # the Rust library raises bare Exception
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; added tokens included."""
        return len(self._bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. Raises TokenizerError for a lone surrogate, which is no text."""
        try:
            # encode() keeps the interpreter lock for as long as it takes, a batch of one gives it up
            return list(self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError as error:
            raise TokenizerError("the text has a lone surrogate, which is not valid Unicode") from error

    def controls(self, text: str) -> Controls:
        """The added tokens in a text, but for blanks."""
        found = [*self._controls.finditer(text)]
        names = [match[0] for match in found]
        if self._normalized_controls:
            names += self._controls.findall(self._backend.normalizer.normalize_str(text))
        return Controls(names, [match.span() for match in found])

    def letters_of_controls(self, text: str) -> frozenset[str]:
        """The letters of added tokens, and those of a text that normalisation may turn into one."""
        if not self._normalized_controls:
            return self._control_letters
        normal = self._backend.normalizer.normalize_str
        similar = {char for char in set(text) if not self._control_letters.isdisjoint(normal(char))}
        return self._control_letters | (similar - _KEPT)

    def encode_marked(self, text: str, marked: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of text whose added tokens are those in `marked`, a text of equal length; others are spelled out.

        Raises TokenizerError as `encode` does.
        """
        if self.controls(text) == self.controls(marked):
            return self.encode(text, add_special_tokens=add_special_tokens)
        found = self._backend.encode_batch([marked], add_special_tokens=add_special_tokens)[0]
        ends = [index for index, added in enumerate(found.special_tokens_mask) if not added] or [0]
        ids, at = list(found.ids[: ends[0]]), 0
        for token_id, (start, end) in list(zip(found.ids, found.offsets, strict=True))[ends[0] : ends[-1] + 1]:
            if token_id in self._control_ids:
                ids += [*self._spell(text[at:start]), token_id]
                at = end
        return [*ids, *self._spell(text[at:]), *found.ids[ends[-1] + 1 :]]

    def _spell(self, text: str) -> list[int]:
        """Token ids of text in which nothing is an added token."""
        if not self.controls(text).names:
            return self.encode(text, add_special_tokens=False)
        backend = self._backend
        text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words = [(text, (0, len(text)))]
        if backend.pre_tokenizer is not None:
            words = backend.pre_tokenizer.pre_tokenize_str(text)
        spelled: dict[str, list[int]] = {}
        for word in {word for word, _ in words}:
            found = [token.id for token in backend.model.tokenize(word)]
            if not self._control_ids.isdisjoint(found):  # the model's own vocabulary may list it, too
                found = [token.id for letter in word for token in backend.model.tokenize(letter)]
            spelled[word] = found
        return [token_id for word, _ in words for token_id in spelled[word]]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of a whole run of ids; invalid UTF-8 becomes U+FFFD and ids that the vocabulary lacks are nothing."""
        special = self.special_ids if skip_special else frozenset[int]()
        return b"".join(self.bytes_of(i) for i in ids if i not in special).decode("utf-8", errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes of one token; empty where the vocabulary has no such token (a padded embedding row)."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def name_of(self, token_id: int) -> str:
        """The token as text, or `bytes:\\xe4\\xbd` (OpenAI's spelling) where its bytes are no text on their own."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def id_of(self, token: str) -> int | None:
        """Id of a token given by its content, `<|im_end|>` for instance."""
        found: int | None = self._backend.token_to_id(token)
        return found


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """The longest of the names that stands at a place."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _require_byte_level(decoder: Any) -> None:
    """The decoder must be ByteLevel alone, possibly wrapped in a sequence of one."""
    steps: Sequence[Any] = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] if step else None for step in steps]
    if kinds != ["ByteLevel"]:
        raise TokenizerError(f"tokenizer.json: decoder must be ByteLevel (byte-level BPE, as Qwen's), found {kinds}")


def _token_bytes(backend: tokenizers.Tokenizer) -> tuple[list[bytes], frozenset[int]]:
    """Bytes of every id, and the ids of special tokens."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    byte_of = _byte_alphabet()
    for token, token_id in vocabulary.items():
        # The library reads any token that isn't all in the byte alphabet as plain UTF-8, added or not; so do we.
        if all(char in byte_of for char in token):
            table[token_id] = bytes(byte_of[char] for char in token)
        else:
            table[token_id] = token.encode("utf-8")
    return table, frozenset(token_id for token_id, token in added.items() if token.special)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
