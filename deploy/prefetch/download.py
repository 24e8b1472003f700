"""Fetches files: goes on where an earlier try ended, and checks a content before it gets its name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from divisi.deploy.prefetch.source import FetchError, RemoteFile, explain

_PIECE = 2**20
_TRIES = 8
"""Without a byte of progress."""
_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Fetcher:
    """For several threads, each with a file of its own."""

    client: httpx.Client
    folder: Path
    until: float
    """By the monotonic clock; then it gives up, and keeps what it has."""
    note: Callable[[int], object]
    """Hears of each piece's bytes."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set where another thread has failed."""

    def fetch(self, file: RemoteFile) -> None:
        """Put a file into the folder, unless it is there, whole.

        Raises FetchError where the content is not what it should be, the source refuses, or time is up.
        """
        target = self.folder / file.path
        if target.exists():  # only a checked file has its name
            self.note(target.stat().st_size)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        failures, reached = 0, -1
        while True:
            try:
                self._go_on(file, part)
                break
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                size = _size(part)
                failures = 1 if size > reached else failures + 1
                reached = size
                pause = min(2.0 ** (failures - 1), _LONGEST_PAUSE_S)
                if failures >= _TRIES or time.monotonic() + pause > self.until or self.stop.wait(pause):
                    raise FetchError(f"{file.url}: {error} (try {failures}; {size} bytes are kept)") from None
        _check(file, part)
        part.replace(target)

    def _go_on(self, file: RemoteFile, part: Path) -> None:
        part.touch()
        have = _size(part)
        if file.size is not None and have >= file.size:
            self.note(have)
            return
        with self.client.stream("GET", file.url, headers={"Range": f"bytes={have}-"} if have else {}) as reply:
            if reply.status_code == 416:  # nothing is missing, or the file has become shorter: the check will tell
                return
            explain(reply)
            resumed = reply.status_code == 206
            if resumed:
                self.note(have)
            with part.open("ab" if resumed else "wb") as out:
                for piece in reply.iter_raw():
                    out.write(piece)
                    self.note(len(piece))
                    if time.monotonic() > self.until or self.stop.is_set():
                        raise FetchError(f"{file.url}: no time is left; {out.tell()} bytes are kept")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(file: RemoteFile, part: Path) -> None:
    size = part.stat().st_size
    hasher = file.hasher(size)
    with part.open("rb") as content:
        while piece := content.read(_PIECE):
            hasher.update(piece)
    if (found := hasher.hexdigest()) != file.digest:
        part.unlink()
        wrong = f"its {size} bytes hash to {found}, not {file.digest}"
        raise FetchError(f"{file.url}: {wrong}; they are removed, try again")
