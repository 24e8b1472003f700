"""The spans of a generation request in the ingress. They are made when it ends, from its clock; only the root is open
before that, since what the workers record is below it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, Tracer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divisi.cluster.telemetry import conventions as names
from divisi.cluster.telemetry.context import below, parse, spell
from divisi.cluster.telemetry.process import Telemetry
from divisi.deploy.api.metrics import CLIENT_LEFT, RequestClock
from divisi.deploy.api.middleware.request_log import Generated

if TYPE_CHECKING:
    from divisi.cluster.request import Request

OPERATIONS: Mapping[str, str] = {"/v1/chat/completions": names.CHAT, "/v1/completions": names.TEXT_COMPLETION}
"""The paths whose requests are traced."""


class RequestTrace:
    """One request's."""

    def __init__(self, tracer: Tracer, root: Span, content: bool) -> None:
        """`content`: whether spans may hold what was asked and answered."""
        self._tracer, self._root, self._content = tracer, root, content
        self._context = root.get_span_context()
        self.traceparent = spell(self._context)
        self.trace_id = format(self._context.trace_id, "032x")

    def asked(self, requests: Sequence[Request], answer_id: str, messages: object) -> None:
        """What it asks for, once that is known."""
        first = requests[0]
        self._root.set_attributes({
            names.REQUEST_MAX_TOKENS: first.max_tokens,
            names.REQUEST_TEMPERATURE: first.sampling.temperature,
            names.REQUEST_TOP_P: first.sampling.top_p,
            names.REQUEST_TOP_K: first.sampling.top_k,
            names.REQUEST_CHOICES: len(requests),
            names.RESPONSE_ID: answer_id,
            names.SLICE: first.slice,
        })  # fmt: skip
        if self._content:
            self._root.set_attribute(names.INPUT_MESSAGES, json.dumps(messages, ensure_ascii=False, default=str))

    @property
    def keeps_content(self) -> bool:
        """Whether `answered` is to be called."""
        return self._content

    def answered(self, texts: Sequence[str]) -> None:
        """The text of each choice, as the model wrote it."""
        messages = [{"role": "assistant", "parts": [{"type": "text", "content": text}]} for text in texts]
        self._root.set_attribute(names.OUTPUT_MESSAGES, json.dumps(messages, ensure_ascii=False))

    def end(self, status: int, request_id: str, generated: Generated | None, clock: RequestClock | None) -> None:
        """It has ended with that HTTP status."""
        root = self._root
        root.set_attributes({names.HTTP_STATUS: status, names.REQUEST_ID: request_id})
        if status >= 400:
            root.set_attribute(names.ERROR_TYPE, str(status))
            root.set_status(Status(StatusCode.ERROR))
        if generated is not None:
            self._tell(generated)
        if clock is not None:
            self._tell_times(clock)
        root.end()

    def _tell(self, generated: Generated) -> None:
        usage = {
            names.INPUT_TOKENS: generated.prompt_tokens,
            names.OUTPUT_TOKENS: generated.completion_tokens,
            names.DRAFTED_TOKENS: generated.drafted_tokens,
            names.ACCEPTED_TOKENS: generated.accepted_tokens,
        }
        self._root.set_attributes(usage)
        self._root.set_attribute(names.RESPONSE_FINISH_REASONS, list(generated.finish_reasons))
        if generated.first_token_s is not None:
            self._root.set_attribute(names.FIRST_TOKEN_S, generated.first_token_s)

    def _tell_times(self, clock: RequestClock) -> None:
        now, at = perf_counter(), time.time_ns()

        def span(name: str, begin: float, end: float, attributes: Mapping[str, float]) -> None:
            start = at - int((now - begin) * 1e9)
            made = self._tracer.start_span(name, below(self._context), attributes=dict(attributes), start_time=start)
            made.end(at - int((now - end) * 1e9))

        span(names.INGRESS, clock.start, clock.admitted or now, {})
        if clock.first is not None:
            span(names.DETOKENISE, clock.first, clock.last, {names.BUSY_S: clock.detokenising_s})


def trace_of(scope: Scope) -> RequestTrace | None:
    """The spans of a request; None where it is not traced."""
    found: RequestTrace | None = scope.get("state", {}).get("trace")
    return found


def trace_id_of(scope: Scope) -> str | None:
    """The trace that a request belongs to, here or at its client's."""
    if (kept := trace_of(scope)) is not None:
        return kept.trace_id
    parent = parent_of(scope)
    return None if parent is None else format(parent.trace_id, "032x")


def note_clock(scope: Scope, clock: RequestClock) -> None:
    """Have the request's times in its spans."""
    scope.setdefault("state", {})["clock"] = clock


class TraceRequests:
    """ASGI middleware: a span for each generation request that its client, or else chance, wants traced.

    `scope["state"]["trace"]` is a RequestTrace then, and its span the current one.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._spec = app, telemetry.spec
        assert telemetry.tracer is not None, "without a tracer nothing is to be traced"
        self._tracer = telemetry.tracer
        self._random = random.Random()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        operation = OPERATIONS.get(scope.get("path", "")) if scope["type"] == "http" else None
        parent = None if operation is None else parent_of(scope)
        if operation is None or scope["method"] != "POST" or not self._wanted(parent):
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        root = self._open(operation, parent)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["trace"] = kept = RequestTrace(self._tracer, root, self._spec.content)
        try:
            with trace.use_span(root, end_on_exit=False):
                await self._app(scope, receive, noting_send)
        finally:
            kept.end(status, state.get("request_id", ""), state.get("generated"), state.get("clock"))

    def _wanted(self, parent: SpanContext | None) -> bool:
        if parent is not None:
            return parent.trace_flags.sampled
        return self._random.random() < self._spec.trace_ratio

    def _open(self, operation: str, parent: SpanContext | None) -> Span:
        attributes = {
            names.OPERATION: operation, names.PROVIDER: names.DIVISI, names.REQUEST_MODEL: self._spec.model,
            names.RESPONSE_MODEL: self._spec.model,
        }  # fmt: skip
        return self._tracer.start_span(
            f"{operation} {self._spec.model}", below(parent), kind=SpanKind.SERVER, attributes=attributes
        )


def parent_of(scope: Scope) -> SpanContext | None:
    """The span that the client's `traceparent` names, if it sent one that is valid."""
    header = next((value for name, value in scope["headers"] if name == b"traceparent"), None)
    return None if header is None else parse(header.decode("latin-1"))
