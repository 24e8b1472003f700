"""How /v1/completions spells an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from divisi.deploy.api.answer import Delta, PlacedToken
from divisi.deploy.api.compile import Call
from divisi.deploy.api.protocol import CompletionBody
from divisi.deploy.api.streaming import DONE
from divisi.deploy.api.usage import MIN_LOGPROB, usage
from divisi.model.text import Tokenizer


class CompletionWriter:
    """Completions of one or more prompts, whole and streamed; choice i answers prompt i."""

    def __init__(self, body: CompletionBody, calls: Sequence[Call], model: str, tokenizer: Tokenizer) -> None:
        self._calls = calls
        self._tokenizer = tokenizer
        self._ids_wanted = bool(body.return_token_ids)
        self._logprobs_wanted = body.logprobs is not None
        self._include_usage = body.include_usage
        self._prompt_tokens = sum(len(call.request.prompt) for call in calls)
        self._completion_tokens = 0
        self._unopened = set(range(len(calls)))
        stem = calls[0].request.request_id if len(calls) == 1 else calls[0].request.request_id.rpartition("-")[0]
        self._base: dict[str, Any] = {
            "id": stem,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._head = b"data: " + to_json(self._base)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if body.include_usage else b"]}\n\n"
        self._text_tail = b',"logprobs":null,"finish_reason":null,"stop_reason":null}' + self._tail

    def opening(self) -> bytes:
        """Nothing: the first chunk is text."""
        return b""

    def chunk(self, index: int, delta: Delta) -> bytes:
        """One chunk per delta that has something to show."""
        self._completion_tokens += len(delta.token_ids)
        extended = self._logprobs_wanted or self._ids_wanted
        if delta.finish_reason is None and not extended:
            if not delta.text:
                return b""
            return self._head + b'{"index":%d,"text":' % index + to_json(delta.text) + self._text_tail
        choice = self._choice(index, delta)
        if self._ids_wanted and index in self._unopened:
            self._unopened.discard(index)
            choice["prompt_token_ids"] = self._calls[index].request.prompt
        return self._head + to_json(choice) + self._tail

    def closing(self) -> bytes:
        """The usage chunk where it was asked for."""
        if not self._include_usage:
            return DONE
        counts = usage(self._prompt_tokens, self._completion_tokens)
        return self._head + b'],"usage":' + to_json(counts) + b"}\n\n" + DONE

    def whole(self, answers: Sequence[Delta]) -> bytes:
        """A `text_completion` object."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        if self._ids_wanted:
            for choice, call in zip(choices, self._calls, strict=True):
                choice["prompt_token_ids"] = call.request.prompt
        counts = usage(self._prompt_tokens, sum(len(answer.token_ids) for answer in answers))
        return to_json({**self._base, "choices": choices, "usage": counts})

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.tokens) if self._logprobs_wanted else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._ids_wanted:
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        name_of = self._tokenizer.name_of
        return {
            "tokens": [name_of(token.token_id) for token in tokens],
            "token_logprobs": [None if t.logprob is None else max(t.logprob.logprob, MIN_LOGPROB) for t in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: PlacedToken) -> dict[str, float] | None:
        """The best tokens and the chosen one. Of tokens that read the same, the best stands."""
        if token.logprob is None:
            return None
        ranked = [*token.logprob.top, (token.token_id, token.logprob.logprob)]
        named: dict[str, float] = {}
        for token_id, logprob in ranked:
            named.setdefault(self._tokenizer.name_of(token_id), max(logprob, MIN_LOGPROB))
        return named
