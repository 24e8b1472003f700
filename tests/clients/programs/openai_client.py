"""Runs in the openai client's own environment: every way in which people call a server with it.

Arguments: base URL, model name. Prints one JSON object of what was seen; a wrong answer is an AssertionError.
"""

from __future__ import annotations

import asyncio
import json
import sys

import openai

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count to three."}]
LENGTH = 12
GREEDY = {"temperature": 0, "max_tokens": LENGTH, "extra_body": {"ignore_eos": True}}


def plain(client: openai.OpenAI, model: str) -> str:
    """Whole answers of both endpoints; returns the chat answer's text."""
    assert [entry.id for entry in client.models.list()] == [model]
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    assert answer.usage.completion_tokens == LENGTH
    assert answer.choices[0].finish_reason == "length"
    scored = client.completions.create(model=model, prompt="one two three", logprobs=2, **GREEDY)
    assert len(scored.choices[0].logprobs.token_logprobs) == LENGTH
    return answer.choices[0].message.content


def streamed(client: openai.OpenAI, model: str) -> str:
    """The raw stream of the chat endpoint."""
    text, usage = "", None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options=options, **GREEDY
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert usage is not None
    assert usage.completion_tokens == LENGTH
    return text


def stop_in(text: str) -> str:
    """A piece of a greedy answer to stop it at: the streaming helper refuses answers that ended by length."""
    return text[len(text) // 2 :][:3]


def cut(text: str) -> str:
    """What is left of a greedy answer that stops there."""
    return text[: text.index(stop_in(text))]


def helped(client: openai.OpenAI, model: str, text: str) -> str:
    """The client's own streaming helper, which assembles the answer from events."""
    with client.chat.completions.stream(model=model, messages=MESSAGES, stop=stop_in(text), **GREEDY) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert final.choices[0].finish_reason == "stop"
    return final.choices[0].message.content


async def concurrent(base_url: str, model: str, stop: str) -> list[str]:
    """Eight asynchronous calls at once, half of them through the streaming helper."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:

        async def whole() -> str:
            answer = await client.chat.completions.create(model=model, messages=MESSAGES, stop=stop, **GREEDY)
            return answer.choices[0].message.content

        async def stream() -> str:
            async with client.chat.completions.stream(model=model, messages=MESSAGES, stop=stop, **GREEDY) as events:
                async for _ in events:
                    pass
                return (await events.get_final_completion()).choices[0].message.content

        return list(await asyncio.gather(*(call() for call in [whole, stream] * 4)))


def refused(client: openai.OpenAI, model: str) -> list[str]:
    """Mistakes come back as the client's own error classes."""
    seen = []
    for wrong in ({"model": "no-such-model"}, {"model": model, "top_p": 7}, {"model": model, "extra_body": {"x": 1}}):
        try:
            client.chat.completions.create(**{"messages": MESSAGES, "max_tokens": 1} | wrong)
        except openai.APIStatusError as error:
            seen.append(type(error).__name__)
    return seen


def main() -> None:
    """Call everything, and say what was seen."""
    base_url, model = sys.argv[1:]
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60) as client:
        whole = plain(client, model)
        assert streamed(client, model) == whole
        texts = [cut(whole), helped(client, model, whole)]
        errors = refused(client, model)
    texts += asyncio.run(concurrent(base_url, model, stop_in(whole)))
    print(json.dumps({"texts": texts, "errors": errors}))


main()
