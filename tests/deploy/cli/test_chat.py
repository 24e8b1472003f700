"""`divisi chat`: one question from the command line, and a conversation."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from divisi.deploy.cli import main
from divisi.deploy.cli.chat.conversation import Conversation
from divisi.deploy.cli.chat.screen import Screen, harmless
from divisi.deploy.cli.chat.session import Session
from tests.deploy.api.fake_engine import FakeEngine
from tests.deploy.cli.conftest import Scripted, delta, end, sse

READY = "\x1b[?2004h"  # the prompt asks the terminal for bracketed paste
SAID = "Hello, world! 你好 👩‍🚀 naïve"


def ask(monkeypatch: pytest.MonkeyPatch, url: str, *arguments: str, piped: bytes = b"") -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
    return main(["chat", "--base-url", f"{url}/v1", *arguments])


def test_one_question(
    url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--system", "Be brief.", "-p", "temperature=0.25", "-p", 'stop=["never"]', "-p", "max_tokens=50")
    assert ask(monkeypatch, url, "Explain:", *flags, piped=b"some text\n") == 0
    captured = capsys.readouterr()
    assert captured.out == SAID + "\n"
    assert captured.err == ""
    (request,) = engine.requests
    prompt = engine.tokenizer.decode(request.prompt, skip_special=False)
    assert "system\nBe brief." in prompt
    assert "user\nExplain:\n\nsome text<" in prompt
    assert (request.sampling.temperature, request.max_tokens) == (0.25, 50)


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["Hi", "--model", "none"], 1, "does not exist"),
        (["Hi", "-p", "top_p=9"], 1, "top_p"),
        (["Hi", "-p", "temperature"], 2, "NAME=VALUE"),
        (["Hi", "-p", "model=x"], 2, "the chat sets this itself"),
        (["Hi", "--tools", "/nowhere"], 2, "/nowhere"),
        (["Hi", "--base-url", "localhost:8000"], 2, "no scheme"),
        (["Hi", "--base-url", "http://127.0.0.1:9/v1"], 1, "divisi serve"),
        (["Hi", "--base-url", "{url}"], 1, "/v1"),
        (["Hi", "--api-key", "@/nowhere"], 2, "/nowhere"),
        (["Hi", "--api-key", "клю"], 2, "printable ASCII"),
        (["Hi", "-p", "temperature=NaN"], 1, "temperature"),
        ([], 2, "nothing to ask"),
    ],
)
def test_mistakes_say_what_to_do(
    arguments: list[str],
    status: int,
    part: str,
    url: str,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ask(monkeypatch, url, *(argument.replace("{url}", url) for argument in arguments)) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("divisi: error: " if status == 2 else "divisi: failed: ")
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_stream_that_breaks_off_is_a_failure(
    url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = engine.say(SAID)
    engine.script = lambda request: [*said(request)[:4], RuntimeError("boom")]
    assert ask(monkeypatch, url, "Hi") == 1
    captured = capsys.readouterr()
    assert SAID.startswith(captured.out.strip())
    assert "broke off" in captured.err


class Person:
    """Types given lines, then leaves."""

    def __init__(self, *lines: str) -> None:
        self.lines: Iterator[str] = iter(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        try:
            return next(self.lines)
        except StopIteration:
            raise EOFError from None


def talk(server: Scripted, *lines: str, tools: list[dict[str, Any]] | None = None) -> tuple[str, Conversation, Person]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system="standard")
    conversation = Conversation("one", tools=tools or [])
    person = Person(*lines)
    with server.client() as client:
        Session(client, conversation, Screen(console, lambda: 0.0), person).run()
    return out.getvalue(), conversation, person


def test_turns_carry_the_conversation() -> None:
    server = Scripted(sse([delta(content="Hi "), delta(content="there"), end()]), sse([delta(content="Bye"), end()]))
    out, _, _ = talk(server, "Hello", "", "Again")
    assert "Hi there" in out
    assert "7 tokens in, 5 out" in out
    roles = [(message["role"], message["content"]) for message in server.bodies[1]["messages"]]
    assert roles == [("user", "Hello"), ("assistant", "Hi there"), ("user", "Again")]


def test_reasoning_is_dimmed_and_stays_out_of_the_next_request() -> None:
    thought = sse([delta(reasoning="Let me see."), delta(content="Four."), end()])
    server = Scripted(thought, sse([end()]))
    out, _, _ = talk(server, "2 + 2?", "Sure?")
    dimmed = out[: out.index("Let me see.")].rsplit("\x1b[", 1)[1]
    assert dimmed.split("m")[0].split(";")[0] == "2"  # SGR 2: faint
    assert "Let me see" not in json.dumps(server.bodies[1])


def test_commands() -> None:
    server = Scripted(*(sse([delta(content="ok"), end()]) for _ in range(4)))
    lines = (
        "first", "/params temperature=0.5 stop=x", "second", "/params temperature=", "/system Be kind.", "/model two",
        "third", "/reset", "/system", "fourth", "/model three", "/nonsense", "/params bad", "/help", "/quit", "never",
    )  # fmt: skip
    out, conversation, _ = talk(server, *lines)
    first, second, third, fourth = server.bodies
    assert "temperature" not in first
    assert (second["temperature"], second["stop"], len(second["messages"])) == (0.5, "x", 3)
    assert "temperature" not in third
    assert third["model"] == "two"
    assert [message["role"] for message in third["messages"]] == ["system", "user"]
    assert [message["content"] for message in fourth["messages"]] == ["fourth"]
    assert conversation.model == "two"
    assert "has no three; it has: one, two" in out
    assert "/nonsense is no command" in out
    assert "NAME=VALUE" in out
    assert "/reset" in out


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (httpx.Response(429, json={"error": {"message": "full"}}, headers={"retry-after": "3"}), "try again in 3 s"),
        (httpx.Response(401, json={"error": {"message": "no key"}}), "--api-key"),
        (httpx.Response(503, text="starting"), "starting"),
        (sse([delta(content="half")], done=False), "ended before its end"),
        (sse([delta(content="half"), {"error": {"message": "a shard died"}}]), "a shard died"),
    ],
)
def test_a_failed_turn_leaves_nothing_behind(reply: httpx.Response, part: str) -> None:
    server = Scripted(reply, sse([delta(content="fine"), end()]))
    out, _, _ = talk(server, "one", "two")
    assert part in out.replace("\n", " ")
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["two"]


def call_events() -> list[dict[str, Any]]:
    """Two parallel calls, their arguments in pieces."""
    return [
        delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "weather", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"city": "Pa'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": 'ris", "days": [1, 2]}'}}]),
        delta(tool_calls=[{"index": 1, "id": "b", "function": {"name": "clock", "arguments": "{}"}}]),
        end("tool_calls"),
    ]


def test_tool_calls_are_shown_and_answered_by_the_person() -> None:
    server = Scripted(sse(call_events()), sse([delta(content="Sunny at noon."), end()]))
    tools = [{"type": "function", "function": {"name": name}} for name in ("weather", "clock")]
    out, _, person = talk(server, "Weather?", "sunny", "12:00", tools=tools)
    plain = "".join(piece.partition("m")[2] for piece in ("m" + out).split("\x1b["))
    assert "call weather\n  city: Paris\n  days: [1, 2]\ncall clock\n" in plain
    assert person.prompts[1:3] == ["result of weather> ", "result of clock> "]
    assert server.bodies[0]["tools"] == tools
    _, assistant, first, second = server.bodies[1]["messages"]
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["weather", "clock"]
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris", "days": [1, 2]}
    assert first == {"role": "tool", "tool_call_id": "a", "content": "sunny"}
    assert second == {"role": "tool", "tool_call_id": "b", "content": "12:00"}


def test_leaving_at_a_tools_prompt_forgets_the_turn() -> None:
    server = Scripted(sse(call_events()))
    _, conversation, _ = talk(server, "Weather?", "sunny")
    assert conversation.messages == []


def test_control_characters_are_not_obeyed() -> None:
    assert harmless("a\x1b[2Jb\tc\nd\x07\x9b") == "a␛[2Jb\tc\nd␇�"
    out, _, _ = talk(Scripted(sse([delta(content="x\x1b]0;title\x07y"), end()])), "go")
    assert "x␛]0;title␇y" in out


def test_tools_file(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    for text in ('{"not": "a list"}', "{}"):
        (tmp_path / "tools.json").write_text(text)
        assert ask(monkeypatch, url, "Hi", "--tools", str(tmp_path / "tools.json")) == 2


def test_what_is_piped_need_not_be_unicode(url: str, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    assert ask(monkeypatch, url, "Review:", piped=b"caf\xe9") == 0
    assert "caf\N{REPLACEMENT CHARACTER}" in engine.tokenizer.decode(engine.requests[0].prompt)
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "--base-url", f"{url}/v1", "Hi"]) == 0


@pytest.fixture
def terminal(url: str, engine: FakeEngine) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`divisi chat` as a person starts it, and the other end of its terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "divisi.deploy.cli", "chat", "--base-url", f"{url}/v1"]
    environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    yield process, ours
    process.kill()
    process.wait(10)
    os.close(ours)


def read_until(terminal: int, wanted: str) -> str:
    seen = b""
    while wanted.encode() not in seen:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            piece = b""
        assert piece, f"{wanted!r} never came; seen: {seen.decode(errors='replace')}"
        seen += piece
    return seen.decode(errors="replace")


def test_ctrl_c_stops_the_answer_and_not_the_program(
    terminal: tuple[subprocess.Popen[bytes], int], engine: FakeEngine
) -> None:
    process, keys = terminal
    engine.held, engine.script = "after", engine.say(SAID, group=4)
    read_until(keys, READY)
    os.write(keys, b"Hi\r")
    assert engine.first_sent.wait(20)
    read_until(keys, "Hel")
    process.send_signal(signal.SIGINT)
    assert "[stopped" in read_until(keys, READY)
    assert engine.closed.wait(10), "the request went on after Ctrl-C"
    engine.held = None
    os.write(keys, b"Again\r")
    assert "naïve" in read_until(keys, READY)
    os.write(keys, b"/quit\r")
    assert process.wait(20) == 0
    assert len(engine.requests) == 2
