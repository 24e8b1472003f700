"""Incremental detokenisation: token by token to text, never splitting a character."""

from __future__ import annotations

import codecs

from divisi.model.text.tokenizer import Tokenizer


class Detokenizer:
    """Text of one growing answer.

    A token of byte-level BPE is a string of bytes, so the text is one incremental UTF-8 decoding: constant cost per
    token, and the pieces concatenate to `Tokenizer.decode` of the whole, invalid bytes included. The last bytes of
    an unfinished character wait (three at most) until the next token completes or refutes it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._hidden = tokenizer.special_ids if skip_special else frozenset[int]()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty for a special token or within a character."""
        if token_id in self._hidden:
            return ""
        return self._decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """At the end: a cut-off character becomes U+FFFD."""
        return self._decode(b"", final=True)
