"""Loaded by schemathesis: makes of bodies that the schema allows such as the server can serve.

A schema cannot say what the model is called, how many token ids it has, which fields exclude each other or which of
all strings is a grammar. Nearly every drawn body breaks one such rule and gets a 400 without reaching the model. So
seven in eight of the valid ones are mended where these rules are broken, and stay as drawn otherwise; one in eight
keeps its faults, and what the schema forbids is never touched.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import schemathesis

REPLIES = Path("replies.txt")
LONGEST_ANSWER = 8
"""An answer as long as the context would take seconds."""
MOST_CHOICES = 2
MOST_LOGPROBS = 5
LONGEST_TEXT = 64
"""In characters or ids."""
LONGEST_LIST = 4
"""Of messages, parts, tools or prompts."""
TOKEN_IDS = 256
"""A byte-level vocabulary has at least so many."""
KEPT = ("role", "content", "name", "tool_call_id", "refusal", "reasoning", "thinking_blocks")
"""Of messages; their calls are written anew."""
NO_THINKING = ("reasoning_effort", "thinking_token_budget", "enable_thinking", "thinking")
"""What a model is refused whose template knows no thinking."""
STRUCTURES = ("tools", "response_format", "structured_outputs")
SERVABLE = {"json": {"type": "boolean"}, "regex": "[ab]{1,3}", "choice": ["yes", "no"], "grammar": 'start: "a" | "b"'}
"""What takes the place of drawn grammars, which are arbitrary strings and objects."""

Fields = dict[str, Any]


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change a valid request right before it is sent."""
    if case.meta is None or case.meta.generation.mode.is_negative:
        return
    drawn, path = case.body, case.operation.path
    draw = zlib.crc32(json.dumps([drawn, case.path_parameters], sort_keys=True, default=str).encode())
    if draw % 8 and "model_id" in (case.path_parameters or {}):
        case.path_parameters = {"model_id": os.environ["SERVED_MODEL"]}
    if not isinstance(drawn, dict):
        return
    body = {name: value for name, value in drawn.items() if value is not None}
    if draw % 8:
        body = whole(body)
        mend(path, body, draw // 8)
    if path.endswith("/completions"):
        shorten(body)
    # A null is as good as nothing; half of the bodies keep theirs.
    nulls = {name: None for name, value in drawn.items() if value is None and draw // 64 % 2}
    case.body = nulls | body


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Note path, status and kind of each reply, one a line."""
    kind = response.headers.get("content-type", ["none"])[0].partition(";")[0]
    if kind == "text/event-stream" and not response.content.endswith(b"data: [DONE]\n\n"):
        kind += " in part"  # it reads no more than 20 events of a stream
    with REPLIES.open("a", encoding="utf-8") as replies:
        replies.write(f"{case.operation.path} {response.status_code} {kind}\n")


def whole(value: Any) -> Any:
    """The value with integers written as such: to a schema 1.0 is an integer, to the server it isn't."""
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and abs(value) < 2**53 and value == int(value) else value


def shorten(body: Fields) -> None:
    """Bound the number and the length of answers, which breaks no rule of the server but takes long."""
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name, 0) > LONGEST_ANSWER:
            body[name] = 1 + body[name] % LONGEST_ANSWER
    if not {"max_tokens", "max_completion_tokens"} & body.keys():
        body["max_tokens"] = LONGEST_ANSWER
    for name in ("n", "best_of"):
        if body.get(name, 0) > MOST_CHOICES:
            body[name] = MOST_CHOICES


def mend(path: str, body: Fields, draw: int) -> None:
    """Take from a body what breaks a rule that the schema cannot tell; `draw` decides where there is a choice."""
    if "model" in body:
        body["model"] = os.environ["SERVED_MODEL"]
    if "messages" in body:
        mend_conversation(body)
    if "prompt" in body:
        body["prompt"] = mended_prompt(body["prompt"])
    if path == "/tokenize":
        mend_choice(body)
    elif path == "/detokenize":
        body["tokens"] = mended_ids(body["tokens"])
    else:
        shorten(body)
        mend_sampling(body)
        mend_reply(body, draw)
        mend_structure(body, draw)


def mend_choice(body: Fields) -> None:
    """Either a text or a conversation."""
    if "prompt" in body:
        body.pop("messages", None)
    elif "messages" not in body:
        body["prompt"] = "a text"


def mended_ids(ids: list[int]) -> list[int]:
    return [token_id % TOKEN_IDS for token_id in ids[:LONGEST_TEXT]]


def mended_prompt(prompt: Any) -> Any:
    """A prompt of the same kind that has tokens, few enough for the context, and all of the vocabulary."""
    if isinstance(prompt, str):
        return prompt[:LONGEST_TEXT] or "a"
    if isinstance(prompt[0], int):
        return mended_ids(prompt)
    return [mended_prompt(item) for item in prompt[:LONGEST_LIST]]


def mend_conversation(body: Fields) -> None:
    """Leave each message what its role has, and the template what it takes."""
    messages = []
    for drawn in body["messages"][:LONGEST_LIST]:
        message = {name: drawn[name] for name in KEPT if drawn.get(name) is not None}
        if (content := message.get("content")) is not None:
            message["content"] = content[: LONGEST_TEXT if isinstance(content, str) else LONGEST_LIST]
        if message["role"] == "assistant" and drawn.get("tool_calls"):
            function = {"name": "look", "arguments": '{"at": "this"}'}
            message["tool_calls"] = [{"id": "call", "type": "function", "function": function}]
        messages.append(message)
    body["messages"] = messages
    if body.get("chat_template_kwargs"):
        body["chat_template_kwargs"] = {"style": "brief"}


def mend_sampling(body: Fields) -> None:
    """Token ids of the vocabulary, and a least length that the longest one allows."""
    for name in ("allowed_token_ids", "stop_token_ids"):
        if name in body:
            body[name] = mended_ids(body[name])
    if "logit_bias" in body:
        body["logit_bias"] = {str(int(key) % TOKEN_IDS): bias for key, bias in body["logit_bias"].items()}
    longest = body.get("max_completion_tokens", body.get("max_tokens", LONGEST_ANSWER))
    if body.get("min_tokens", 0) > longest:
        body["min_tokens"] = longest


def mend_reply(body: Fields, draw: int) -> None:
    """Of the fields about the reply that exclude each other, one."""
    for name in ("top_logprobs", "prompt_logprobs", "logprobs"):
        if type(body.get(name)) is int and body[name] > MOST_LOGPROBS:
            body[name] %= MOST_LOGPROBS + 1
    if "top_logprobs" in body:
        body["logprobs"] = True
    if "stream_options" in body or draw // 6 % 2:  # of booleans that may be absent, few are drawn true
        body["stream"] = True
    if body.get("stream"):
        body.pop("prompt_logprobs", None)
    if body.get("best_of", MOST_CHOICES) < body.get("n", 1) or body.get("stream"):
        body.pop("best_of", None)
    if body.get("max_tokens") == 0:
        body["echo"] = True
    if body.get("truncate_prompt_tokens") == 0:
        body["truncate_prompt_tokens"] = 1
    if body.get("continue_final_message"):
        body.pop("add_generation_prompt", None)
        body["messages"][-1]["content"] = "It begins"
    for name in NO_THINKING:
        body.pop(name, None)


def mend_structure(body: Fields, draw: int) -> None:
    """At most one structure, of grammars that exist."""
    asked = [name for name in STRUCTURES if name in body]
    for name in asked:
        if name != asked[draw % len(asked)]:
            del body[name]
    if "structured_outputs" in body:
        wanted = body["structured_outputs"]
        name = next((name for name in SERVABLE if wanted.get(name) is not None), None)
        body["structured_outputs"] = {"json_object": True} if name is None else {name: SERVABLE[name]}
    wrapped = body.get("response_format", {}).get("json_schema")
    if wrapped is not None:
        body["response_format"] = body["response_format"] | {"json_schema": wrapped | {"schema": SERVABLE["json"]}}
    mend_tools(body)


def mend_tools(body: Fields) -> None:
    """Each tool with a name of its own and arguments of a kind that exists, and a choice among them."""
    tools = [
        {"type": "function", "function": {**tool["function"], "name": f"tool_{index}", "parameters": {}}}
        for index, tool in enumerate(body.get("tools", [])[:LONGEST_LIST])
    ]
    if not tools:
        body.pop("tool_choice", None)
        return
    body["tools"] = tools
    if isinstance(body.get("tool_choice"), dict):
        body["tool_choice"] = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
