"""Runs in Pydantic AI's own environment: an agent with tools, its history sent back, a stream, and typed output.

Arguments: base URL, model name. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the weather in Lisbon?"
CALLS: list = []


class Weather(BaseModel):
    """The weather."""

    sky: Literal["clear", "cloudy"]
    warm: bool


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    CALLS.append(["get_weather", city])
    return json.dumps({"temperature": 16, "sky": "clear"})


def get_time(city: str) -> str:
    """Get the time in a city."""
    CALLS.append(["get_time", city])
    return "12:00"


async def streamed(agent: Agent, history: list) -> str:
    """The answer of a streamed run that goes on with a conversation."""
    async with agent.run_stream(QUESTION, message_history=history) as run:
        return await run.get_output()


def main() -> None:
    """Run everything, and say what was seen."""
    base_url, name = sys.argv[1:]
    model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=base_url, api_key="none"))
    settings = {"temperature": 0, "max_tokens": 128}
    agent = Agent(model, tools=[get_time, get_weather], model_settings=settings)
    first = agent.run_sync(QUESTION)
    second = asyncio.run(streamed(agent, first.all_messages()))
    seen: dict = {"calls": CALLS, "answers": [first.output, second]}
    for way, wanted in (("tool", Weather), ("native", NativeOutput(Weather))):
        output = Agent(model, output_type=wanted, model_settings=settings).run_sync(QUESTION).output
        seen[way] = isinstance(output, Weather)
    text = Agent(model, model_settings=settings).run_sync(QUESTION).output
    stop = text[len(text) // 2 :][:3]
    stopped = Agent(model, model_settings={**settings, "stop_sequences": [stop]}).run_sync(QUESTION).output
    print(json.dumps(seen | {"stopped": stopped == text[: text.index(stop)]}))


main()
