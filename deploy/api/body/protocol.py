"""Request bodies: the fields that have an effect, each with the bounds that keep it cheap."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Tag, model_validator

from divisi.deploy.api.body.base import Body, one_of, text_or_list
from divisi.deploy.api.body.messages import Messages
from divisi.deploy.api.body.reasoning import Effort, ThinkingSwitch, ThinkingWish
from divisi.deploy.api.body.sampling_fields import MAX_INT, SamplingFields, TokenId
from divisi.deploy.api.body.structured import ResponseFormat, StructuredOutputs
from divisi.deploy.api.body.surface import strip_without_effect
from divisi.deploy.api.body.tools import ToolChoice, Tools

MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_IDS = 256
MAX_TEMPLATE_ARGUMENTS = 16
MAX_ARGUMENT_CHARS = 4096
MAX_PROMPTS = 4096
"""Bound of the schema; ApiSettings.max_prompts is the one that people meet."""
MAX_PROMPT_IDS = 2**20
"""Bound of the schema, lest a hopeless prompt costs the event loop a second; the model's context is the one to meet."""
MAX_CHOICES = 128
"""Bound of the schema for `n` and `best_of`; ApiSettings.max_n is the one that people meet."""


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    kinds: list[tuple[type, str]] = [(str, "<texts>"), (int, "<ids>"), (list, "<id lists>")]
    return next((kind for type_, kind in kinds if isinstance(first, type_) and not isinstance(first, bool)), None)


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    one_of(text_or_list, "a string or a list of strings"),
]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<id lists>")],
    one_of(_prompt_kind, "a string, a list of strings, a list of token ids, or a list of lists of token ids"),
]


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Whether a last chunk tells the token counts."""
    continuous_usage_stats: bool = False
    """Whether every chunk tells the token counts so far."""

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, data: object) -> object:
        return strip_without_effect(data, {"include_obfuscation": (None, False)})


class UsageOptions(Body):
    """OpenRouter's form of asking for the token counts, which a whole answer has anyway."""

    include: bool = False
    """As `stream_options.include_usage`."""


class MtpOptions(Body):
    """How far multi-token prediction may run ahead. It changes no token, only the time."""

    max_draft_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    """Most tokens drafted in a step; 0 is off, None as the server does. More than its limit counts as that."""
    tool_call_draft_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    """The same inside of tool calls, where None is 0."""


class GenerationBody(SamplingFields):
    """Fields of both generating endpoints."""

    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_INT)
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=MAX_INT)
    """Tokens of the prompt to keep, its last ones; -1 for as many as the context holds."""
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    usage: UsageOptions | None = None
    return_token_ids: bool | None = None
    mtp: MtpOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were sent."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        asked = self.stream_options is not None and self.stream_options.include_usage
        return asked or (self.usage is not None and self.usage.include)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has a usage."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @model_validator(mode="after")
    def _check_streaming(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true; set it, or leave stream_options out")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed; leave it out, or set stream: false")
        return self


def _check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    reserved = {"messages", "tools", "documents", "add_generation_prompt", "self", "max_chars"}
    for name, value in arguments.items():
        if name in reserved or not name.isidentifier():
            raise ValueError(f"{name[:64]!r} cannot be set by chat_template_kwargs; leave it out")
        if not isinstance(value, (str, int, float, NoneType)) or len(str(value)) > MAX_ARGUMENT_CHARS:
            raise ValueError(
                f"{name[:64]} must be a string, number, boolean or null of at most {MAX_ARGUMENT_CHARS} characters"
            )
    return arguments


TemplateArguments = Annotated[
    dict[str, Any], Field(max_length=MAX_TEMPLATE_ARGUMENTS), AfterValidator(_check_arguments)
]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_INT)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Whether the answer goes on with the last message, in place of a new one."""
    chat_template_kwargs: TemplateArguments | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    """As in `chat_template_kwargs`, where it wins."""
    thinking: ThinkingSwitch | None = None
    """The same in Anthropic's form; `enable_thinking` and `thinking_token_budget` win over it."""
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0, le=MAX_INT)
    """Tokens after which the thinking part is closed."""

    @property
    def thinking_wish(self) -> ThinkingWish:
        """What its fields say about thinking, however they say it."""
        form = self.thinking or ThinkingSwitch(type="adaptive")
        budget = form.budget_tokens if self.thinking_token_budget is None else self.thinking_token_budget
        switch = form.on if self.enable_thinking is None else self.enable_thinking
        return ThinkingWish(self.reasoning_effort, switch, budget)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true; set it, or leave top_logprobs out")
        return self

    @model_validator(mode="after")
    def _check_continuation(self) -> ChatBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message: the answer cannot both go on with the last message and open a new one; "
                "set add_generation_prompt: false, or leave one of the two out"
            )
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_INT)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Answers to produce, of which the `n` likeliest per token are told."""

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionBody:
        wanted = self.n or 1
        if self.best_of is not None and self.best_of < wanted:
            raise ValueError(f"best_of is {self.best_of} but n is {wanted}; best_of must be n or more")
        if self.best_of is not None and self.best_of > wanted and self.stream:
            raise ValueError("best_of: the best answers are known at the end; set stream: false, or best_of equal to n")
        return self

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 asks for nothing; send max_tokens of 1 or more, or echo: true")
        return self


class TokenizeBody(Body):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = Field(default=None, min_length=1, max_length=512)
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """None: added to a text; a template brings its own."""
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class GangBody(Body):
    """POST /v1/admin/gang."""

    expert_shards: int = Field(ge=1)
    """As many are to serve. Each loads what it lacks while the others serve."""


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = Field(default=None, min_length=1, max_length=512)
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]
