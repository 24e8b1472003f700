from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from divisi.model.text import Detokenizer, Tokenizer, TokenizerError

IDS = st.lists(st.integers(0, 720), max_size=60)
TEXTS = st.one_of(
    st.text(max_size=80),
    st.lists(
        st.sampled_from(["👩‍🚀", "你好", "é", "e\u0301", "ß", "\u0000", "<|im_end|>", "<think>", " x", "\n\n", "🏳️‍🌈"])
    ).map("".join),
)


@pytest.fixture(scope="session")
def backend(model_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@given(ids=IDS, skip=st.booleans())
def test_decode_is_the_librarys(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, ids: list[int], skip: bool
) -> None:
    """Any ids, so mostly invalid UTF-8."""
    assert tokenizer.decode(ids, skip_special=skip) == backend.decode(ids, skip_special_tokens=skip)


@given(ids=IDS, skip=st.booleans())
def test_increments_concatenate_to_the_whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special=skip)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special=skip)


@given(text=TEXTS)
def test_no_increment_splits_a_character(tokenizer: Tokenizer, backend: tokenizers.Tokenizer, text: str) -> None:
    """Of a valid text no piece has a replacement character, and what waits is one character at most."""
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text).ids
    detokenizer = Detokenizer(tokenizer, skip_special=False)
    out = ""
    whole = tokenizer.decode(ids, skip_special=False)
    for count, token_id in enumerate(ids, start=1):
        out += detokenizer.push(token_id)
        assert whole.startswith(out)
        seen = b"".join(tokenizer.bytes_of(i) for i in ids[:count])
        assert out == seen.decode("utf-8", errors="ignore")
    assert out == whole
    assert detokenizer.flush() == ""


def test_names_of_tokens(tokenizer: Tokenizer) -> None:
    end = tokenizer.id_of("<|im_end|>")
    assert end is not None
    assert tokenizer.name_of(end) == "<|im_end|>"
    assert end in tokenizer.special_ids
    assert tokenizer.id_of("<think>") not in tokenizer.special_ids
    [first, *_] = tokenizer.encode("👩")
    assert tokenizer.name_of(first).startswith("bytes:\\xf0")
    assert tokenizer.name_of(10**6) == ""


def test_a_long_text_leaves_the_interpreter_to_others(tokenizer: Tokenizer) -> None:
    text = "some words, " * 60_000
    work = threading.Thread(target=tokenizer.encode, args=(text,))
    ticks = 0
    work.start()
    while work.is_alive():
        ticks += 1
        time.sleep(0.001)
    work.join()
    assert ticks > 20, f"this thread went on only {ticks} times meanwhile"


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_other_kinds_are_refused(tmp_path: Path, model_dir: Path) -> None:
    content = json.loads((model_dir / "tokenizer.json").read_text())
    content["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"decoder must be ByteLevel.*Fuse"):
        Tokenizer.load(tmp_path)
