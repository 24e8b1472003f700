"""The demo model over HTTP with and without drafts: the same replies, whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from divisi.deploy.api import ApiSettings
from divisi.model.demo import checkpoint_dir
from divisi.model.demo.evaluation.cases import make_cases
from divisi.model.text import TextCodec
from tests.deploy.api.fake_engine import serve
from tests.support.local_client import local_client

SKILLS = ("call", "strict call", "chat", "thinking chat")
FIELDS: list[dict[str, Any]] = [
    {},
    {"n": 2, "top_p": 0.9},
    {"frequency_penalty": 0.4, "repetition_penalty": 1.1, "min_tokens": 6},
    {"stop": ["e", "."], "mtp": {"max_draft_tokens": 1}},
    {"bad_words": ["the", "you"], "logit_bias": {"40": 2}, "mtp": {"max_draft_tokens": 0}},
    {"top_k": 12, "min_p": 0.02, "mtp": {"tool_call_draft_tokens": 3}},
    {"response_format": {"type": "json_object"}, "max_tokens": 30},
]


def bodies(each: int) -> Iterator[dict[str, Any]]:
    """Conversations of every skill, every second one greedy."""
    number = 0
    for skill in SKILLS:
        for case in make_cases(skill, each, seed=2):
            fields = FIELDS[number % len(FIELDS)]
            body = {"model": "demo", "messages": case.messages, "max_tokens": 60, "logprobs": True, "top_logprobs": 2}
            body |= {"temperature": 0.8 * (number % 2), "seed": number}
            number += 1
            if case.thinks:
                body |= {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 9}
            if case.tools and "response_format" not in fields:
                strict = {"strict": True} if case.strict else {}
                body["tools"] = [{"type": "function", "function": tool["function"] | strict} for tool in case.tools]
            yield body | fields


def replies(asked: list[dict[str, Any]], **drafting: Any) -> list[dict[str, Any]]:
    """What a server says, to many at once."""
    drafts = drafting.get("max_draft_tokens", 0)
    settings = ApiSettings(
        served_model_name="demo", max_model_len=2048, max_draft_tokens=drafts, model_dir=str(checkpoint_dir())
    )
    text = TextCodec.load(checkpoint_dir())
    with (
        local_client(checkpoint_dir(), **drafting) as engine,
        serve(engine, text, settings) as url,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(body: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = httpx.post(url + "/v1/chat/completions", json=body, timeout=120).json()
            return found

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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("adaptive", [False, pytest.param(True, marks=pytest.mark.verify)])
def test_replies_are_those_of_a_server_without_drafts(
    adaptive: bool, full_tier: bool, record_result: Callable[[str, object], None]
) -> None:
    asked = list(bodies(50 if full_tier else 4))
    expected = replies(asked)
    found = replies(asked, max_draft_tokens=5, adaptive_drafts=adaptive)
    counts = [0, 0]
    for body, want, got in zip(asked, expected, found, strict=True):
        assert shown(got) == shown(want), body
        if "error" in want:
            continue
        for ours, theirs in zip(got["choices"], want["choices"], strict=True):
            pairs = zip(ours["logprobs"]["content"], theirs["logprobs"]["content"], strict=True)
            assert all(abs(a["logprob"] - b["logprob"]) < 1e-4 for a, b in pairs)
        details = got["usage"]["completion_tokens_details"]
        drafted = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
        if body.get("mtp") == {"max_draft_tokens": 0}:
            assert drafted == (0, 0)
        counts = [total + count for total, count in zip(counts, drafted, strict=True)]
    record_result("accepted and rejected drafts", counts)
    assert counts[0] > len(asked)
