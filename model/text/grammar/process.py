"""Reads grammars in a process of its own. Nothing else can stop a library that has lost itself in a grammar.

llguidance takes time without bound over some schemas (`allOf` of patterns doubles it with each), and its GBNF reader
over some texts, in Python. The process gives each grammar an allowance of processor time, and the system ends it when
that is spent: the verdict depends on the work alone, not on how busy the machine is. It ends with its parent, too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import signal
import subprocess
import sys
import weakref
from threading import Lock

from divisi.model.text.codec import TextCodec
from divisi.model.text.grammar.reader import GrammarError, GrammarReader, Notation

log = logging.getLogger(__name__)

CPU_S = 5.0
"""Processor time that one grammar may take."""
_WALL_S = 60.0
"""For a process that is not getting any: time to start, read the tokenizer and answer."""
_KEPT = 128
"""Grammars that need not be read again, refused ones too: else one that takes its time takes it each time."""
_FAILS = "the grammar library fails on it; simplify it"


class GrammarProcess:
    """A `Reader` for one model, safe to call from several threads. They take turns."""

    def __init__(self, model_dir: str, cpu_s: float = CPU_S) -> None:
        """Returns at once; the process reads the model's tokenizer in the meantime."""
        self._command = [sys.executable, "-P", "-m", __name__, model_dir, str(cpu_s)]
        self._cpu_s = cpu_s
        self._turn = Lock()
        self._kept: dict[tuple[str, Notation], str | GrammarError] = {}
        self._start()

    def read(self, grammar: str, notation: Notation = "llguidance") -> str:
        """See `Reader`; also raises GrammarError for a grammar that takes more than its time, or ends the process."""
        with self._turn:
            if (grammar, notation) not in self._kept:
                found = self._try(grammar, notation)
                if len(self._kept) == _KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[grammar, notation] = found
            kept = self._kept[grammar, notation]
        if isinstance(kept, GrammarError):
            raise GrammarError(str(kept))
        return kept

    def close(self) -> None:
        """End the process."""
        self._ended()

    def _start(self) -> None:
        self._child = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ended = weakref.finalize(self, _end, self._child)

    def _try(self, grammar: str, notation: Notation) -> str | GrammarError:
        """What to keep of a grammar. Raises GrammarError where it may not be the grammar's fault."""
        try:
            return self._ask(grammar, notation)
        except GrammarError as error:
            if str(error) == _FAILS:
                raise
            return error

    def _ask(self, grammar: str, notation: Notation) -> str:
        question = json.dumps([grammar, notation]).encode() + b"\n"
        for _ in range(2):  # a process that ended for no reason of this grammar's has a successor
            answer = self._exchange(question)
            if answer.endswith(b"\n"):
                read, complaint = json.loads(answer)
                if complaint is not None:
                    raise GrammarError(complaint)
                return str(read)
            if self._restart() == -signal.SIGPROF:
                raise GrammarError(f"it takes more than {self._cpu_s:g} s of processor time; simplify it")
        raise GrammarError(_FAILS)

    def _exchange(self, question: bytes) -> bytes:
        """The answer's line; cut where the process ended."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(question)
            stdin.flush()
        except BrokenPipeError:
            return b""
        poller = select.poll()
        poller.register(stdout, select.POLLIN)
        return stdout.readline() if poller.poll(_WALL_S * 1000) else b""

    def _restart(self) -> int:
        """Replace the process; the exit status of the old one, once it has ended by itself or is ended."""
        child = self._child
        try:
            status = child.wait(1.0)
        except subprocess.TimeoutExpired:
            status = 0
        self._ended()
        log.warning("the process that reads grammars ended with status %d; starting another", status)
        self._start()
        return status


def _end(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    child.kill()
    child.wait()


def main(model_dir: str, cpu_s: float) -> None:
    """Answer one line with another until there are no more: `[grammar, notation]` with `[grammar, complaint]`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's: the parent decides
    reader = GrammarReader.of(TextCodec.load(model_dir), model_dir)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal ends the process, in whatever code it is
        answer = _answer(reader, *json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(reader: GrammarReader, grammar: str, notation: Notation) -> tuple[str | None, str | None]:
    try:
        return reader.read(grammar, notation), None
    except GrammarError as error:
        return None, str(error)
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        log.error("the grammar library failed: %r", error)
        return None, _FAILS


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
