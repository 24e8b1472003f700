"""The checkpoint that is measured: one that is given, or a random one of `configs/bench-s.json`."""

from __future__ import annotations

import json
from pathlib import Path

from divisi.model.random_checkpoint import write_random_checkpoint

_CONFIG = Path(__file__).parent / "configs" / "bench-s.json"


def bench_model(given: Path | None, scratch: Path) -> Path:
    """Its folder; a random one is made in `scratch`."""
    if given is not None:
        return given
    out = scratch / _CONFIG.stem
    config = write_random_checkpoint(out, json.loads(_CONFIG.read_text()))
    fill_vocabulary(out / "tokenizer.json", config.vocab_size)
    return out


def fill_vocabulary(path: Path, vocab_size: int) -> None:
    """Give each id that a random checkpoint's tokenizer lacks a text: a model without training answers with any id.

    A token without a text is no event, and so the time between tokens could not be seen.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = data["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in data["added_tokens"]}  # or they would be numbered anew
    known = set(vocabulary.values())
    vocabulary |= {f"z{number:x}q": number for number in range(vocab_size) if number not in known}
    path.write_text(json.dumps(data), encoding="utf-8")
