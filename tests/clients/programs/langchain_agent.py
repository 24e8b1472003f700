"""Runs in LangChain's own environment: a tool, a schema in each way, a stream, a stop string, an overlong prompt.

Arguments: base URL, model name. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "What is the weather in Lisbon?"


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return json.dumps({"temperature": 16, "sky": "clear"})


@tool
def get_time(city: str) -> str:
    """Get the time in a city."""
    return "12:00"


class Weather(BaseModel):
    """The weather."""

    sky: Literal["clear", "cloudy"]
    warm: bool


def main() -> None:
    """Call everything, and say what was seen."""
    base_url, model = sys.argv[1:]
    chat = ChatOpenAI(model=model, base_url=base_url, api_key="none", temperature=0, max_tokens=128, max_retries=0)
    bound = chat.bind_tools([get_time, get_weather])
    messages = [HumanMessage(QUESTION)]
    calls = []
    for streamed in (False, True):
        asked = bound.invoke(messages)
        if streamed:
            chunks = list(bound.stream(messages))
            asked = chunks[0]
            for chunk in chunks[1:]:
                asked += chunk
        messages.append(asked)
        for call in asked.tool_calls:
            calls.append([call["name"], call["args"].get("city")])
            result = {"get_weather": get_weather, "get_time": get_time}[call["name"]].invoke(call["args"])
            messages.append(ToolMessage(result, tool_call_id=call["id"]))
        messages.append(bound.invoke(messages))
        messages.append(HumanMessage(QUESTION))
    seen = {"calls": calls}
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(Weather, method=method).invoke(QUESTION)
        seen[method] = isinstance(found, Weather)
    text = chat.invoke(QUESTION).content
    stop = text[len(text) // 2 :][:3]
    seen["stopped"] = chat.invoke(QUESTION, stop=[stop]).content == text[: text.index(stop)]
    try:
        chat.invoke("long " * 50_000)
    except Exception as error:  # noqa: BLE001 - which it is, is what is asked
        seen["overlong"] = [kind.__name__ for kind in type(error).__mro__]
    print(json.dumps(seen))


main()
