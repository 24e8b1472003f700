"""Streams that are read while something happens to the server, with the times at which their pieces came."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import httpx


class OpenStream:
    """One greedy answer of a fixed length, read in a thread."""

    def __init__(self, url: str, model: str, prompt: str, tokens: int) -> None:
        self._body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                      "stream": True}  # fmt: skip
        self._url = url
        self.text = ""
        self.times: list[float] = []
        """When each piece came, monotonic."""
        self.problem = ""
        """What ended it before its time."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._read()
        except httpx.HTTPError as error:
            self.problem = repr(error)

    def _read(self) -> None:
        finished = None
        with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=120) as reply:
            if reply.status_code != 200:
                self.problem = f"{reply.status_code} {reply.read().decode()}"
                return
            for line in reply.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.problem = str(event["error"])
                    return
                self.times.append(time.monotonic())
                self.text += event["choices"][0]["text"]
                finished = event["choices"][0]["finish_reason"] or finished
        if finished != "length":
            self.problem = f"it ended by {finished!r} after {len(self.times)} pieces"

    @property
    def goes_on(self) -> bool:
        """Whether more may come."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.problem = f"nothing after {len(self.times)} pieces"

    def longest_gap(self, since: float) -> float:
        """Seconds, of the gaps that end after a time."""
        return max((after - before for before, after in pairwise(self.times) if after > since), default=0.0)


class StreamApart:
    """An `OpenStream` in a process of its own: nothing else that a test does delays the times that it takes."""

    def __init__(self, url: str, model: str, prompt: str, tokens: int, file: Path) -> None:
        """`file`: where the process writes; returns once the first piece has come."""
        self._file = file
        command = [sys.executable, "-m", __name__, url, model, prompt, str(tokens)]
        with file.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, cwd=Path(__file__).parents[2])
        until = time.monotonic() + 30
        while not file.stat().st_size:
            assert time.monotonic() < until, "the stream does not begin"
            time.sleep(0.05)

    def close(self) -> tuple[list[float], str]:
        """Give it up; returns when its pieces came, and what ended it before."""
        self._process.terminate()
        self._process.wait(20)
        told = [json.loads(line) for line in self._file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [piece for piece in told if isinstance(piece, float)], "".join(p for p in told if isinstance(p, str))


class OpenStreams:
    """Several at once, with prompts of their own."""

    def __init__(self, url: str, model: str, count: int, tokens: int) -> None:
        self.all = [OpenStream(url, model, f"Tell me about number {index}.", tokens) for index in range(count)]

    def wait_until_flowing(self, pieces: int, within_s: float = 90.0) -> None:
        until = time.monotonic() + within_s
        while min(len(stream.times) for stream in self.all) < pieces:
            assert not self.problems, self.problems
            assert time.monotonic() < until, [len(stream.times) for stream in self.all]
            time.sleep(0.02)

    def join(self, within_s: float) -> None:
        until = time.monotonic() + within_s
        for stream in self.all:
            stream.join(max(until - time.monotonic(), 0.1))

    @property
    def problems(self) -> list[str]:
        return [stream.problem for stream in self.all if stream.problem]

    @property
    def texts(self) -> list[str]:
        return [stream.text for stream in self.all]

    def longest_gap(self, since: float) -> float:
        return max(stream.longest_gap(since) for stream in self.all)


def hurt_in_the_middle(
    url: str, model: str, tokens: int, want: Sequence[str], blow: Callable[[], None], within_s: float = 120.0
) -> float:
    """Read as many streams as there are texts, strike, and read on; returns the longest gap.

    Fails unless all texts are as they were.
    """
    streams = OpenStreams(url, model, len(want), tokens)
    streams.wait_until_flowing(10)
    struck_at = time.monotonic()
    blow()
    streams.join(within_s)
    assert streams.problems == []
    assert streams.texts == list(want)
    assert all(stream.times[-1] > struck_at for stream in streams.all), "too late to show anything"
    return streams.longest_gap(struck_at)


def _read_apart() -> None:
    """What a `StreamApart` starts: a line of JSON for each piece's time, and one for what ended the stream."""
    url, model, prompt, tokens = sys.argv[1:]
    stream, told, more = OpenStream(url, model, prompt, int(tokens)), 0, True
    while more:
        more = stream.goes_on
        times = stream.times[told:]
        told += len(times)
        print(*map(json.dumps, times), sep="\n", end="\n" * bool(times), flush=True)
        time.sleep(0.1)
    print(json.dumps(stream.problem or "it ended"), flush=True)


if __name__ == "__main__":
    _read_apart()
