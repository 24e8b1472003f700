"""Runs in the openai client's own environment: five turns of `parse` and `stream`, whose messages go back as objects.

Arguments: base URL, model name. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

CITIES = ["Lisbon", "Oslo", "Paris", "Rome", "Berlin"]


class get_weather(BaseModel):
    """Get the weather in a city."""

    city: str


class get_time(BaseModel):
    """Get the time in a city."""

    city: str


class Weather(BaseModel):
    """What a reply may be held to."""

    sky: Literal["clear", "cloudy"]
    warm: bool


def main() -> None:
    """Five turns: each a question, a call, its result, an answer."""
    base_url, model = sys.argv[1:]
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
    tools = [openai.pydantic_function_tool(get_time), openai.pydantic_function_tool(get_weather)]
    messages: list = []
    calls, answers = [], []

    def turn(streamed: bool):
        fields = {"model": model, "messages": messages, "tools": tools, "temperature": 0, "max_tokens": 128}
        if not streamed:
            return client.chat.completions.parse(**fields).choices[0].message
        with client.chat.completions.stream(**fields) as stream:
            return stream.get_final_completion().choices[0].message

    for index, city in enumerate(CITIES):
        messages.append({"role": "user", "content": f"What is the weather in {city}?"})
        message = turn(index % 2 == 1)
        messages.append(message)
        for call in message.tool_calls or []:
            calls.append([type(call.function.parsed_arguments).__name__, call.function.parsed_arguments.city])
            result = json.dumps({"temperature": 10 + len(city), "sky": "clear"})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        answer = turn(index % 2 == 0)
        messages.append(answer)
        answers.append(answer.content)
    asked = [{"role": "user", "content": "What is the weather in Lisbon?"}]
    parsed = client.chat.completions.parse(model=model, messages=asked, response_format=Weather, max_tokens=200)
    whole = client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=40)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    stopped = client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=40, stop=stop)
    print(
        json.dumps(
            {
                "calls": calls,
                "answers": answers,
                "schema": parsed.choices[0].message.parsed is not None,
                "stopped": stopped.choices[0].message.content == text[: text.index(stop)],
            }
        )
    )


main()
