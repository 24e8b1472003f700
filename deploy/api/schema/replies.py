"""Replies as models, for the OpenAPI document and for tests. Serving writes them directly, see reply/chat.py."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


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


class CompletionDetails(Reply):
    """What completion tokens were for."""

    reasoning_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None
    max_draft_tokens: int | None = None


class Usage(Reply):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails | None = None


class PromptLogprob(Reply):
    """One candidate at one place of a prompt; its rank where it is known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


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


class CalledFunction(Reply):
    """A function that the model calls, with the arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Reply):
    """One call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Reply):
    """The answer; `content` is null where there is nothing but tool calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


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
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
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
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Reply):
    """The body of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Tokenized(Reply):
    """The body of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Reply):
    """The body of /detokenize."""

    prompt: str


class GangState(Reply):
    """How many expert shards a gang has."""

    expert_shards: int
    wanted: int
    waits_for: list[str]
    seconds: dict[str, float]
    bytes_read: int
    why: str
