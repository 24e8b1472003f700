from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from divisi.model.text.grammar.compiler import GrammarCompiler
from divisi.model.text.grammar.process import GrammarProcess
from divisi.model.text.grammar.reader import GrammarError

ENDLESS: dict[str, Any] = {
    "allOf": [{"type": "string", "pattern": f".*{chr(97 + n)}.{{{n}}}{chr(98 + n)}"} for n in range(24)]
}
"""Each further pattern doubles the time: about two minutes."""


@pytest.fixture(scope="module")
def process(model_dir: Path) -> Iterator[GrammarProcess]:
    made = GrammarProcess(str(model_dir), cpu_s=0.5)
    yield made
    made.close()


def test_grammars_of_every_notation(process: GrammarProcess) -> None:
    assert process.read("start: /a/") == "start: /a/"
    assert process.read('root ::= "a"', "grammar").endswith('start: "a"\n')
    assert process.read("start: <think>", "grammar") != "start: <think>"
    for bad, words in (("start: /(/", "unclosed group"), ('start: "é" <nobody>', "none of this model's")):
        with pytest.raises(GrammarError, match=words):
            process.read(bad, "grammar")


@pytest.mark.parametrize(
    "ask", [lambda compiler: compiler.json_schema(ENDLESS), lambda compiler: compiler.text("\n" * 65_000)]
)
def test_a_grammar_without_end_is_ended(process: GrammarProcess, ask: Callable[[GrammarCompiler], str]) -> None:
    compiler = GrammarCompiler(process)
    with pytest.raises(GrammarError, match=r"more than 0\.5 s of processor time"):
        ask(compiler)
    assert compiler.regex("a+")


def test_a_process_that_dies_is_replaced(process: GrammarProcess) -> None:
    """While it reads, and while nobody asks."""
    process.read("start: /b/")
    os.kill(process._child.pid, signal.SIGSTOP)
    answers: list[str] = []
    thread = Thread(target=lambda: answers.append(process.read("start: /c/")))
    thread.start()
    os.kill(process._child.pid, signal.SIGKILL)
    thread.join(30)
    assert answers == ["start: /c/"]
    os.kill(process._child.pid, signal.SIGKILL)
    assert process.read("start: /d/") == "start: /d/"


def test_what_was_read_is_not_read_again(process: GrammarProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    process.read("start: /e/")
    monkeypatch.setattr(process, "_ask", lambda *_: pytest.fail("asked again"))
    assert process.read("start: /e/") == "start: /e/"


def test_what_was_refused_is_refused_at_once_the_next_time(
    process: GrammarProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GrammarError) as first:
        process.read("start: /(/")
    monkeypatch.setattr(process, "_ask", lambda *_: pytest.fail("it is read again"))
    with pytest.raises(GrammarError) as second:
        process.read("start: /(/")
    assert str(first.value) == str(second.value)


def test_the_process_ends_with_its_parent(model_dir: Path) -> None:
    made = GrammarProcess(str(model_dir))
    child = made._child
    assert child.stdin is not None
    child.stdin.close()  # as when the parent is killed
    assert child.wait(30) == 0
    made = GrammarProcess(str(model_dir))
    child = made._child
    del made
    assert child.returncode is not None, "a reader that nobody has any more takes its process along"


def test_a_terminal_interrupt_is_the_parent_s_to_handle(process: GrammarProcess) -> None:
    process.read("start: /f/")
    os.kill(process._child.pid, signal.SIGINT)
    assert process.read("start: /g/") == "start: /g/"
    assert process._child.poll() is None
