"""Events of streamed answers as models, for the OpenAPI document and for tests. Serving writes them directly."""

from __future__ import annotations

from typing import Literal

from divisi.deploy.api.schema.replies import ChatLogprobs, CompletionLogprobs, FinishReason, Reply, Usage


class FunctionDelta(Reply):
    """A piece of a function call; the first has the name."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Reply):
    """A piece of call `index`; the first has its id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Reply):
    """What an event adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Reply):
    """What an event adds to choice `index`."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(Reply):
    """One event of /v1/chat/completions; the last of a stream with `include_usage` has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChunkChoice(Reply):
    """What an event adds to choice `index`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChunk(Reply):
    """One event of /v1/completions; the last of a stream with `include_usage` has no choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
