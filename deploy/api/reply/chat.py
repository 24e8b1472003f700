"""How /v1/chat/completions spells an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from pydantic_core import to_json

from divisi.deploy.api.body.protocol import ChatBody
from divisi.deploy.api.compile.call import Call
from divisi.deploy.api.compile.parsing import ReasoningPart
from divisi.deploy.api.reply.answer import Delta, PlacedToken
from divisi.deploy.api.reply.streaming import DONE
from divisi.deploy.api.reply.usage import MIN_LOGPROB, Drafts, spell_prompt_logprobs, usage
from divisi.model.text import Tokenizer
from divisi.model.text.tool_calls import CallPart, RevokedPart, TextPart

_TEXT_END = b'},"logprobs":null,"finish_reason":null}'


class ChatWriter:
    """Chat answers, whole and streamed. What is the same in all chunks is serialised once."""

    def __init__(
        self, body: ChatBody, calls: Sequence[Call], model: str, tokenizer: Tokenizer, fingerprint: str
    ) -> None:
        self._calls = calls
        self._tokenizer = tokenizer
        self._ids_wanted = bool(body.return_token_ids)
        self._logprobs_wanted = bool(body.logprobs)
        self._prompt_logprobs = body.prompt_logprobs
        self._usage_at_end, self._usage_always = body.include_usage, body.continuous_usage
        self._completion_tokens = 0
        self._drafts = Drafts(body.mtp, calls[0].request)
        self._reasoning_tokens = 0
        self._reasoning_shown = body.include_reasoning is not False
        self._parsed = calls[0].parse is not None
        self._thinks = calls[0].parse is not None and calls[0].parse.thinks
        created = int(time.time())
        self._base = {"id": calls[0].answer_id, "created": created, "model": model, "system_fingerprint": fingerprint}
        chunk = {"object": "chat.completion.chunk", **self._base}
        self._head = b"data: " + to_json(chunk)[:-1] + b',"choices":['
        self._plain_tail = b'],"usage":null}\n\n' if body.include_usage else b"]}\n\n"
        self._text_heads = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(len(calls))]

    def opening(self) -> bytes:
        """The role chunks."""
        tail = self._tail()
        if self._ids_wanted:
            tail = b'],"prompt_token_ids":' + to_json(self._calls[0].request.prompt) + tail[1:]
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._head + to_json(_choice(index, delta)) + tail for index in range(len(self._calls)))

    def chunk(self, index: int, delta: Delta) -> bytes:
        """Text as it comes; then the finish chunk."""
        self._completion_tokens += len(delta.token_ids)
        self._drafts.add(delta)
        self._reasoning_tokens += delta.reasoning_tokens
        events = b""
        added = self._added(delta)
        if added or self._logprobs_wanted or self._ids_wanted:
            if delta.token_ids or delta.text or added:
                shown = added if self._parsed else {"content": delta.text}
                choice = _choice(index, shown, logprobs=self._logprobs(delta.tokens))
                if self._ids_wanted:
                    choice["token_ids"] = delta.token_ids
                events = self._head + to_json(choice) + self._tail()
        elif delta.text and not self._parsed:
            events = self._text_heads[index] + to_json(delta.text) + _TEXT_END + self._tail()
        if delta.finish_reason is not None:
            choice = _choice(index, {}, finish_reason=delta.finish_reason) | {"stop_reason": delta.stop_reason}
            events += self._head + to_json(choice) + self._tail()
        return events

    def closing(self) -> bytes:
        """The usage chunk where it was asked for."""
        if not self._usage_at_end:
            return DONE
        return self._head + b'],"usage":' + to_json(self._usage()) + b"}\n\n" + DONE

    def whole(self, answers: Sequence[Delta]) -> bytes:
        """A `chat.completion` object."""
        self._completion_tokens = sum(len(answer.token_ids) for answer in answers)
        for answer in answers:
            self._drafts.add(answer)
        self._reasoning_tokens = sum(answer.reasoning_tokens for answer in answers)
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        reply: dict[str, Any] = {"object": "chat.completion", **self._base, "choices": choices, "usage": self._usage()}
        if self._prompt_logprobs is not None:
            told = answers[0].prompt_logprobs or ()
            reply["prompt_logprobs"] = spell_prompt_logprobs(told, self._prompt_logprobs, self._tokenizer)
        if self._ids_wanted:
            reply["prompt_token_ids"] = self._calls[0].request.prompt
        return to_json(reply)

    def _whole_choice(self, index: int, answer: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None} | self._message(answer),
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self._ids_wanted:
            choice["token_ids"] = answer.token_ids
        return choice

    def _tail(self) -> bytes:
        """The end of a chunk; with the counts so far where each chunk is to tell them."""
        if not self._usage_always:
            return self._plain_tail
        return b'],"usage":' + to_json(self._usage()) + b"}\n\n"

    def _usage(self) -> dict[str, Any]:
        reasoning = {"reasoning_tokens": self._reasoning_tokens} if self._thinks else {}
        details = reasoning | self._drafts.details()
        return usage(len(self._calls[0].request.prompt), self._completion_tokens, details)

    def _added(self, delta: Delta) -> dict[str, Any]:
        """The delta of a parsed answer; empty where nothing is to be shown."""
        added: dict[str, Any] = {}
        for part in delta.parts:
            match part:
                case ReasoningPart(text) if self._reasoning_shown:
                    added["reasoning"] = added.get("reasoning", "") + text
                case TextPart(text):
                    added["content"] = added.get("content", "") + text
                case CallPart():
                    added.setdefault("tool_calls", []).append(_call_delta(part))
        return added

    def _message(self, answer: Delta) -> dict[str, Any]:
        """The fields of a parsed answer's message."""
        if not self._parsed:
            return {}
        calls: dict[int, dict[str, Any]] = {}
        for part in answer.parts:
            if isinstance(part, RevokedPart):
                del calls[part.index]
            elif isinstance(part, CallPart) and part.name is not None:
                call = _call_delta(part)
                calls[call.pop("index")] = call
            elif isinstance(part, CallPart):
                calls[part.index]["function"]["arguments"] += part.arguments
        reasoning = "".join(part.text for part in answer.parts if isinstance(part, ReasoningPart))
        content = "".join(part.text for part in answer.parts if isinstance(part, TextPart))
        message: dict[str, Any] = {"content": content or (None if calls else "")}
        if reasoning and self._reasoning_shown:
            message["reasoning"] = reasoning
        return message | ({"tool_calls": list(calls.values())} if calls else {})

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


def _choice(
    index: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _call_delta(part: CallPart) -> dict[str, Any]:
    """A piece of a call as streamed; the first has its id and name."""
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}
