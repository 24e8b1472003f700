"""What is in a checkpoint's files, from their headers alone. Reads no weights.

A safetensors file is an 8-byte little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}}, and the data.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divisi.model.config.tensor_names import INDEX_FILE, SINGLE_FILE
from divisi.model.errors import CheckpointError

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: str
    """The format's name: BF16, F32, ..."""
    shape: tuple[int, ...]
    num_bytes: int


def read_index(model_dir: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a model directory: one file, or several with or without an index.

    Without an index, shards are known by their names (`model-00001-of-00002.safetensors`), all of which must be there;
    a file that is the only one may have any name. Raises CheckpointError.
    """
    single = model_dir / SINGLE_FILE
    if single.is_file():
        return read_header(single)
    index = model_dir / INDEX_FILE
    if index.is_file():
        return _read_sharded(model_dir, _weight_map(index))
    if files := _shards_by_name(model_dir):
        return _read_unindexed(files)
    raise CheckpointError(_nothing_found(model_dir))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse one file's header and check that the data it promises is there. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path.name}: truncated or no safetensors file: its header should be {length} bytes long, "
                    f"the file has {size}; download it again"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path.name}: damaged safetensors header: {error}; download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: damaged safetensors header: not a JSON object; download it again")
    data = size - 8 - length
    return {name: _info(path, name, entry, data) for name, entry in header.items() if name != "__metadata__"}


def _info(path: Path, name: str, entry: Any, data_size: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
        begin, end = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: damaged header entry of {name}: {error!r}; download it again") from None
    if end > data_size:
        raise CheckpointError(
            f"{path.name}: truncated: {name} should end at byte {end} of the data, found {data_size} bytes; "
            f"download it again"
        )
    expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
    if begin < 0 or end < begin or (dtype in DTYPE_BYTES and end - begin != expected):
        raise CheckpointError(
            f"{path.name}: damaged header: {name} of shape {list(shape)} in {dtype} should take {expected} bytes, "
            f"found {end - begin}; download it again"
        )
    return TensorInfo(path, dtype, shape, end - begin)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index.name}: bad index, expected an object with a weight_map: {error!r}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name}: bad index: weight_map must be a non-empty object of tensor: file")
    for name, file in weight_map.items():
        # an index from elsewhere must not make us open files outside the model directory
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index.name}: bad index: {name} in {file!r}, which is no safetensors file name")
    return weight_map


def _read_sharded(model_dir: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    first = {file: name for name, file in reversed(weight_map.items())}
    for file in sorted(set(weight_map.values())):
        path = model_dir / file
        if not path.is_file():
            raise CheckpointError(f"{first[file]}: expected in {file} by {INDEX_FILE}, which is missing; download it")
        found |= read_header(path)
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            actual = found[name].file.name if name in found else "nowhere"
            raise CheckpointError(f"{name}: expected in {file} by {INDEX_FILE}, found {actual}; download both again")
    return {name: found[name] for name in weight_map}


def _shards_by_name(model_dir: Path) -> list[Path]:
    """Files of a checkpoint without an index, in order; none where the names do not tell. Raises CheckpointError."""
    files = sorted(model_dir.glob("*.safetensors"))
    parts = [found for file in files if (found := _SHARD.fullmatch(file.name))]
    sets = {(part["stem"], int(part["count"])) for part in parts}
    if len(sets) != 1 or len(parts) != len(files):
        return files if len(files) == 1 and not parts else []
    ((stem, count),) = sets
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    present = {file.name for file in files}
    if missing := [name for name in names if name not in present]:
        raise CheckpointError(
            f"{model_dir}: expected {count} files by their names, found {len(present)}; download {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return [model_dir / name for name in names]


def _read_unindexed(files: list[Path]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in found:
                raise CheckpointError(
                    f"{name}: found in both {found[name].file.name} and {file.name}, and no {INDEX_FILE} "
                    f"says which counts; download the index, or remove one of the files"
                )
            found[name] = info
    return found


def _nothing_found(model_dir: Path) -> str:
    if not model_dir.is_dir():
        return f"{model_dir}: no such model directory"
    present = sorted(path.name for path in model_dir.iterdir())
    pickles = [name for name in present if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{model_dir}: expected {SINGLE_FILE} or {INDEX_FILE}, found the pickle file {pickles[0]}, "
            f"which can run code when loaded and is not read; convert the checkpoint to safetensors"
        )
    loose = [name for name in present if name.endswith(".safetensors")]
    found = f"found {', '.join((loose or present)[:5]) or 'an empty directory'}"
    if loose:
        found += " without an index, which the names do not tell apart; download the index"
    return f"{model_dir}: expected {SINGLE_FILE} or {INDEX_FILE}, {found}"
