"""What the demo model is asked over HTTP, with each field that drafts could disturb; how two replies are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from divisi.model.demo.evaluation.cases import make_cases

SKILLS = ("call", "strict call", "chat", "thinking chat")
FIELDS: list[dict[str, Any]] = [
    {},
    {"n": 2, "top_p": 0.9},
    {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.1, "min_tokens": 6},
    {"stop": ["e", "."], "mtp": {"max_draft_tokens": 1}},
    {"bad_words": ["the", "you"], "logit_bias": {"40": 2}, "mtp": {"max_draft_tokens": 0}},
    {"top_k": 12, "min_p": 0.02, "mtp": {"tool_call_draft_tokens": 3}},
    {"response_format": {"type": "json_object"}, "max_tokens": 30},
    {"allowed_token_ids": [*range(10, 700)], "stop_token_ids": [44], "mtp": {"max_draft_tokens": 2}},
]
"""By turns."""


def bodies(each: int) -> Iterator[dict[str, Any]]:
    """So many conversations of every skill, temperatures 0 and 1."""
    number = 0
    for skill in SKILLS:
        for case in make_cases(skill, each, seed=2):
            fields = FIELDS[number % len(FIELDS)]
            body = {"model": "divisi-demo", "messages": case.messages, "max_tokens": 60}
            body |= {"logprobs": True, "top_logprobs": 2, "seed": number}
            body["temperature"] = number // len(FIELDS) % 2
            number += 1
            if case.thinks:
                body |= {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 9}
            if case.tools and "response_format" not in fields and "allowed_token_ids" not in fields:
                strict = {"strict": True} if case.strict else {}
                body["tools"] = [{"type": "function", "function": tool["function"] | strict} for tool in case.tools]
            yield body | fields


def ask_all(url: str, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Eight at a time."""

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = httpx.post(url + "/v1/chat/completions", json=body, timeout=120).json()
        return found

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, asked))


def shown(reply: dict[str, Any]) -> list[Any]:
    """Of a reply what does not depend on its time."""
    if "error" in reply:  # bad words can leave a grammar no way on
        return [reply["error"]["message"]]
    choices = []
    for choice in reply["choices"]:
        message = choice["message"]
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        ends = choice["finish_reason"], choice["stop_reason"]
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        choices.append([message["content"], message.get("reasoning"), calls, ends, tokens])
    usage = reply["usage"]
    return [*choices, usage["completion_tokens"], usage["completion_tokens_details"]["reasoning_tokens"]]


def compare(
    asked: Sequence[Mapping[str, Any]], wanted: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]
) -> tuple[int, int]:
    """Fails where a reply differs from the one without drafts; returns how many drafts stood, and how many didn't."""
    counts = Counter[str]()
    for body, want, got in zip(asked, wanted, found, strict=True):
        assert shown(got) == shown(want), body
        if "error" in want:
            counts["errors"] += 1
            continue
        for ours, theirs in zip(got["choices"], want["choices"], strict=True):
            pairs = zip(ours["logprobs"]["content"], theirs["logprobs"]["content"], strict=True)
            assert all(abs(a["logprob"] - b["logprob"]) < 1e-4 for a, b in pairs)
        details = got["usage"]["completion_tokens_details"]
        drafted = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
        if body.get("mtp") == {"max_draft_tokens": 0}:
            assert drafted == (0, 0)
        counts["accepted"] += drafted[0]
        counts["rejected"] += drafted[1]
    assert counts["errors"] <= len(asked) // 5, "too few whole answers to say anything"
    return counts["accepted"], counts["rejected"]
