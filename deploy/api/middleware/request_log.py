"""One log line per HTTP request, at its end. It never holds a key, a prompt or an answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divisi.deploy.api.metrics import CLIENT_LEFT
from divisi.deploy.api.middleware.auth import HEALTH, METRICS, key_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Generated:
    """What a generation request came to. One finish reason per choice; `first_token_s` counts from its arrival."""

    prompt_tokens: int
    completion_tokens: int
    first_token_s: float | None
    finish_reasons: Sequence[str]
    drafted_tokens: int = 0
    accepted_tokens: int = 0


def note_generated(scope: Scope, generated: Generated) -> None:
    """Have it in the request's log line."""
    scope.setdefault("state", {})["generated"] = generated


def note_dropped(scope: Scope, keys: Sequence[str]) -> None:
    """Have it in the request's log line which keys of its conversation were dropped: a few names, short ones."""
    if keys:
        scope.setdefault("state", {})["dropped_keys"] = keys


class LogRequests:
    """ASGI middleware: logs every request. Probes and scrapes that went well are logged as debugging only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT
        begin = perf_counter()

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            quiet = scope["path"] in HEALTH | METRICS and status < 400
            level = logging.DEBUG if quiet else logging.INFO
            logger.log(level, "request", extra={"fields": _fields(scope, status, perf_counter() - begin)})


def _fields(scope: Scope, status: int, duration_s: float) -> dict[str, object]:
    key, state = key_of(scope), scope.get("state", {})
    fields: dict[str, object] = {
        "request_id": state.get("request_id"),
        **({"trace_id": state["trace_id"]} if "trace_id" in state else {}),
        "method": scope["method"],
        "path": scope["path"][:256],
        "status": status,
        "key": None if key is None else key.name,
        "duration_s": round(duration_s, 6),
    }
    if client := state.get("client"):
        fields["client"] = client
    if dropped := state.get("dropped_keys"):
        fields["dropped_keys"] = dropped
    found: Generated | None = state.get("generated")
    if found is not None:
        fields["prompt_tokens"] = found.prompt_tokens
        fields["completion_tokens"] = found.completion_tokens
        fields["first_token_s"] = None if found.first_token_s is None else round(found.first_token_s, 6)
        fields["finish_reasons"] = list(found.finish_reasons)
        if found.drafted_tokens:
            fields["drafted_tokens"] = found.drafted_tokens
            fields["accepted_tokens"] = found.accepted_tokens
    return fields
