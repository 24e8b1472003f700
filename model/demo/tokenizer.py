"""The demo model's tokenizer: byte-level BPE whose words never include the space before them.

A word in a request and the same word in JSON are then the same tokens, so that copying one to the other is copying
tokens; and runs of punctuation, such as `": {"`, are one token. Only the commonest words take their spaces along. A
capital is a token of its own, so that the rest of a name is cut as if it stood alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Part of the text that a client sees or a parser looks for, hence not special."""

_COMMON = (
    "a|an|the|of|to|in|on|is|are|and|for|with|my|this|that|our|one|has|have|can|you|me|it|as|at|from|about|where|use"
    "|set"
)
_LETTERS = r"\p{Lu}|[\p{Ll}\p{Lt}\p{Lm}\p{Lo}]+"
_SPLIT = rf"(?: (?:{_COMMON})(?![\p{{L}}\p{{N}}_\-]))+ ?|{_LETTERS}|\p{{N}}|\n+|[^\p{{L}}\p{{N}}\n]+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the merges from texts; special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(PLAIN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = re.compile("|".join(re.escape(token) for token in SPECIAL + PLAIN))
    tokenizer.train_from_iterator((part for text in texts for part in marks.split(text)), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, template: str, max_length: int, out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": token in SPECIAL}
        for token in SPECIAL + PLAIN
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [START_OF_TURN, END_OF_TURN],
        "added_tokens_decoder": added,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
