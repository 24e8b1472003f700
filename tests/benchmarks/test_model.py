"""The checkpoint of the benchmarks."""

from __future__ import annotations

from pathlib import Path

from divisi.benchmarks.model import fill_vocabulary
from divisi.model.random_checkpoint.tokenizer import write_random_tokenizer
from divisi.model.text import TextCodec


def test_every_id_is_text(tmp_path: Path) -> None:
    """Also those that the tokenizer could not learn; what it knew stays as it was."""
    size = 40_000
    write_random_tokenizer(tmp_path, size, 512)
    before = TextCodec.load(tmp_path).tokenizer
    assert before.vocab_size < size
    fill_vocabulary(tmp_path / "tokenizer.json", size)
    after = TextCodec.load(tmp_path).tokenizer
    assert all(after.bytes_of(token) for token in range(size))
    assert all(after.bytes_of(token) == before.bytes_of(token) for token in range(before.vocab_size))
    text = "Nothing is known of this: zq, 12.\n"
    assert after.encode(text) == before.encode(text)
