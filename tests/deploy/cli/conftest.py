"""The API on a socket with a fake engine, and a scripted server for what that engine never says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest

from tests.deploy.api.conftest import engine, shared_engine, text, url

__all__ = ["engine", "shared_engine", "text", "url"]

Reply = Callable[[dict[str, Any]], httpx.Response]


def sse(events: Iterable[dict[str, Any]], *, done: bool = True) -> httpx.Response:
    """A stream of events."""
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + (["data: [DONE]\n\n"] if done else [])
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content="".join(lines).encode())


def delta(**fields: Any) -> dict[str, Any]:
    """One chat event."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def end(reason: str = "stop", tokens: int = 5) -> dict[str, Any]:
    """The last chat event, with its usage."""
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 4}}
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "usage": usage}


class Scripted:
    """A server that answers the n-th POST with the n-th reply; remembers the bodies."""

    def __init__(self, *replies: httpx.Response) -> None:
        self.replies = list(replies)
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "one"}, {"id": "two"}]})
        self.bodies.append(json.loads(request.content))
        return self.replies.pop(0)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url="http://scripted/v1", transport=httpx.MockTransport(self))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
