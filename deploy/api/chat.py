"""How /v1/chat/completions spells an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from divisi.deploy.api.answer import Delta, PlacedToken
from divisi.deploy.api.compile import Call
from divisi.deploy.api.protocol import ChatBody
from divisi.deploy.api.streaming import DONE
from divisi.deploy.api.usage import MIN_LOGPROB, usage
from divisi.model.text import Tokenizer


class ChatWriter:
    """Chat answers, whole and streamed. What is the same in all chunks is serialised once."""

    def __init__(self, body: ChatBody, call: Call, model: str, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._ids_wanted = bool(body.return_token_ids)
        self._logprobs_wanted = bool(body.logprobs)
        self._include_usage = body.include_usage
        self._completion_tokens = 0
        self._base: dict[str, Any] = {"id": call.request.request_id, "created": int(time.time()), "model": model}
        chunk = {"object": "chat.completion.chunk", **self._base}
        self._head = b"data: " + to_json(chunk)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if body.include_usage else b"]}\n\n"
        self._text_head = self._head + b'{"index":0,"delta":{"content":'
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def opening(self) -> bytes:
        """The role chunk."""
        tail = self._tail
        if self._ids_wanted:
            tail = b'],"prompt_token_ids":' + to_json(self._call.request.prompt) + tail[1:]
        return self._head + to_json(_choice({"role": "assistant", "content": ""})) + tail

    def chunk(self, index: int, delta: Delta) -> bytes:
        """Text as it comes; then the finish chunk."""
        self._completion_tokens += len(delta.token_ids)
        events = b""
        if self._logprobs_wanted or self._ids_wanted:
            if delta.token_ids or delta.text:
                choice = _choice({"content": delta.text}, logprobs=self._logprobs(delta.tokens))
                if self._ids_wanted:
                    choice["token_ids"] = delta.token_ids
                events = self._head + to_json(choice) + self._tail
        elif delta.text:
            events = self._text_head + to_json(delta.text) + self._text_tail
        if delta.finish_reason is not None:
            choice = _choice({}, finish_reason=delta.finish_reason) | {"stop_reason": delta.stop_reason}
            events += self._head + to_json(choice) + self._tail
        return events

    def closing(self) -> bytes:
        """The usage chunk where it was asked for."""
        if not self._include_usage:
            return DONE
        counts = usage(len(self._call.request.prompt), self._completion_tokens)
        return self._head + b'],"usage":' + to_json(counts) + b"}\n\n" + DONE

    def whole(self, answers: Sequence[Delta]) -> bytes:
        """A `chat.completion` object."""
        answer = answers[0]
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        reply: dict[str, Any] = {"object": "chat.completion", **self._base, "choices": [choice]}
        reply["usage"] = usage(len(self._call.request.prompt), len(answer.token_ids))
        if self._ids_wanted:
            choice["token_ids"] = answer.token_ids
            reply["prompt_token_ids"] = self._call.request.prompt
        return to_json(reply)

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> dict[str, Any] | None:
        if not self._logprobs_wanted:
            return None
        content = []
        for token in tokens:
            found = token.logprob
            if found is not None:
                top = [self._entry(token_id, logprob) for token_id, logprob in found.top]
                content.append(self._entry(found.token_id, found.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.bytes_of(token_id)
        name = self._tokenizer.name_of(token_id)
        return {"token": name, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}


def _choice(delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
