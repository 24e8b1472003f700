"""`python -m divisi.deploy.prefetch`: the command of the chart's Job and init containers."""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from divisi.deploy.prefetch.download import Fetcher
from divisi.deploy.prefetch.folder import Mark, held, read_mark, wait_until_whole, write_mark
from divisi.deploy.prefetch.source import FetchError, Hub, Plain, RemoteFile, Source, holds_weights

_SAY_EVERY_S = 10.0
_SILENCE_S = 60.0
"""Longest wait for the next bytes."""


class Progress:
    """Counts bytes, and says so now and then. For several threads."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._lock = threading.Lock()
        self._bytes = 0
        self._said_at = time.monotonic()

    def __call__(self, count: int) -> None:
        """So many bytes more are there."""
        with self._lock:
            self._bytes += count
            if time.monotonic() - self._said_at < _SAY_EVERY_S:
                return
            self._said_at = time.monotonic()
            of = "" if self._total is None else f" of {self._total / 1e9:.2f}"
            print(f"{self._bytes / 1e9:.2f}{of} GB", flush=True)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parsed = argparse.ArgumentParser(prog="python -m divisi.deploy.prefetch", description="Fetch a model, once.")
    parsed.add_argument("--to", type=Path, required=True, metavar="DIR", help="the model's folder")
    parsed.add_argument("--endpoint", default="https://huggingface.co", metavar="URL")
    parsed.add_argument("--repo", metavar="OWNER/NAME")
    parsed.add_argument("--revision", metavar="COMMIT")
    parsed.add_argument("--url", help="a folder with SHA256SUMS, in place of a repository")
    parsed.add_argument("--connections", type=int, default=4)
    parsed.add_argument("--deadline", type=float, default=14400.0, metavar="SECONDS")
    parsed.add_argument("--token-file", type=Path)
    parsed.add_argument("--without-weights", action="store_true", help="only configuration and tokenizer")
    parsed.add_argument("--wait", action="store_true", help="fetch nothing; wait until another has")
    return parsed


def fill(source: Source, folder: Path, weights: bool, connections: int, until: float, token: str | None) -> None:
    """Fetch what is missing and mark the folder as whole. Raises FetchError."""
    with held(folder, until):
        mark = read_mark(folder)
        if mark is not None and mark.source != source.name:
            raise FetchError(f"{folder} holds {mark.source}, not {source.name}; give another folder")
        if mark is not None and mark.weights >= weights:
            print(f"{folder} holds {source.name} already", flush=True)
            return
        headers = {"Accept-Encoding": "identity"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
        with httpx.Client(headers=headers, timeout=_SILENCE_S, follow_redirects=True) as client:
            try:
                files = [file for file in source.files(client) if weights or not holds_weights(file)]
            except httpx.HTTPError as error:
                raise FetchError(f"{source.name}: {error}") from None
            _fetch_all(client, files, folder, connections, until)
        sizes = {file.path: (folder / file.path).stat().st_size for file in files}
        write_mark(folder, Mark(source.name, weights, sizes))
    print(f"{folder} holds {source.name}", flush=True)


def _fetch_all(client: httpx.Client, files: list[RemoteFile], folder: Path, connections: int, until: float) -> None:
    if not any(file.path == "config.json" for file in files):
        raise FetchError("the source has no config.json: is it a model?")
    sizes = [file.size for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    missing = sum(file.size or 0 for file in files if not (folder / file.path).exists())
    if missing > (free := shutil.disk_usage(folder).free):
        wanted = f"{missing / 1e9:.1f} GB are missing and {free / 1e9:.1f} GB free"
        raise FetchError(f"{folder}: {wanted}; give it more room")
    fetcher = Fetcher(client, folder, until, Progress(total))
    with ThreadPoolExecutor(connections) as pool:
        futures = [pool.submit(fetcher.fetch, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            fetcher.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def main(arguments: list[str]) -> int:
    """Exit status 0 once the folder is whole, 1 with one line on standard error otherwise."""
    args = parser().parse_args(arguments)
    until = time.monotonic() + args.deadline
    try:
        if args.wait:
            wait_until_whole(args.to, until)
            return 0
        source: Source = Plain(args.url) if args.url else Hub(args.endpoint, args.repo or "", args.revision or "")
        token = None if args.token_file is None else args.token_file.read_text(encoding="utf-8").strip()
        fill(source, args.to, not args.without_weights, args.connections, until, token)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
