"""The reply to a generation request: one JSON body, or server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from divisi.cluster.errors import AnswerLost, GangNotReady, Overloaded, RequestRejected
from divisi.deploy.api.compile.call import Call
from divisi.deploy.api.engine_client import EngineClient
from divisi.deploy.api.errors import AnswerError, to_reply
from divisi.deploy.api.metrics import RequestClock
from divisi.deploy.api.middleware.auth import key_of
from divisi.deploy.api.middleware.request_log import Generated, note_generated
from divisi.deploy.api.middleware.tracing import RequestTrace, trace_of
from divisi.deploy.api.reply.answer import Delta, answer_deltas
from divisi.deploy.api.reply.event_stream import EventStream
from divisi.deploy.api.reply.merge import ClientLeftError, merge, until_client_leaves
from divisi.deploy.limits import Gate, RequestTimedOut, ServerStopping, Ticket
from divisi.model.text import Tokenizer
from divisi.model.text.tool_calls import CallPart

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_LAST_WORD_S = 5.0
_REFUSALS = (Overloaded, GangNotReady, RequestRejected)


class Pace(NamedTuple):
    """How long a stream may be silent, in seconds."""

    headers_after_s: float
    """Before its status, which until then is that of a failure."""
    keepalive_s: float
    """After it."""


class Writer(Protocol):
    """How one endpoint spells answers; one object per request."""

    def opening(self) -> bytes:
        """Events before the first delta."""
        ...

    def chunk(self, index: int, delta: Delta) -> bytes:
        """Events of one delta of choice `index`; empty where it shows nothing."""
        ...

    def closing(self) -> bytes:
        """Events after the last delta, up to `[DONE]`."""
        ...

    def whole(self, answers: Sequence[Delta]) -> bytes:
        """The body of an answer that isn't streamed; one finished delta per choice."""
        ...


class GenerationResponse(Response):
    """Generates and replies. The status waits for the first event, a stream's for `headers_after_s` at most, so that an
    early failure keeps its own.

    Errors before that are raised for the app's handlers; later ones become an SSE error event that ends the stream.
    A client that leaves ends the generation at once.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        calls: Sequence[Call],
        writer: Writer,
        clock: RequestClock,
        gate: Gate,
        *,
        stream: Pace | None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """`stream`: how to keep a stream alive, None for a whole reply; `notes`: headers of a good reply, in ASCII."""
        super().__init__()
        self._notes = [(name.lower().encode(), value.encode()) for name, value in (notes or {}).items()]
        self._engine = engine
        self._tokenizer = tokenizer
        self._calls = calls
        self._writer = writer
        self._clock = clock
        self._gate = gate
        self._ticket: Ticket | None = None
        self._started = False
        self._stream = stream
        self._reasons = ["cancelled"] * len(calls)
        self._begun: set[int] = set()
        self._drafted = self._accepted = 0
        self._trace: RequestTrace | None = None
        self._said: list[str] | None = None
        """What the choices said, where the trace is to hold it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request; returns after the last byte, or after the clean-up when the client has left."""
        send = self._noting_the_start(send)
        self._trace = trace_of(scope)
        try:
            with self._gate.admit(key_of(scope), [call.request for call in self._calls]) as self._ticket:
                self._clock.admit(self._calls[0].request.slice)
                stream = self._stream
                work = self._reply_whole(send) if stream is None else self._reply_streamed(send, stream)
                await until_client_leaves(receive, work, self._ticket.over)
        except ClientLeftError:
            return  # nobody is there to answer
        except (RequestTimedOut, ServerStopping) as error:
            self._fail("timeout" if isinstance(error, RequestTimedOut) else "stopped" if self._ticket else "refused")
            if not self._started:
                raise
            await _send_last(send, error)
        except Exception as error:
            self._fail("refused" if isinstance(error, _REFUSALS) else "error")
            raise
        finally:
            prompt_tokens = sum(len(self._calls[index].request.prompt) for index in self._begun)
            self._clock.close(prompt_tokens, self._reasons)
            if self._trace is not None and self._said is not None:
                self._trace.answered(self._said)
            times = self._clock.tokens, self._clock.first_token_s
            generated = Generated(prompt_tokens, *times, self._reasons, self._drafted, self._accepted)
            note_generated(scope, generated)

    async def _deltas(self) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Deltas of all choices, together what one wake-up brought."""
        timed = None if self._trace is None else self._clock
        if self._trace is not None and self._trace.keeps_content:
            self._said = [""] * len(self._calls)
        sources = [answer_deltas(self._engine, call, self._tokenizer, timed) for call in self._calls]
        async with aclosing(merge(sources)) as merged:
            async for parts in merged:
                for index, deltas in parts:
                    self._begun.add(index)
                    tokens = sum([len(delta.token_ids) for delta in deltas])
                    self._clock.tick(tokens, index)
                    if self._said is not None:
                        self._said[index] += "".join([_text(delta) for delta in deltas])
                    self._drafted += sum([delta.drafted for delta in deltas])
                    self._accepted += sum([delta.accepted for delta in deltas])
                    if self._ticket is not None:
                        self._ticket.progress(index, tokens)
                    if (reason := deltas[-1].finish_reason) is not None:
                        self._reasons[index] = reason
                yield [(index, delta) for index, deltas in parts for delta in deltas]

    async def _reply_whole(self, send: Send) -> None:
        answers = [Delta("", []) for _ in self._calls]
        texts: list[list[str]] = [[] for _ in self._calls]
        async with aclosing(self._deltas()) as batches:
            async for batch in batches:
                for index, delta in batch:
                    answer = answers[index]
                    texts[index].append(delta.text)
                    answer.token_ids += delta.token_ids
                    answer.tokens += delta.tokens
                    answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
                    answer.prompt_logprobs = answer.prompt_logprobs or delta.prompt_logprobs
                    answer.parts += delta.parts
                    answer.reasoning_tokens += delta.reasoning_tokens
                    answer.drafted += delta.drafted
                    answer.accepted += delta.accepted
        for answer, pieces in zip(answers, texts, strict=True):
            answer.text = "".join(pieces)
        body = self._writer.whole(answers)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *self._notes]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _reply_streamed(self, send: Send, pace: Pace) -> None:
        await self._engine.check_ready()  # judged before the status, however long it takes
        stream = EventStream(send, self._notes, headers_after_s=pace.headers_after_s, keepalive_s=pace.keepalive_s)
        async with stream, aclosing(self._deltas()) as batches:
            opening = self._writer.opening()
            try:
                async for batch in batches:
                    events = opening + self._chunks(batch)
                    if events or not stream.started:
                        await stream.send(events)
                    opening = b""
                last = self._writer.closing()
            except Exception as error:
                if not stream.started:
                    raise
                refused = isinstance(error, _REFUSALS)
                self._fail("refused" if refused else "error")
                if not refused and not isinstance(error, AnswerError | AnswerLost):
                    logger.error("a stream broke off", exc_info=error)
                last = _error_event(error)
            await stream.send(last, last=True)

    def _noting_the_start(self, send: Send) -> Send:
        async def noting(message: Message) -> None:
            self._started = True
            await send(message)

        return noting

    def _chunks(self, batch: Sequence[tuple[int, Delta]]) -> bytes:
        chunk = self._writer.chunk
        return b"".join([chunk(index, delta) for index, delta in batch])

    def _fail(self, why: str) -> None:
        self._reasons = [why if reason == "cancelled" else reason for reason in self._reasons]


def _text(delta: Delta) -> str:
    """All that the model wrote, calls as their arguments."""
    written = [part.arguments if isinstance(part, CallPart) else getattr(part, "text", "") for part in delta.parts]
    return delta.text + "".join(written)


def _error_event(error: Exception) -> bytes:
    return b"data: " + to_reply(error).body() + b"\n\n"


async def _send_last(send: Send, error: Exception) -> None:
    """The error as the stream's last event. A client that doesn't read is not waited for."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORD_S):
            await send({"type": "http.response.body", "body": _error_event(error), "more_body": False})
