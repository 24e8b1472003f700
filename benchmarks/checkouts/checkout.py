"""A checkout of Divisi, and a process that runs its code.

Both checkouts run in this interpreter with this environment's libraries, so that they differ by their source only. A
folder of links stands for an installation: <scratch>/divisi/kernels and so on, <scratch>/tests.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from divisi.benchmarks import machine

_PACKAGES = ("kernels", "model", "cluster", "deploy", "benchmarks")
_INSIDE = Path(__file__).with_name("inside.py")
_SHOWN_LINES = 15


class Checkout:
    """The root folder of a checkout, with the name it has in the tables."""

    def __init__(self, name: str, root: Path) -> None:
        """Raises SystemExit where `root` is no checkout."""
        self.name, self.root = name, root.resolve()
        for folder in ("kernels", "model", "cluster", "tests"):
            if not (self.root / folder).is_dir():
                raise SystemExit(f"{name} is {root}, which has no folder {folder}/: name the root of a checkout")

    def __str__(self) -> str:
        return f"{self.name}: {self.root}, commit {machine.commit(self.root)}"


class Inside:
    """A process that runs a checkout's code (inside.py): one JSON message per line to it, and back."""

    def __init__(self, checkout: Checkout, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.name = checkout.name
        self._process, self._log = process, log
        hello = self.receive()
        if not (checkout.root / "cluster" / "request.py").samefile(hello["file"]):
            raise SystemExit(f"{checkout.name} is {checkout.root}, but its process imports {hello['file']}")
        self.fields: list[str] = hello["fields"]
        """Of its requests, and of what they say about sampling."""

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell it what to do. Raises SystemExit when it has died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._give_up()

    def receive(self) -> Any:
        """Wait for its next message. Raises SystemExit when it has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._give_up()
        return json.loads(line)

    def _give_up(self) -> None:
        status = self._process.wait()
        self._log.seek(0)
        said = "".join(self._log.readlines()[-_SHOWN_LINES:])
        raise SystemExit(f"the process of {self.name} has ended with status {status}; it said last:\n{said}")


@contextmanager
def inside(checkouts: Sequence[Checkout], threads: int) -> Iterator[list[Inside]]:
    """A process for each checkout, with `threads` threads each; they end with the context."""
    with ExitStack() as stack:
        yield [stack.enter_context(_process(checkout, threads)) for checkout in checkouts]


@contextmanager
def _process(checkout: Checkout, threads: int) -> Iterator[Inside]:
    with TemporaryDirectory() as scratch, open(Path(scratch) / "log", "w+", encoding="utf-8") as log:
        links = _link(checkout.root, Path(scratch) / "installed")
        # -S: the hook of an editable install would supply from its own checkout what this one doesn't have
        path = os.pathsep.join([str(links), *site.getsitepackages()])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-S", "-P", str(_INSIDE)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process:
            try:
                yield Inside(checkout, process, log)
            finally:
                process.kill()


def _link(root: Path, links: Path) -> Path:
    (links / "divisi").mkdir(parents=True)
    for package in _PACKAGES:
        if (root / package).is_dir():
            (links / "divisi" / package).symlink_to(root / package)
    (links / "tests").symlink_to(root / "tests")
    return links
