"""From token events to text: detokenised, stopped at stop strings, with log-probabilities placed in the text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from divisi.cluster.errors import AnswerLost, DivisiError, GangNotReady, RequestRejected
from divisi.cluster.request import TokenEvent, TokenLogprob
from divisi.deploy.api.compile.call import Call
from divisi.deploy.api.compile.parsing import ChatParser, ChatPart
from divisi.deploy.api.engine_client import EngineClient
from divisi.deploy.api.errors import AnswerError
from divisi.deploy.api.schema.replies import FinishReason
from divisi.model.text import Detokenizer, StopMatcher, Tokenizer
from divisi.model.text.tool_calls import TextPart


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token whose log-probability was asked for."""

    token_id: int
    offset: int
    """Characters of the text before it."""
    logprob: TokenLogprob | None
    """None for the first token of a prompt, which nothing precedes."""


@dataclass(slots=True)
class Delta:
    """What one event adds to an answer."""

    text: str
    """Empty where the call is to be parsed."""
    token_ids: list[int]
    """Generated tokens; a prompt that is echoed is not among them."""
    tokens: list[PlacedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string, or the stop id that the client named."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    parts: list[ChatPart] = field(default_factory=list)
    """Reasoning, content and tool calls, where the call is to be parsed."""
    reasoning_tokens: int = 0
    drafted: int = 0
    """Tokens that the MTP layer proposed."""
    accepted: int = 0
    """Those of them that stood."""


class Timed(Protocol):
    """Who wants to know how long it takes to turn tokens into text."""

    detokenising_s: float


class Answer:
    """One growing answer. Its text doesn't depend on how the engine groups tokens into events."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, skip_special=call.skip_special)
        self._matcher = StopMatcher(call.stops) if call.stops else None
        self._parser = None if call.parse is None else ChatParser(call.parse)
        self._unstoppable = call.request.min_tokens
        """Tokens still to come whose text no stop string may end."""
        self._offset = 0
        self._started = False
        self._drafted = self._accepted = 0

    def push(self, event: TokenEvent) -> Delta:
        """Take one event. Where the engine gave up, raises AnswerError, AnswerLost, RequestRejected or GangNotReady."""
        if event.finish_reason == "error":
            raise AnswerError(event.error or "the engine ended the answer with an error")
        if event.finish_reason == "lost":
            raise AnswerLost(event.error or "ranks were lost in every step that computed the answer")
        if event.finish_reason == "rejected":
            raise RequestRejected(event.error or "what the request asks for contradicts itself")
        if event.finish_reason == "cancelled":
            raise GangNotReady("the server cancelled the answer; send the request again")
        delta = Delta("", [])
        delta.drafted, delta.accepted = event.drafted - self._drafted, event.accepted - self._accepted
        self._drafted, self._accepted = event.drafted, event.accepted
        if not self._started:
            self._started = True
            delta.prompt_logprobs = event.prompt_logprobs
            if self._call.echo:
                delta.text = self._echo(event, delta)
        for index, token_id in enumerate(event.token_ids):
            delta.token_ids.append(token_id)
            if event.logprobs is not None:
                delta.tokens.append(PlacedToken(token_id, self._offset, event.logprobs[index]))
            self._take(delta, token_id)
            if self._parser is not None:
                delta.reasoning_tokens += self._parser.count_reasoning()
            if delta.finish_reason is not None:
                break
        else:
            if event.finish_reason is not None:
                self._end(event, delta)
        if self._parser is not None and delta.finish_reason is not None:
            delta.finish_reason = self._parser.reason(delta.finish_reason)
        return delta

    def _take(self, delta: Delta, token_id: int) -> None:
        """Add a token. The one call that an answer may have ends it, as a stop string does."""
        piece = self._detokenizer.push(token_id)
        self._offset += len(piece)
        if self._parser is None:
            delta.text += self._content(delta, piece)
        else:
            self._add(delta, self._parser.push(token_id, piece))
            if self._parser.done and delta.finish_reason is None:
                delta.finish_reason = "stop"
        if self._unstoppable:
            self._unstoppable -= 1

    def _add(self, delta: Delta, parts: Sequence[ChatPart]) -> None:
        """Add parts, up to a stop string. What was held back of one goes out before a call: none spans it."""
        if self._matcher is None:
            delta.parts += parts
            return
        for part in parts:
            shown: list[ChatPart]
            if isinstance(part, TextPart):
                shown = [TextPart(self._content(delta, part.text))]
            else:
                shown = [TextPart(self._matcher.flush()), part]
            delta.parts += [piece for piece in shown if piece != TextPart("")]
            if delta.finish_reason is not None:
                return

    def _content(self, delta: Delta, text: str) -> str:
        """What may go out of a piece of content; a stop string in it ends the answer."""
        if self._matcher is None or self._unstoppable:
            return text
        text = self._matcher.push(text)
        if (stop := self._matcher.matched) is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
            return text + stop if self._call.include_stop else text
        return text

    def _end(self, event: TokenEvent, delta: Delta) -> None:
        """The engine's end: let out what was held back, which may complete a stop string."""
        reason: FinishReason = "length" if event.finish_reason == "length" else "stop"
        if event.stop_id is not None and self._call.include_stop:
            self._take(delta, event.stop_id)
        if delta.finish_reason is None:
            tail = self._detokenizer.flush()
            if self._parser is None:
                delta.text += self._content(delta, tail)
            else:
                self._add(delta, self._parser.finish(tail, reason))
        if delta.finish_reason is not None:
            return
        if self._matcher is not None and (held := self._matcher.flush()):
            if self._parser is None:
                delta.text += held
            else:
                delta.parts.append(TextPart(held))
        delta.finish_reason = reason
        delta.stop_reason = event.stop_id if event.stop_id in self._call.stop_token_ids else None

    def _echo(self, event: TokenEvent, delta: Delta) -> str:
        """The prompt as the model read it, special tokens shown."""
        prompt = self._call.request.prompt
        detokenizer = Detokenizer(self._tokenizer, skip_special=False)
        wanted = self._call.request.logprobs is not None and event.prompt_logprobs is not None
        logprobs = event.prompt_logprobs or ()
        pieces: list[str] = []
        for index, token_id in enumerate(prompt):
            if wanted:
                delta.tokens.append(PlacedToken(token_id, self._offset, logprobs[index]))
            piece = detokenizer.push(token_id)
            self._offset += len(piece)
            pieces.append(piece)
        pieces.append(tail := detokenizer.flush())
        self._offset += len(tail)
        return "".join(pieces)


async def answer_deltas(
    engine: EngineClient, call: Call, tokenizer: Tokenizer, timed: Timed | None = None
) -> AsyncGenerator[list[Delta], None]:
    """The deltas of one call, one an event, in lists as the events come; the very last has a finish reason.

    Closing it closes the engine's iterator. After a stop string that is closed at once, which cancels the request.
    """
    answer = Answer(call, tokenizer)
    async with aclosing(engine.generate(call.request)) as batches:
        async for events in batches:
            deltas: list[Delta] = []
            failure: DivisiError | None = None
            begin = 0.0 if timed is None else perf_counter()
            for event in events:
                try:
                    deltas.append(answer.push(event))
                except DivisiError as error:
                    failure = error  # after what came before it
                    break
                if deltas[-1].finish_reason is not None:
                    await batches.aclose()
                    break
            if timed is not None:
                timed.detokenising_s += perf_counter() - begin
            if deltas:
                yield deltas
            if failure is not None:
                raise failure
            if deltas and deltas[-1].finish_reason is not None:
                return
    raise AnswerError("the engine's answer broke off without an end")
