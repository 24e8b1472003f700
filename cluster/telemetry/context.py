"""Trace context as text and bytes, and what log lines say of the request that they are about."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextvars import ContextVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

NO_IDS: Mapping[str, str] = {}
LOG_IDS: ContextVar[Mapping[str, str]] = ContextVar("LOG_IDS", default=NO_IDS)
"""Of the request that the running task serves: `request_id`, and `trace_id` where it has one."""

_PROPAGATOR = TraceContextTextMapPropagator()
_BYTES = struct.Struct(">QQQB")
_HALF = 2**64


def parse(traceparent: str) -> SpanContext | None:
    """The span that a `traceparent` header names; None for a header that is not valid."""
    carrier = {"traceparent": traceparent}
    found = trace.get_current_span(_PROPAGATOR.extract(carrier, Context())).get_span_context()
    return found if found.is_valid else None


def spell(context: SpanContext) -> str:
    """The span as a `traceparent` header."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def current_traceparent() -> str:
    """Of the span that the running task is in; empty where it is in none."""
    context = trace.get_current_span().get_span_context()
    return spell(context) if context.is_valid else ""


def pack(context: SpanContext) -> bytes:
    """The span in 25 bytes, for a step's header."""
    return _BYTES.pack(*divmod(context.trace_id, _HALF), context.span_id, context.trace_flags)


def unpack(data: bytes) -> SpanContext | None:
    """Inverse of `pack`; None for anything else."""
    if len(data) != _BYTES.size:
        return None
    high, low, span_id, flags = _BYTES.unpack(data)
    found = SpanContext(high * _HALF + low, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return found if found.is_valid else None


def below(parent: SpanContext | None) -> Context:
    """The context of a child of that span; of a root where there is none."""
    return Context() if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), Context())
