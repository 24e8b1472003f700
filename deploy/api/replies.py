"""Replies as models, for the OpenAPI document and for tests. Serving writes them directly, see chat.py."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class Reply(BaseModel):
    """What all replies share."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Reply):
    """The body of every error."""

    error: ErrorDetail


class Usage(Reply):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenEntry(Reply):
    """One token of a chat answer with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ContentEntry(TokenEntry):
    """The chosen token and the best ones beside it."""

    top_logprobs: list[TokenEntry]


class ChatLogprobs(Reply):
    """Log-probabilities of a chat answer."""

    content: list[ContentEntry]
    refusal: None


class AssistantMessage(Reply):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    """One chat answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(Reply):
    """The body of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(Reply):
    """Log-probabilities of a completion, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Reply):
    """The body of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
