"""The names of a model directory's tensors, and nothing else of them. Imports no torch; `checkpoint` reads the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")


def count_mtp_layers(model_dir: Path) -> int:
    """MTP layers that the weights have, whatever the config says: not every config names them, and some lost them."""
    found = {match[1] for name in tensor_names(model_dir) if (match := _MTP_LAYER.match(name))}
    return len(found)


def tensor_names(model_dir: Path) -> set[str]:
    """From the index, or else from the files' headers. What cannot be read is left out: to complain is others' part."""
    try:
        if not (model_dir / SINGLE_FILE).is_file() and (model_dir / INDEX_FILE).is_file():
            return set(json.loads((model_dir / INDEX_FILE).read_bytes())["weight_map"])
        return set().union(*map(_header_names, model_dir.glob("*.safetensors")))
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _header_names(path: Path) -> set[str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name}: no safetensors file")
        return set(json.loads(file.read(length)))
