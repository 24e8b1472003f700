"""Keys, timeouts, the end of the server and the request log, over HTTP with an engine that plays a script."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from divisi.cluster.request import TokenEvent
from divisi.deploy.api.schema.replies import ErrorBody
from divisi.deploy.limits import Gate, GateLimits, KeyFile
from divisi.deploy.limits.keys import hash_key, new_key
from divisi.deploy.logs import JsonFormatter
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, serve

TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi there, secret words"}


class Server:
    """A server with a gate and a key file of its own."""

    def __init__(self, text: TextCodec, folder: Path, limits: GateLimits, metrics_open: bool = True) -> None:
        self.engine = FakeEngine(text.tokenizer)
        self.key = new_key()
        self.keys = folder / "keys.yaml"
        entry = f"- {{name: team, hash: '{hash_key(self.key)}', max_concurrent: 2, tokens_per_minute: 600}}\n"
        self.keys.write_text(f"keys:\n{entry}", encoding="utf-8")
        self.gate = Gate(limits)
        settings = SETTINGS.model_copy(update={"metrics_open": metrics_open})
        self._stack = ExitStack()
        self.url = self._stack.enter_context(serve(self.engine, text, settings, self.gate, KeyFile(self.keys)))
        self.http = self._stack.enter_context(httpx.Client(base_url=self.url, timeout=20, headers=self.bearer))

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def server(text: TextCodec, tmp_path: Path) -> Iterator[Server]:
    opened = Server(text, tmp_path, GateLimits(max_requests=8, request_timeout_s=1.5))
    yield opened
    opened.close()
    assert (opened.gate.answers, opened.gate.queued_tokens, opened.engine.open) == (0, 0, 0)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic dXNlcjpwdw==", "missing_api_key"),
        ("Bearer nonsense", "invalid_api_key"),
        ("Bearer " + "x" * 5000, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/nowhere"])
def test_without_a_valid_key(server: Server, header: str | None, code: str, path: str) -> None:
    headers = {} if header is None else {"Authorization": header}
    reply = httpx.post(server.url + path, json=TEXT, headers=headers)
    assert reply.status_code == 401
    assert ErrorBody.model_validate_json(reply.content).error.code == code
    assert reply.headers["www-authenticate"].startswith("Bearer ")
    assert "x-request-id" in reply.headers
    assert not server.engine.requests


def test_what_is_open_and_what_a_key_opens(server: Server) -> None:
    for path in ("/health", "/v1/health/live", "/v1/health/ready", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    assert httpx.get(server.url + "/openapi.json").status_code == 401
    assert server.http.get("/v1/models").status_code == 200
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as right:
        assert right.completions.create(**TEXT).choices[0].finish_reason


def test_metrics_can_be_closed(text: TextCodec, tmp_path: Path) -> None:
    server = Server(text, tmp_path, GateLimits(), metrics_open=False)
    try:
        assert httpx.get(server.url + "/metrics").status_code == 401
        assert server.http.get("/metrics").status_code == 200
    finally:
        server.close()


def test_a_keys_tokens_run_out(server: Server) -> None:
    statuses = []
    for _ in range(100):
        reply = server.http.post("/v1/completions", json=TEXT | {"max_tokens": 16})
        statuses.append(reply.status_code)
        if reply.status_code == 429:
            break
    assert set(statuses) == {200, 429}
    assert reply.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize("held", ["before", "after"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stopping", [False, True])
def test_answers_that_last_too_long_are_ended(server: Server, held: str, stream: bool, stopping: bool) -> None:
    server.engine.held = held
    if stopping:
        threading.Timer(0.1, lambda: server.engine.loop.call_soon_threadsafe(server.gate.end_all_in, 0.0)).start()
    begin = time.monotonic()
    reply = server.http.post("/v1/completions", json=TEXT | {"stream": stream})
    assert time.monotonic() - begin < 5
    code, status = ("shutting_down", 503) if stopping else ("request_timeout", 504)
    if held == "after" and stream:
        assert reply.status_code == 200
        last = [line for line in reply.text.split("\n\n") if line][-1].removeprefix("data: ")
    else:
        assert reply.status_code == status
        last = reply.text
    assert ErrorBody.model_validate_json(last).error.code == code
    assert server.engine.all_closed(5), "the engine still works on it"


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("test"))
    log = logging.getLogger("divisi.deploy.api.middleware.request_log")
    log.addHandler(handler)
    former, _ = log.level, log.setLevel(logging.INFO)
    yield stream
    log.setLevel(former)
    log.removeHandler(handler)


def test_one_line_per_request_without_content(server: Server, log_lines: io.StringIO) -> None:
    reply = server.http.post("/v1/completions", json=TEXT | {"max_tokens": 3}, headers={"X-Request-Id": "mine-1"})
    assert reply.status_code == 200
    httpx.post(server.url + "/v1/completions", json=TEXT)
    server.http.get("/health")
    until = time.monotonic() + 5
    while log_lines.getvalue().count("\n") < 2 and time.monotonic() < until:
        time.sleep(0.01)
    first, second = map(json.loads, log_lines.getvalue().splitlines())
    assert first["request_id"] == "mine-1"
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/completions", 200)
    assert (first["key"], first["completion_tokens"], first["finish_reasons"]) == ("team", 3, ["length"])
    assert first["prompt_tokens"] == len(server.engine.requests[0].prompt)
    assert 0 <= first["first_token_s"] <= first["duration_s"] < 5
    assert (second["status"], second["key"]) == (401, None)
    assert server.key not in log_lines.getvalue()
    assert "secret" not in log_lines.getvalue()


async def test_a_burst_at_ten_times_the_rate(text: TextCodec) -> None:
    """Ten times what it serves is offered: no answer that was let in waits for another, the rest is refused.

    Counts, not times: how long a request takes beside 300 others on a busy machine says nothing of the gate.
    ``tests/e2e/test_overload.py`` measures the waits on a real server.
    """
    from divisi.deploy.api import build_app

    engine, at_once = FakeEngine(text.tokenizer), 4
    running, peak = 0, 0

    async def generate(request: Any) -> Any:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        for _ in range(9):
            await asyncio.sleep(0.04)
            yield [TokenEvent(request.request_id, (40,), None)]
        running -= 1
        yield [TokenEvent(request.request_id, (40,), None, finish_reason="length")]

    engine.generate = generate  # type: ignore[method-assign]
    gate = Gate(GateLimits(max_requests=at_once, retry_after_s=77))
    transport = httpx.ASGITransport(build_app(engine, text, SETTINGS, gate))
    served, waits = 0, []

    async def ask(http: httpx.AsyncClient) -> None:
        nonlocal served
        reply = await http.post("/v1/completions", json=TEXT | {"max_tokens": 10})
        if reply.status_code == 429:
            waits.append(int(reply.headers["retry-after"]))
        else:
            assert reply.status_code == 200
            served += 1

    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for _ in range(5):
            await ask(http)
        async with asyncio.TaskGroup() as group:
            for _ in range(300):
                group.create_task(ask(http))
                await asyncio.sleep(0.009)
    assert served + len(waits) == 305
    assert served >= 5 + 15
    assert peak == at_once
    assert waits
    assert 77 not in waits, "the rate was not measured"
    assert (gate.answers, gate.queued_tokens) == (0, 0)
