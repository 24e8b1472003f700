"""Request bodies: the fields that have an effect, each with the bounds that keep it cheap."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from divisi.deploy.api.surface import strip_without_effect

MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_IDS = 256
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TEMPLATE_ARGUMENTS = 16
MAX_ARGUMENT_CHARS = 4096
MAX_PROMPTS = 4096
"""Bound of the schema; ApiSettings.max_prompts is the one that people meet."""
MAX_PROMPT_IDS = 2**20
"""Bound of the schema, lest a hopeless prompt costs the event loop a second; the model's context is the one to meet."""
MAX_INT = 2**31 - 1

# Alternatives of a union are tagged, so that an error is reported for the one that the client meant. Tags begin with
# "<" to tell them from field names when an error's place is spelled out.


def _text_or_list(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    kinds: list[tuple[type, str]] = [(str, "<texts>"), (int, "<ids>"), (list, "<id lists>")]
    return next((kind for type_, kind in kinds if isinstance(first, type_) and not isinstance(first, bool)), None)


def _one_of(kind: Any, expected: str) -> Discriminator:
    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be {expected}")


TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    _one_of(_text_or_list, "a string or a list of strings"),
]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<id lists>")],
    _one_of(_prompt_kind, "a string, a list of strings, a list of token ids, or a list of lists of token ids"),
]


class Body(BaseModel):
    """What every part of a request body shares: exact types, no unknown fields, finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, data: object) -> object:
        neutral: tuple[object, ...] = (None, False)
        return strip_without_effect(data, {"continuous_usage_stats": neutral, "include_obfuscation": neutral})


class GenerationBody(Body):
    """Fields of both generating endpoints."""

    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_INT)
    """0 and -1 are off."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were sent."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true; set it, or leave stream_options out")
        return self


class TextPart(Body):
    """One part of list-typed content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
        _one_of(_text_or_list, "a string or a list of text parts"),
    ]
    name: str | None = Field(default=None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, data: object) -> object:
        # What the openai client sends back when an answer's message is appended to the conversation as it came.
        nothing: tuple[object, ...] = (None, [])
        names = ("tool_calls", "function_call", "refusal", "audio", "annotations", "reasoning", "reasoning_content")
        return strip_without_effect(data, dict.fromkeys(names, nothing))

    def plain(self) -> dict[str, str]:
        """As templates want it: text parts joined by line ends, `developer` under its older name."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content, **named}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_INT)
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=MAX_TEMPLATE_ARGUMENTS)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_arguments(cls, arguments: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        reserved = {"messages", "tools", "documents", "add_generation_prompt", "self", "max_chars"}
        for name, value in (arguments or {}).items():
            if name in reserved or not name.isidentifier():
                raise ValueError(f"{name[:64]!r} cannot be set by chat_template_kwargs; leave it out")
            if not isinstance(value, (str, int, float, NoneType)) or len(str(value)) > MAX_ARGUMENT_CHARS:
                raise ValueError(
                    f"{name[:64]} must be a string, number, boolean or null of at most {MAX_ARGUMENT_CHARS} characters"
                )
        return arguments

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true; set it, or leave top_logprobs out")
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_INT)

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 asks for nothing; send max_tokens of 1 or more, or echo: true")
        return self
