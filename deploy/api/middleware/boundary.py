"""The outermost error handler: what nobody expected becomes a 500, and the connection lives on."""

from __future__ import annotations

import logging

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divisi.deploy.api.errors import to_reply

logger = logging.getLogger(__name__)


class Boundary:
    """ASGI middleware: logs an unexpected error with its trace and answers 500 where nothing is sent yet.

    Starlette's own handler would re-raise after answering, which makes the server close the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        started = False

        async def watching_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watching_send)
        except ClientDisconnect:
            return  # it left while it sent its body: nobody is there to answer
        except Exception as error:
            if scope["type"] != "http" or started:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            reply = to_reply(error)
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": reply.status, "headers": headers})
            await send({"type": "http.response.body", "body": reply.body()})
