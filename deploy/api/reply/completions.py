"""How /v1/completions spells an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from divisi.deploy.api.body.protocol import CompletionBody
from divisi.deploy.api.compile.call import Call
from divisi.deploy.api.reply.answer import Delta, PlacedToken
from divisi.deploy.api.reply.streaming import DONE
from divisi.deploy.api.reply.usage import MIN_LOGPROB, Drafts, spell_prompt_logprobs, usage
from divisi.model.text import Tokenizer

_TEXT_END = b',"logprobs":null,"finish_reason":null,"stop_reason":null}'


class CompletionWriter:
    """Completions of one or more prompts, whole and streamed; the choices of a prompt stand together."""

    def __init__(
        self, body: CompletionBody, calls: Sequence[Call], model: str, tokenizer: Tokenizer, fingerprint: str
    ) -> None:
        self._calls = calls
        self._tokenizer = tokenizer
        self._told, self._made = body.n or 1, body.best_of or body.n or 1
        self._ids_wanted = bool(body.return_token_ids)
        self._logprobs_wanted = body.logprobs is not None
        self._prompt_logprobs = body.prompt_logprobs
        self._usage_at_end, self._usage_always = body.include_usage, body.continuous_usage
        self._prompt_tokens = sum(len(call.request.prompt) for call in calls[:: self._made])
        self._completion_tokens = 0
        self._drafts = Drafts(body.mtp, calls[0].request)
        self._unopened = set(range(len(calls)))
        self._base: dict[str, Any] = {
            "id": calls[0].answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._head = b"data: " + to_json(self._base)[:-1] + b',"choices":['
        self._plain_tail = b'],"usage":null}\n\n' if body.include_usage else b"]}\n\n"

    def opening(self) -> bytes:
        """Nothing: the first chunk is text."""
        return b""

    def chunk(self, index: int, delta: Delta) -> bytes:
        """One chunk per delta that has something to show."""
        self._completion_tokens += len(delta.token_ids)
        self._drafts.add(delta)
        extended = self._logprobs_wanted or self._ids_wanted
        if delta.finish_reason is None and not extended:
            if not delta.text:
                return b""
            return self._head + b'{"index":%d,"text":' % index + to_json(delta.text) + _TEXT_END + self._tail()
        choice = self._choice(index, delta)
        if self._ids_wanted and index in self._unopened:
            self._unopened.discard(index)
            choice["prompt_token_ids"] = self._calls[index].request.prompt
        return self._head + to_json(choice) + self._tail()

    def closing(self) -> bytes:
        """The usage chunk where it was asked for."""
        if not self._usage_at_end:
            return DONE
        return self._head + b'],"usage":' + to_json(self._usage()) + b"}\n\n" + DONE

    def whole(self, answers: Sequence[Delta]) -> bytes:
        """A `text_completion` object."""
        self._completion_tokens = sum(len(answer.token_ids) for answer in answers)
        for answer in answers:
            self._drafts.add(answer)
        choices: list[dict[str, Any]] = []
        for first in range(0, len(answers), self._made):
            for call, answer in self._best(first, answers):
                choice = self._choice(len(choices), answer)
                if self._ids_wanted:
                    choice["prompt_token_ids"] = call.request.prompt
                if self._prompt_logprobs is not None:
                    told = answer.prompt_logprobs or ()
                    choice["prompt_logprobs"] = spell_prompt_logprobs(told, self._prompt_logprobs, self._tokenizer)
                choices.append(choice)
        return to_json({**self._base, "choices": choices, "usage": self._usage()})

    def _best(self, first: int, answers: Sequence[Delta]) -> list[tuple[Call, Delta]]:
        """Of the answers to the prompt at `first`, those to tell: all, or the likeliest per token."""
        made = list(zip(self._calls, answers, strict=True))[first : first + self._made]
        if self._told < self._made:
            made.sort(key=lambda pair: _mean_logprob(pair[1], len(pair[0].request.prompt) if pair[0].echo else 0))
            made = made[::-1][: self._told]
        return made

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

    def _tail(self) -> bytes:
        """The end of a chunk; with the counts so far where each chunk is to tell them."""
        if not self._usage_always:
            return self._plain_tail
        return b'],"usage":' + to_json(self._usage()) + b"}\n\n"

    def _usage(self) -> dict[str, Any]:
        return usage(self._prompt_tokens, self._completion_tokens, self._drafts.details())

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


def _mean_logprob(answer: Delta, echoed: int) -> float:
    """Mean log-probability of an answer's own tokens, the echoed prompt's left out; an empty answer ranks last."""
    own = [token.logprob.logprob for token in answer.tokens[echoed:] if token.logprob is not None]
    return sum(own) / len(own) if own else float("-inf")
