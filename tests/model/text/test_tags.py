from __future__ import annotations

from divisi.model.text import Tokenizer
from divisi.model.text.tags import CALL, THINK, THINK_END, last_tag, tag_ids


def test_the_tag_that_a_prompt_ends_with(tokenizer: Tokenizer) -> None:
    ids = tag_ids(tokenizer)
    tags = {token_id: name for name, token_id in ids.items()}
    blank = tokenizer.encode("\n\n")
    spelled = [token for letter in THINK for token in tokenizer.encode(letter)]
    assert tokenizer.decode(spelled) == THINK
    for prompt, found in (
        ([ids[THINK], *blank], THINK),
        ([ids[THINK], ids[THINK_END]], THINK_END),
        ([ids[CALL], *tokenizer.encode("x")], None),
        (spelled, None),
        ([], None),
    ):
        assert last_tag(prompt, tokenizer, tags) == found


def test_the_last_tag_of_the_last_turn(tokenizer: Tokenizer) -> None:
    ids = tag_ids(tokenizer)
    tags = {token_id: name for name, token_id in ids.items()}
    for prompt, found in (
        ("<|im_start|>assistant\n<think>\nLet me", THINK),
        ("<|im_start|>assistant\n<think>a</think>\nIt is", THINK_END),
        ("<think>a<|im_end|>\n<|im_start|>assistant\nIt is", None),
        ("It is", None),
    ):
        assert last_tag(tokenizer.encode(prompt), tokenizer, tags, past_text=True) == found
