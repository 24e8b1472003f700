"""Asks a server, several requests at once, and compares its answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from divisi.model.demo.evaluation.cases import Case

_LONGEST_ANSWER = 400
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A case and what came."""

    case: Case
    text: str
    calls: list[tuple[str, Any]]
    thought: str
    problem: str
    """Why it is wrong; empty if it is right."""


async def ask_all(
    url: str, model: str, cases: Sequence[Case], at_once: int, progress: Callable[[], None]
) -> list[Verdict]:
    """Ask everything, greedily, `at_once` requests at a time. Raises httpx.HTTPError where the server refuses."""
    gate = asyncio.Semaphore(at_once)

    async def one(case: Case) -> Verdict:
        async with gate:
            verdict = await _ask(client, model, case)
        progress()
        return verdict

    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S) as client:
        return list(await asyncio.gather(*(one(case) for case in cases)))


async def _ask(client: httpx.AsyncClient, model: str, case: Case) -> Verdict:
    body: dict[str, Any] = {
        "model": model,
        "messages": [_as_sent(message) for message in case.messages],
        "temperature": 0,
        "max_tokens": _LONGEST_ANSWER,
    }
    if case.tools:
        body["tools"] = [_strictly(tool) for tool in case.tools] if case.strict else case.tools
    if case.thinks:
        body["chat_template_kwargs"] = {"enable_thinking": True}
    while (reply := await client.post("/v1/chat/completions", json=body)).status_code == 429:
        await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
    reply.raise_for_status()
    message = reply.json()["choices"][0]["message"]
    calls = [
        (call["function"]["name"], _loaded(call["function"]["arguments"])) for call in message.get("tool_calls") or []
    ]
    text, thought = message.get("content") or "", message.get("reasoning") or ""
    return Verdict(case, text, calls, thought, _problem(case, text, calls, thought))


def _strictly(tool: dict[str, Any]) -> dict[str, Any]:
    """As openai's client sends a strict tool."""
    function = tool["function"]
    parameters = function["parameters"] | {"additionalProperties": False}
    return tool | {"function": function | {"parameters": parameters, "strict": True}}


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments travel as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls, "content": message["content"] or None}


def _loaded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _problem(case: Case, text: str, calls: list[tuple[str, Any]], thought: str) -> str:
    if case.thinks != bool(thought):
        return "does not think" if case.thinks else "thinks unasked"
    if case.skill == "abstention":
        return "calls a tool" if calls else ""
    if calls != case.calls:
        return "other calls"
    return "other text" if text.strip() != case.text else ""
