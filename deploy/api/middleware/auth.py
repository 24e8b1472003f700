"""API keys over HTTP: who may call, and which key a request came with."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from divisi.deploy.api.errors import ApiError, to_reply
from divisi.deploy.limits import ApiKey, KeyFile

HEALTH = frozenset({"/health", "/v1/health/live", "/v1/health/ready"})
"""Open to all: probes and load balancers have no key."""
METRICS = frozenset({"/metrics", "/metrics/targets"})


class Authenticate:
    """ASGI middleware: `Authorization: Bearer KEY` or 401. `scope["state"]["api_key"]` is the key that was found."""

    def __init__(self, app: ASGIApp, keys: KeyFile, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["api_key"] = self._find(scope)
        except ApiError as error:
            await _refuse(send, error)
            return
        await self._app(scope, receive, send)

    def _find(self, scope: Scope) -> ApiKey:
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scheme, _, presented = header.partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            raise ApiError(
                "no API key was sent; send it as 'Authorization: Bearer KEY'", status=401, code="missing_api_key"
            )
        key = self._keys.ring().find(presented.strip())
        if key is None:
            raise ApiError(
                "the API key is not valid here; check it, or ask for one", status=401, code="invalid_api_key"
            )
        return key


def key_of(scope: Scope) -> ApiKey | None:
    """The key that a request came with; None where none is asked for."""
    key: ApiKey | None = scope.get("state", {}).get("api_key")
    return key


async def _refuse(send: Send, error: ApiError) -> None:
    reply = to_reply(error)
    challenge = 'Bearer realm="divisi"' + (', error="invalid_token"' if error.code == "invalid_api_key" else "")
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", challenge.encode())]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body()})
