"""A model's folder that several processes may fill and read: one fills it, all see when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from divisi.deploy.prefetch.source import FetchError

_LOCK, _MARK = ".divisi-lock", ".divisi-complete.json"
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Mark:
    """What a whole folder holds."""

    source: str
    weights: bool
    files: dict[str, int]
    """Bytes by path."""


def read_mark(folder: Path) -> Mark | None:
    """None where the model is not whole, or a file of it is missing or has another size."""
    try:
        mark = Mark(**json.loads((folder / _MARK).read_text(encoding="utf-8")))
        whole = all((folder / path).stat().st_size == size for path, size in mark.files.items())
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return mark if whole else None


def write_mark(folder: Path, mark: Mark) -> None:
    """The last thing to be written; on disk before it has its name."""
    new = folder / f"{_MARK}.new"
    with new.open("w", encoding="utf-8") as out:
        json.dump(asdict(mark), out)
        out.flush()
        os.fsync(out.fileno())
    new.replace(folder / _MARK)


@contextlib.contextmanager
def held(folder: Path, until: float) -> Iterator[None]:
    """Be the only one who fills the folder; waits for others. Raises FetchError once it is `until` (monotonic)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise FetchError(f"{folder}: another process is still filling it") from None
                time.sleep(_LOOK_EVERY_S)  # a lock on a shared file system tells nobody when it is free
        yield


def wait_until_whole(folder: Path, until: float) -> Mark:
    """Raises FetchError once time (`until`, monotonic) is up."""
    while (mark := read_mark(folder)) is None:
        if time.monotonic() > until:
            raise FetchError(f"{folder}: no whole model is there yet; look at the log of the Job that fetches it")
        time.sleep(_LOOK_EVERY_S)  # nobody tells of a new file on a shared file system
    return mark
