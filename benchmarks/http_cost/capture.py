"""The events that Divisi sends, taken from its ASGI application without a server; and whether an answer is right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope

from divisi.benchmarks.http_cost.servers import MODEL, PATH
from divisi.model.text import Tokenizer


def body(max_tokens: int) -> dict[str, object]:
    """The request of every stream."""
    messages = [{"role": "user", "content": "Say something."}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "stream": True, "temperature": 0}


def scope_of(content: bytes) -> tuple[Scope, Receive]:
    """One POST as uvicorn would hand it to an application; the client stays until it is answered."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(content)).encode()))
    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return scope, receive


async def capture(app: ASGIApp, max_tokens: int) -> list[bytes]:
    """The pieces of a response's body, one per `send`; what comes after the last token is part of the last."""
    pieces: list[bytes] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
        elif message["body"]:
            pieces.append(message["body"])

    scope, receive = scope_of(json.dumps(body(max_tokens)).encode())
    await app(scope, receive, send)
    return pieces


def check_answer(response: bytes, token_ids: tuple[int, ...], tokenizer: Tokenizer, who: str) -> None:
    """Compare the text of a stream with that of the token ids. Exits where they differ."""
    text, ended = "", False
    for line in response.splitlines():
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            text += choices[0]["delta"].get("content", "") if choices else ""
        ended = ended or line == b"data: [DONE]"
    expected = tokenizer.decode(token_ids)
    if text != expected or not ended:
        raise SystemExit(f"{who} sends a wrong answer: {text[:200]!r}, expected {expected[:200]!r}, ended: {ended}")
