"""Names of spans, attributes and metrics: OpenTelemetry's for generative AI, and our own where it has none.

The conventions for generative AI, revision 1.44.0 of the semantic conventions, are all still "Development": every name
here may change with the next revision, and nothing else in the code spells one.
"""

from __future__ import annotations

REVISION = "1.44.0"
SCHEMA_URL = f"https://opentelemetry.io/schemas/{REVISION}"

# Attributes of generative AI.
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
REQUEST_CHOICES = "gen_ai.request.choice.count"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
ERROR_TYPE = "error.type"
HTTP_STATUS = "http.response.status_code"
CHAT, TEXT_COMPLETION = "chat", "text_completion"
"""Operations."""
DIVISI = "divisi"
"""Our name as a provider, and of the instrumentation scope."""

# Metrics of a generative AI server, in seconds.
SERVER_REQUEST_DURATION = "gen_ai.server.request.duration"
SERVER_TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
SERVER_TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"

# Our own spans: those of a request below its `{operation} {model}`, and of a step.
INGRESS, QUEUE, PREFILL, DECODE, DETOKENISE = "ingress", "queue", "prefill", "decode", "detokenise"
GANG_STATUS = "gang status"
STEP, DRAFT_PASS, FULL_PASS = "step", "draft pass", "full pass"

# Our own attributes and events.
REQUEST_ID = "divisi.request.id"
SLICE = "divisi.request.slice"
DRAFTED_TOKENS = "divisi.usage.drafted_tokens"
ACCEPTED_TOKENS = "divisi.usage.accepted_tokens"
FIRST_TOKEN_S = "divisi.time_to_first_token"
BUSY_S = "divisi.busy_time"
"""Seconds within a span that were spent on it; the rest was waiting."""
SEAT, EPOCH, STEP_NUMBER, ROWS, SEQUENCES = (
    "divisi.seat", "divisi.epoch", "divisi.step", "divisi.rows", "divisi.sequences",
)  # fmt: skip
TIME_IN = "divisi.time."
"""Followed by a part of a step: seconds over all layers."""
RESENT = "divisi.resent"
"""Event of a request's root span: a worker refused it before it had begun, and it goes to another."""
RESUMED = "divisi.resumed"
"""Event of a request's root span: its worker was lost or leaves, and another goes on."""
RECOMPUTED_TOKENS = "divisi.recomputed_tokens"
