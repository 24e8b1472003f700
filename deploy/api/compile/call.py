"""From a validated body to what the engine gets: prompt ids, sampling, stops and limits resolved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import uuid4

from divisi.cluster.request import Request, Sampling
from divisi.deploy.api.body.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    MtpOptions,
    TokenizeBody,
)
from divisi.deploy.api.body.reasoning import thinking_of
from divisi.deploy.api.body.tools import Tool, offered
from divisi.deploy.api.compile.answer_form import AnswerForms
from divisi.deploy.api.compile.parsing import ParseRule
from divisi.deploy.api.compile.sampling import check_ids, choice_seed, compile_sampling
from divisi.deploy.api.errors import ApiError
from divisi.deploy.api.settings import ApiSettings
from divisi.model.text import TextCodec
from divisi.model.text.conversation import ConversationEncoder
from divisi.model.text.grammar.compiler import GrammarCompiler

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions. A chat answer may use all of the context that its prompt leaves."""
INLINE_CHARS = 8192
"""Longer texts are tokenised in a thread, so that they don't hold up other streams."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Call:
    """One answer to produce: the engine's part, and what the ingress itself does with the answer."""

    request: Request
    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """The stop ids that the client named; only they are reported as `stop_reason`."""
    echo: bool = False
    include_stop: bool = False
    """Whether what ended the answer is part of its text."""
    skip_special: bool = True
    answer_id: str = ""
    """The reply's id; the engine's ids tell its choices apart."""
    parse: ParseRule | None = None
    """What to look for in a chat answer; None where there is nothing but text."""


class Compiler:
    """Turns bodies into calls, or raises ApiError, TemplateError or TokenizerError."""

    def __init__(self, text: TextCodec, settings: ApiSettings, grammars: GrammarCompiler) -> None:
        self._text = text
        self._settings = settings
        self._forms = AnswerForms(text, grammars)
        self._vocab_size = settings.vocab_size or text.tokenizer.vocab_size
        # No text of n bytes has fewer than n / longest tokens; normalisation (NFC) may shrink it before that.
        shrink = 4 if text.tokenizer.has_normalizer else 1
        self._hopeless_bytes = settings.max_model_len * text.tokenizer.longest_token * shrink

    async def chat(self, body: ChatBody) -> list[Call]:
        """The calls of a chat request, one per choice."""
        self._check_model(body)
        asked = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        wanted: int | None = getattr(body, asked)
        thinks = self._forms.thinks
        arguments = body.chat_template_kwargs or {}
        thinking = thinking_of(body.thinking_wish, arguments, thinks=thinks)
        tools = offered(body.tools, body.tool_choice)
        ids = await self._conversation_ids(body, thinking.arguments, tools)
        prompt = self._truncated(body, ids, wanted)
        max_tokens = self._fit("messages", len(prompt), wanted, default=self._settings.max_model_len, asked=asked)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self._check_logprobs("top_logprobs", logprobs)
        self._check_choices("n", body.n or 1)
        parse = self._forms.parse_rule(body, prompt, tools)
        grammar = await self._forms.answer_grammar(body, prompt, parse, thinking, tools)
        answer_id = f"chatcmpl-{uuid4().hex}"
        sampling = await self._sampling(body)
        calls = self._calls(body, sampling, answer_id, prompt, max_tokens, logprobs, grammar, choices=body.n or 1)
        if parse is None:
            return calls
        spans = self._forms.spans(body, parse)
        return [replace(call, parse=parse, request=replace(call.request, spans=spans)) for call in calls]

    async def completion(self, body: CompletionBody) -> list[Call]:
        """One call per prompt and choice, in the order of the prompts."""
        self._check_model(body)
        self._check_logprobs("logprobs", body.logprobs)
        prompts = _prompts(body)
        choices = body.best_of or body.n or 1
        self._check_choices("n" if body.best_of is None else "best_of", choices)
        if len(prompts) * choices > self._settings.max_prompts:
            raise ApiError(
                f"prompt: {len(prompts) * choices} answers in one request ({len(prompts)} prompts, {choices} choices "
                f"each), at most {self._settings.max_prompts} are taken; send them in several requests",
                param="prompt",
            )
        grammar = await self._forms.content_grammar(body)
        answer_id = f"cmpl-{uuid4().hex}"
        # The best are chosen by their log-probabilities, whether or not these are told.
        ranked = body.best_of is not None and body.best_of > (body.n or 1)
        logprobs = 0 if ranked and body.logprobs is None else body.logprobs
        sampling = await self._sampling(body)
        names = ["prompt"] if len(prompts) == 1 else [f"prompt[{index}]" for index in range(len(prompts))]
        calls: list[Call] = []
        for where, ids in zip(names, await self._prompts_ids(body, prompts, names), strict=True):
            kept = self._truncated(body, ids, body.max_tokens)
            max_tokens = self._fit(where, len(kept), body.max_tokens, default=COMPLETION_MAX_TOKENS)
            calls += self._calls(
                body,
                sampling,
                answer_id,
                kept,
                max_tokens,
                logprobs,
                grammar,
                choices=choices,
                first=len(calls),
                echo=body.echo,
            )
        return calls

    async def tokenize(self, body: TokenizeBody) -> list[int]:
        """Token ids of a text or a conversation."""
        if body.model is not None:
            check_model(body.model, self._settings.model_names)
        if body.messages is not None:
            return await self._conversation_ids(body)
        prompt, special = body.prompt or "", body.add_special_tokens is not False
        self._check_hopeless(len(prompt), "prompt")
        return await _off_loop(lambda: self._text.tokenizer.encode(prompt, add_special_tokens=special), len(prompt))

    async def detokenize(self, body: DetokenizeBody) -> str:
        """Text of token ids, special tokens included."""
        if body.model is not None:
            check_model(body.model, self._settings.model_names)
        self._check_ids("tokens", body.tokens)
        return await _off_loop(lambda: self._text.tokenizer.decode(body.tokens, skip_special=False), len(body.tokens))

    async def _conversation_ids(
        self, body: ChatBody | TokenizeBody, extra: Mapping[str, Any] | None = None, tools: Sequence[Tool] = ()
    ) -> list[int]:
        literal = not self._settings.control_tokens_in_messages
        encoder = ConversationEncoder(self._text.chat_template(), self._text.tokenizer, literal=literal)
        arguments: dict[str, Any] = {**(body.chat_template_kwargs or {}), **(extra or {})}
        if tools:
            arguments["tools"] = [tool.plain() for tool in tools]
        continued = isinstance(body, ChatBody) and bool(body.continue_final_message)
        opened = body.add_generation_prompt is not False and not continued
        truncated = isinstance(body, ChatBody) and body.truncate_prompt_tokens is not None

        def tokenise() -> list[int]:
            messages = [message.plain() for message in body.messages or ()]
            rendered = encoder.render(messages, arguments, add_generation_prompt=opened, continued=continued)
            if not truncated:
                self._check_hopeless(len(rendered.text), "messages")
            return encoder.encode(rendered, add_special_tokens=bool(body.add_special_tokens))

        chars = sum(message.chars for message in body.messages or ())
        return await _off_loop(tokenise, chars + len(str(arguments.get("tools", ""))))

    async def _sampling(self, body: GenerationBody) -> Sampling:
        """What the choices of all prompts share."""
        chars = sum(map(len, body.bad_words or ())) + len(body.allowed_token_ids or ())
        return await _off_loop(lambda: compile_sampling(body, self._text, self._vocab_size), chars)

    def _calls(
        self,
        body: GenerationBody,
        sampling: Sampling,
        answer_id: str,
        prompt: list[int],
        max_tokens: int,
        logprobs: int | None,
        grammar: str | None,
        *,
        choices: int,
        first: int = 0,
        echo: bool | None = None,
    ) -> list[Call]:
        """The choices of one prompt, numbered from `first`."""
        named = frozenset(body.stop_token_ids or ())
        prompt_logprobs = _prompt_logprobs(body, logprobs if echo else None, max_tokens)
        self._check_logprobs("prompt_logprobs", prompt_logprobs)
        if (body.min_tokens or 0) > max_tokens:
            raise ApiError(
                f"min_tokens: {body.min_tokens} is more than the {max_tokens} tokens that the answer may have; "
                "lower it, or raise max_tokens",
                param="min_tokens",
            )
        ids = tuple(prompt)
        return [
            Call(
                request=Request(
                    request_id=f"{answer_id}-{index}",
                    prompt=ids,
                    max_tokens=max_tokens,
                    sampling=choice_seed(sampling, index - first),
                    stop_ids=frozenset() if body.ignore_eos else self._text.eos_ids,
                    content_stop_ids=named,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    min_tokens=body.min_tokens or 0,
                    grammar=grammar,
                    max_draft_tokens=self._max_draft_tokens(body.mtp),
                ),
                answer_id=answer_id,
                stops=body.stops,
                stop_token_ids=named,
                echo=bool(echo),
                include_stop=bool(body.include_stop_str_in_output),
                skip_special=body.skip_special_tokens is not False,
            )
            for index in range(first, first + choices)
        ]

    def _max_draft_tokens(self, asked: MtpOptions | None) -> int | None:
        """What the client asks for within the server's limit; None where the server drafts nothing."""
        limit = self._settings.max_draft_tokens
        if not limit:
            return None
        return limit if asked is None or asked.max_draft_tokens is None else min(limit, asked.max_draft_tokens)

    def _truncated(self, body: GenerationBody, prompt: list[int], wanted: int | None) -> list[int]:
        """The last tokens of a prompt, as many as the request keeps."""
        keep = body.truncate_prompt_tokens
        if keep is None:
            return prompt
        room = max(self._settings.max_model_len - max(wanted or 1, 1), 1)
        return prompt[-(room if keep == -1 else keep) :] if keep else []

    async def _prompts_ids(
        self, body: CompletionBody, prompts: Sequence[str | list[int]], names: Sequence[str]
    ) -> list[list[int]]:
        special = body.add_special_tokens is not False
        for prompt, where in zip(prompts, names, strict=True):
            if not isinstance(prompt, str):
                self._check_ids(where, prompt)
            elif body.truncate_prompt_tokens is None:
                self._check_hopeless(len(prompt), where)

        def tokenise() -> list[list[int]]:
            encode = self._text.tokenizer.encode
            return [encode(p, add_special_tokens=special) if isinstance(p, str) else p for p in prompts]

        return await _off_loop(tokenise, sum(map(len, prompts)))

    def _check_ids(self, param: str, ids: Sequence[int]) -> None:
        check_ids(param, ids, self._vocab_size)

    def _check_choices(self, param: str, choices: int) -> None:
        if choices > self._settings.max_n:
            raise ApiError(
                f"{param}: {choices} choices, at most {self._settings.max_n} are made in one request", param=param
            )

    def _check_model(self, body: GenerationBody) -> None:
        check_model(body.model, self._settings.model_names)

    def _check_logprobs(self, param: str, wanted: int | None) -> None:
        limit = self._settings.max_logprobs
        if wanted is not None and wanted > limit:
            raise ApiError(f"{param}: {wanted} is more than the limit of {limit}; ask for fewer", param=param)

    def _check_hopeless(self, chars: int, param: str) -> None:
        """Refuse before tokenising what cannot fit however well it tokenises."""
        if chars > self._hopeless_bytes:
            limit = self._settings.max_model_len
            raise _overlong(
                param, f"{limit} tokens", f"the prompt has {chars} characters, which cannot fit; shorten it"
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
        longest = self._settings.max_prompt_tokens
        if longest is not None and prompt_tokens > longest:
            raise _overlong(param, f"{longest} tokens for a prompt here", f"this one has {prompt_tokens}; shorten it")
        if room < (0 if wanted == 0 else 1):
            raise _overlong(param, f"{limit} tokens", f"the prompt alone has {prompt_tokens}; shorten it")
        if wanted is not None and wanted > room:
            raise _overlong(
                asked,
                f"{limit} tokens",
                f"{prompt_tokens} of the prompt and {wanted} of the answer make {prompt_tokens + wanted}; shorten the "
                f"prompt, or ask for at most {room}",
            )
        return min(default, room) if wanted is None else wanted


def _overlong(param: str, limit: str, found: str) -> ApiError:
    """What doesn't fit the context. LiteLLM knows it by the words, LangChain by the code among them."""
    code = "context_length_exceeded"
    text = f"{param}: this model's maximum context length is {limit}, but {found} ({code})"
    return ApiError(text, param=param, code=code)


def check_model(asked: str, served: Sequence[str]) -> None:
    """Raises ApiError (404) for any name but the served ones."""
    if asked not in served:
        raise ApiError(
            f"the model {asked[:128]!r} does not exist here; this server has {' and '.join(map(repr, served))}",
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


def _prompt_logprobs(body: GenerationBody, echoed: int | None, max_tokens: int) -> int | None:
    """Alternatives to tell per prompt token: for the reply's own field, for the echo, or for want of anything else."""
    asked = [count for count in (body.prompt_logprobs, echoed) if count is not None]
    if not asked:
        return 0 if max_tokens == 0 else None  # the engine's only answer without a token is one about the prompt
    return max(asked)


async def _off_loop(work: Callable[[], ResultT], chars: int) -> ResultT:
    """Tokenising releases the interpreter lock, so a long text goes to a thread and a short one isn't worth it."""
    return work() if chars <= INLINE_CHARS else await asyncio.to_thread(work)
