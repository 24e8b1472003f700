"""What the demo asks: a question, a request that needs a tool, and what comes of the tool's result."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
from rich.console import Console

from divisi.deploy.cli.chat.conversation import Conversation, Reply
from divisi.deploy.cli.chat.screen import Screen
from divisi.deploy.cli.chat.session import receive_answer
from divisi.deploy.cli.remote import RemoteError
from divisi.deploy.demo.server import DemoFailed

QUESTION = "Who are you?"
REQUEST = "What is the weather in Lisbon?"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def get_weather(city: str) -> str:
    """A stand-in for a real service."""
    return json.dumps({"temperature": 10 + len(city), "sky": "clear"})


class Talk:
    """Streams answers to the terminal. Raises DemoFailed where one isn't what it should be."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client = client
        self._model = model
        self._screen = Screen(Console(highlight=False), time.monotonic)

    def ask(self) -> None:
        """A question, answered in words."""
        answer = self._answer(self._begin(QUESTION))
        if not answer.content.strip() or answer.finish_reason != "stop":
            raise DemoFailed(f"no whole answer: finish_reason {answer.finish_reason!r}, {answer.content!r}")

    def call_a_tool(self) -> None:
        """A request for which the model calls a tool, and an answer from the tool's result."""
        conversation = self._begin(REQUEST)
        conversation.tools = [TIME, WEATHER]
        answer = self._answer(conversation)
        if answer.finish_reason != "tool_calls" or [call.name for call in answer.calls] != ["get_weather"]:
            raise DemoFailed(f"the model should have called get_weather, but it wrote {answer.message()}")
        call = answer.calls[0]
        try:
            result = get_weather(**json.loads(call.arguments))
        except (TypeError, ValueError) as error:
            raise DemoFailed(f"get_weather cannot take {call.arguments}: {error}") from error
        self._screen.note(f"{call.name} returns {result}")
        conversation.give(call, result)
        told = self._answer(conversation)
        if told.calls or not told.content.strip():
            raise DemoFailed(f"the model should have told the result, but it wrote {told.message()}")

    def _begin(self, text: str) -> Conversation:
        print(f"> {text}", flush=True)
        conversation = Conversation(self._model, params={"temperature": 0, "max_tokens": 96})
        conversation.ask(text)
        return conversation

    def _answer(self, conversation: Conversation) -> Reply:
        answer = Reply()
        self._screen.begin()
        try:
            receive_answer(self._client, conversation, answer, self._screen.show)
        except RemoteError as error:
            raise DemoFailed(str(error)) from error
        self._screen.end(answer)
        conversation.messages.append(answer.message())
        return answer
