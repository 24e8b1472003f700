"""From a validated body to what the engine gets: prompt ids, sampling, stops and limits resolved."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from divisi.cluster.request import Request, Sampling
from divisi.deploy.api.errors import ApiError
from divisi.deploy.api.protocol import ChatBody, CompletionBody, GenerationBody
from divisi.deploy.api.settings import ApiSettings
from divisi.model.text import TextCodec

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions. A chat answer may use all of the context that its prompt leaves."""
INLINE_CHARS = 8192
"""Longer texts are tokenised in a thread, so that they don't hold up other streams."""


@dataclass(frozen=True, slots=True)
class Call:
    """One answer to produce: the engine's part, and what the ingress itself does with the answer."""

    request: Request
    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """The stop ids that the client named; only they are reported as `stop_reason`."""
    echo: bool = False


class Compiler:
    """Turns bodies into calls, or raises ApiError, TemplateError or TokenizerError."""

    def __init__(self, text: TextCodec, settings: ApiSettings) -> None:
        self._text = text
        self._settings = settings
        # No text of n bytes has fewer than n / longest tokens; normalisation (NFC) may shrink it before that.
        shrink = 4 if text.tokenizer.has_normalizer else 1
        self._hopeless_bytes = settings.max_model_len * text.tokenizer.longest_token * shrink

    async def chat(self, body: ChatBody) -> Call:
        """The one call of a chat request."""
        self._check_model(body)
        template = self._text.chat_template()
        messages = [message.plain() for message in body.messages]
        arguments = body.chat_template_kwargs or {}

        def tokenise() -> list[int]:
            rendered = template.render(messages, **arguments)
            self._check_hopeless(len(rendered), "messages")
            return self._text.tokenizer.encode(rendered, add_special_tokens=False)

        prompt = await _off_loop(tokenise, sum(len(message["content"]) for message in messages))
        asked = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        wanted: int | None = getattr(body, asked)
        max_tokens = self._fit("messages", len(prompt), wanted, default=self._settings.max_model_len, asked=asked)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self._check_logprobs("top_logprobs", logprobs)
        return self._call(body, f"chatcmpl-{uuid4().hex}", prompt, max_tokens, logprobs)

    async def completion(self, body: CompletionBody) -> list[Call]:
        """One call per prompt, in the order of the prompts."""
        self._check_model(body)
        self._check_logprobs("logprobs", body.logprobs)
        prompts = _prompts(body)
        if len(prompts) > self._settings.max_prompts:
            raise ApiError(
                f"prompt: {len(prompts)} prompts in one request, at most {self._settings.max_prompts} are taken; "
                "send them in several requests",
                param="prompt",
            )
        stem = f"cmpl-{uuid4().hex}"
        calls = []
        for index, prompt in enumerate(prompts):
            where = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
            ids = await self._prompt_ids(prompt, where)
            max_tokens = self._fit(where, len(ids), body.max_tokens, default=COMPLETION_MAX_TOKENS)
            request_id = stem if len(prompts) == 1 else f"{stem}-{index}"
            calls.append(self._call(body, request_id, ids, max_tokens, body.logprobs, echo=bool(body.echo)))
        return calls

    def _call(
        self,
        body: GenerationBody,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        logprobs: int | None,
        *,
        echo: bool = False,
    ) -> Call:
        named = frozenset(body.stop_token_ids or ())
        prompt_logprobs = logprobs if echo else None
        if max_tokens == 0 and prompt_logprobs is None:
            prompt_logprobs = 0  # the engine's only answer without a token is one about the prompt
        request = Request(
            request_id=request_id,
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            sampling=self._sampling(body),
            stop_ids=named if body.ignore_eos else named | self._text.eos_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        return Call(request, stops=body.stops, stop_token_ids=named, echo=echo)

    def _sampling(self, body: GenerationBody) -> Sampling:
        defaults = self._text.sampling
        return Sampling(
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_k=defaults.top_k if body.top_k is None else max(body.top_k, 0),
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        )

    async def _prompt_ids(self, prompt: str | list[int], where: str) -> list[int]:
        if isinstance(prompt, str):
            self._check_hopeless(len(prompt), where)
            return await _off_loop(lambda: self._text.tokenizer.encode(prompt), len(prompt))
        vocab_size = self._settings.vocab_size or self._text.tokenizer.vocab_size
        if (highest := max(prompt)) >= vocab_size:
            raise ApiError(
                f"{where}: token id {highest} is outside the vocabulary of {vocab_size}; send ids below it",
                param=where,
            )
        return prompt

    def _check_model(self, body: GenerationBody) -> None:
        check_model(body.model, self._settings.served_model_name)

    def _check_logprobs(self, param: str, wanted: int | None) -> None:
        limit = self._settings.max_logprobs
        if wanted is not None and wanted > limit:
            raise ApiError(f"{param}: {wanted} is more than the limit of {limit}; ask for fewer", param=param)

    def _check_hopeless(self, chars: int, param: str) -> None:
        """Refuse before tokenising what cannot fit however well it tokenises."""
        if chars > self._hopeless_bytes:
            limit = self._settings.max_model_len
            raise ApiError(
                f"{param}: this model's context is {limit} tokens, but the prompt has {chars} characters, "
                "which cannot fit; shorten it",
                param=param,
                code="context_length_exceeded",
            )

    def _fit(
        self, param: str, prompt_tokens: int, wanted: int | None, *, default: int, asked: str = "max_tokens"
    ) -> int:
        """Tokens to generate at most; ApiError where prompt and answer don't fit the context.

        `param` and `asked` name the fields of the prompt and of `wanted`.
        """
        limit = self._settings.max_model_len
        room = limit - prompt_tokens
        if prompt_tokens == 0:
            raise ApiError(f"{param}: the prompt has no tokens; send a text", param=param, code="empty_prompt")
        if room < (0 if wanted == 0 else 1):
            raise ApiError(
                f"{param}: this model's context is {limit} tokens, but the prompt alone has {prompt_tokens}; "
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > room:
            raise ApiError(
                f"{asked}: this model's context is {limit} tokens, but {prompt_tokens} of the prompt and {wanted} "
                f"of the answer make {prompt_tokens + wanted}; shorten the prompt or ask for at most {room}",
                param=asked,
                code="context_length_exceeded",
            )
        return min(default, room) if wanted is None else wanted


def check_model(asked: str, served: str) -> None:
    """Raises ApiError (404) for any name but the served one."""
    if asked != served:
        raise ApiError(
            f"the model {asked[:128]!r} does not exist here; this server has {served!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _prompts(body: CompletionBody) -> Sequence[str | list[int]]:
    items: Sequence[str | int | list[int]] = body.prompt
    if isinstance(items, str):
        return [items]
    ids = [item for item in items if isinstance(item, int)]  # validation leaves all of the items ids, or none
    return [ids] if ids else [item for item in items if not isinstance(item, int)]


async def _off_loop(work: Callable[[], list[int]], chars: int) -> list[int]:
    """Tokenising releases the interpreter lock, so a long text goes to a thread and a short one isn't worth it."""
    return work() if chars <= INLINE_CHARS else await asyncio.to_thread(work)
