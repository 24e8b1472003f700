"""Load for a server whose numbers are then compared with the client's own, and queries to a Prometheus."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from divisi.deploy.monitoring.prometheus import answer_of

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class Answered:
    """One answer as its client saw it."""

    slice: str
    first_s: float
    total_s: float
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


def ask(
    client: httpx.Client,
    model: str,
    number: int,
    max_tokens: int,
    headers: dict[str, str] | None = None,
    ignore_eos: bool = False,
) -> Answered:
    """One streamed chat answer; every third has tools. With `ignore_eos` it has `max_tokens`."""
    tools = number % 3 == 0
    body: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": f"What is the weather in town {number}?"}],
        "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}, "seed": number,
        "return_token_ids": True, "ignore_eos": ignore_eos,
    }  # fmt: skip
    if tools:
        body["tools"] = [TOOL]
    begin, first, usage, reason = time.perf_counter(), None, None, ""
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if first is None and choice.get("token_ids"):  # a call is shown only once its name is whole
                    first = time.perf_counter()
                reason = choice["finish_reason"] or reason
    assert usage is not None
    end = time.perf_counter()
    found = "tools" if tools else "chat"
    return Answered(
        found, (first or end) - begin, end - begin, usage["prompt_tokens"], usage["completion_tokens"], reason
    )


def load(url: str, model: str, count: int, at_once: int, max_tokens: int) -> list[Answered]:
    """So many answers, some at once."""
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=0)  # anew each: any replica may get it
    with httpx.Client(base_url=url, timeout=120, limits=limits) as client, ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda number: ask(client, model, number, max_tokens), range(count)))


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, query: str) -> list[tuple[dict[str, str], float]]:
        """The samples of a query, now."""
        reply = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=20)
        return [(entry["metric"], float(entry["value"][1])) for entry in answer_of(reply.text)]

    def value(self, query: str) -> float:
        """The only one; 0 where there is none."""
        found = self.query(query)
        assert len(found) <= 1, found
        return found[0][1] if found else 0.0

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {labels["alertname"] for labels, _ in self.query('ALERTS{alertstate="firing"}')}


def wait_for(condition: Callable[[], bool], timeout_s: float) -> float:
    """Wait until the condition holds; the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, f"not within {timeout_s} s"
        threading.Event().wait(0.2)
    return time.monotonic() - begin


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
