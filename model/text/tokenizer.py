"""Byte-level BPE tokenizer of a model directory (`tokenizer.json`), with each token's bytes at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from divisi.model.text.errors import TokenizerError


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
