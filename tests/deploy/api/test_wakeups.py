"""Events that come together are sent together, one SSE event each; what ends an answer loses none before it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, MutableMapping, Sequence
from typing import Any

import pytest

from divisi.cluster.request import EndReason, Request, TokenEvent
from divisi.deploy.api import GangStatus, build_app
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL, SETTINGS

PATH = "/v1/completions"


class Batches:
    """An engine that gives each answer the same batches: all answers' first at one moment, then all their second."""

    def __init__(self, batches: Sequence[Sequence[tuple[int, EndReason | None]]]) -> None:
        self.batches = batches
        self.closed = 0

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[TokenEvent], None]:
        try:
            for batch in self.batches:
                for _ in range(10):  # until every answer waits for its turn, as for a message of the worker
                    await asyncio.sleep(0)
                yield [
                    TokenEvent(request.request_id, () if end == "error" else (token,), None, None, end, "it broke")
                    for token, end in batch
                ]
        finally:
            self.closed += 1

    async def check_ready(self) -> None:
        return

    async def status(self) -> GangStatus:
        return GangStatus(True, "")


async def sends(engine: Batches, text: TextCodec, **fields: object) -> tuple[int, list[bytes]]:
    """The status, and the body piece by piece as it was sent."""
    content = json.dumps({"model": MODEL, "prompt": "hello", "max_tokens": 50, "stream": True} | fields).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": PATH, "query_string": b"",
        "raw_path": PATH.encode(), "root_path": "", "headers": headers, "client": ("a", 1), "server": ("b", 2),
    }  # fmt: skip
    pending = [{"type": "http.request", "body": content, "more_body": False}]
    status, pieces = 0, []

    async def receive() -> MutableMapping[str, Any]:
        if pending:
            return pending.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["body"]:
            pieces.append(message["body"])

    await build_app(engine, text, SETTINGS)(scope, receive, send)
    return status, pieces


def choices(piece: bytes) -> list[dict[str, Any]]:
    chunks = [json.loads(line[6:]) for line in piece.decode().splitlines() if line.startswith("data: {")]
    return [choice for chunk in chunks for choice in chunk.get("choices", ())]


def ids(text: TextCodec, word: str) -> list[int]:
    return text.tokenizer.encode(word, add_special_tokens=False)


async def test_one_send_a_wakeup_with_one_event_a_token(text: TextCodec) -> None:
    (a,), (b,) = ids(text, "a"), ids(text, "b")
    engine = Batches([[(a, None)], [(a, None), (b, None), (a, None)], [(b, None), (b, "length")]])
    status, pieces = await sends(engine, text)
    assert status == 200
    assert [[choice["text"] for choice in choices(piece)] for piece in pieces[:3]] == [
        ["a"],
        ["a", "b", "a"],
        ["b", "b"],
    ]
    assert choices(pieces[2])[-1]["finish_reason"] == "length"
    assert pieces[-1].endswith(b"data: [DONE]\n\n")


async def test_choices_of_one_step_are_sent_together(text: TextCodec) -> None:
    (a,) = ids(text, "a")
    engine = Batches([[(a, None)]] * 5 + [[(a, "length")]])
    _, pieces = await sends(engine, text, n=8)
    assert len(pieces) <= 8, "a piece for each of 6 steps, not for each of 48 tokens"
    texts = [choice for piece in pieces for choice in choices(piece) if choice["text"]]
    assert sorted(choice["index"] for choice in texts) == sorted([*range(8)] * 6)
    assert engine.closed == 8


async def test_a_stop_string_ends_the_answer_within_a_batch(text: TextCodec) -> None:
    tokens = [token for word in ("a", "b", "c", "d") for token in ids(text, word)]
    engine = Batches([[(token, None) for token in tokens], [(tokens[0], "length")]])
    _, pieces = await sends(engine, text, stop="c")
    found = [choice for piece in pieces for choice in choices(piece)]
    assert "".join(choice["text"] for choice in found) == "ab"
    assert found[-1]["finish_reason"] == "stop"
    assert engine.closed == 1


async def test_what_came_before_an_error_is_sent(text: TextCodec) -> None:
    (a,) = ids(text, "a")
    status, pieces = await sends(Batches([[(a, None), (a, None), (a, "error")]]), text)
    assert status == 200
    assert [choice["text"] for piece in pieces for choice in choices(piece)] == ["a", "a"]
    assert b'"error"' in pieces[-1]
    assert b"it broke" in pieces[-1]


async def test_an_error_that_comes_first_has_its_own_status(text: TextCodec) -> None:
    status, pieces = await sends(Batches([[(0, "error")]]), text)
    assert status == 500
    assert len(pieces) == 1


@pytest.mark.parametrize("n", [1, 3])
async def test_a_cancelled_answer_is_an_error(text: TextCodec, n: int) -> None:
    (a,) = ids(text, "a")
    _, pieces = await sends(Batches([[(a, None)], [(a, "cancelled")]]), text, n=n)
    assert b"cancelled the answer" in pieces[-1]
