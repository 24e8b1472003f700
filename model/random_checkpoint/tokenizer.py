"""A small byte-level BPE tokenizer in the files and with the special tokens of the Qwen family.

It is trained on the spot on a text that comes with the package; every vocabulary size gives the same tokenizer
everywhere. A larger vocabulary than the text yields is left unfilled, as in the published checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from divisi.model.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
_SPECIAL = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
# Part of the text that a client sees or that a parser looks for, hence not special
_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_random_tokenizer(out: Path, vocab_size: int, max_length: int) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json with a ChatML template; return the ids of the added tokens.

    Raises ConfigError where `vocab_size` has no room for the 256 bytes and the added tokens.
    """
    needed = 256 + len(_SPECIAL) + len(_PLAIN)
    if vocab_size < needed:
        raise ConfigError("vocab_size", vocab_size, f"a byte-level tokenizer needs at least {needed}")
    tokenizer = _train(vocab_size - len(_SPECIAL) - len(_PLAIN))
    ids = {token: tokenizer.get_vocab_size() + i for i, token in enumerate(_SPECIAL + _PLAIN)}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _PLAIN])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [START_OF_TURN, END_OF_TURN],
        "added_tokens_decoder": {str(ids[token]): _added(token) for token in ids},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": _resource("chatml.jinja"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return ids


def _train(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_resource("text.txt").splitlines(keepends=True), trainer)
    return tokenizer


def _added(token: str) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": token in _SPECIAL}


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
