"""Request ids: taken from the client or made up, sent back with every reply, and known to whatever logs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divisi.cluster.telemetry.context import LOG_IDS
from divisi.deploy.api.errors import ApiError, to_reply
from divisi.deploy.api.middleware.tracing import trace_id_of

HEADER = b"x-request-id"
_VALID = re.compile(rb"[!-~]{1,128}")


class RequestIds:
    """ASGI middleware: `scope["state"]["request_id"]` is the `X-Request-Id` that the client sent, or a new one."""

    def __init__(self, app: ASGIApp, *, tells: bool) -> None:
        """`tells`: whether replies carry the id."""
        self._app = app
        self._tells = tells

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = next((value for name, value in scope["headers"] if name == HEADER), None)
        valid = asked is not None and _VALID.fullmatch(asked) is not None
        request_id = asked if asked is not None and valid else uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode("ascii")

        async def naming_send(message: Message) -> None:
            if self._tells and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id)]}
            await send(message)

        if asked is not None and not valid:
            await _refuse(naming_send)
        else:
            token = LOG_IDS.set(_log_ids(scope))
            try:
                await self._app(scope, receive, naming_send)
            finally:
                LOG_IDS.reset(token)


def _log_ids(scope: Scope) -> Mapping[str, str]:
    """What every log line about the request says; its trace is the client's where it isn't traced here."""
    state = scope["state"]
    if (trace_id := trace_id_of(scope)) is not None:
        state["trace_id"] = trace_id
    return {name: state[name] for name in ("request_id", "trace_id") if name in state}


async def _refuse(send: Send) -> None:
    reply = to_reply(
        ApiError("X-Request-Id: must be 1 to 128 visible ASCII characters; shorten it, or leave it out", code="header")
    )
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body()})
