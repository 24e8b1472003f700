"""The one place where errors become HTTP: status, OpenAI-shaped body and headers.

DivisiError
+-- ApiError              the HTTP request itself: body, fields, model name, path
+-- AnswerError          an answer broke off inside the engine
+-- TextError             (model/text) a conversation or text that cannot become a prompt
+-- RequestTimedOut      (limits) below Overloaded: KeyLimitReached; below GangNotReady: ServerStopping
+-- RequestRejected, Overloaded, GangNotReady, StepAborted, AnswerLost   (cluster/errors)
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches

from pydantic_core import to_json
from starlette.exceptions import HTTPException

from divisi.cluster.errors import AnswerLost, DivisiError, GangNotReady, Overloaded, RequestRejected, StepAborted
from divisi.deploy.limits.errors import KeyLimitReached, RequestTimedOut, ServerStopping
from divisi.model.text import TemplateError, TextError

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
_MOST_PATH = 128


class ApiError(DivisiError):
    """A request that the API refuses. `param` names the field, `message` what is wrong and what to do."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code


class AnswerError(DivisiError):
    """The engine ended an answer with an error, or without a terminal event."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as HTTP sees it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """`{"error": {...}}` as OpenAI spells it."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return to_json({"error": error})


def to_reply(error: BaseException, *, retry_after_s: int = 1) -> ErrorReply:
    """The reply to any error. What isn't part of the error tree is a 500 that tells nothing of its inside."""
    match error:
        case ApiError():
            return ErrorReply(error.status, error.message, INVALID_REQUEST, error.param, error.code)
        case RequestRejected():
            return ErrorReply(400, str(error), INVALID_REQUEST, None, "request_rejected")
        case TemplateError():
            return ErrorReply(400, str(error), INVALID_REQUEST, "messages", "template_error")
        case TextError():
            return ErrorReply(400, str(error), INVALID_REQUEST, None, "invalid_text")
        case KeyLimitReached():
            wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ErrorReply(429, str(error), "rate_limit_error", None, "rate_limit_exceeded", wait)
        case Overloaded():
            wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ErrorReply(429, str(error), "rate_limit_error", None, "overloaded", wait)
        case RequestTimedOut():
            return ErrorReply(504, str(error), "timeout_error", None, "request_timeout")
        case ServerStopping():
            wait = {"Retry-After": str(retry_after_s)}
            return ErrorReply(503, str(error), "service_unavailable_error", None, "shutting_down", wait)
        case GangNotReady():
            wait = {"Retry-After": str(retry_after_s)}
            return ErrorReply(503, str(error), "service_unavailable_error", None, "gang_not_ready", wait)
        case StepAborted():
            return ErrorReply(500, f"a step was aborted: {error}", SERVER_ERROR, None, "step_aborted")
        case AnswerLost():
            return ErrorReply(500, str(error), SERVER_ERROR, None, "answer_lost")
        case AnswerError():
            return ErrorReply(500, str(error), SERVER_ERROR, None, "answer_failed")
        case HTTPException():
            return _from_http_exception(error)
        case _:
            return ErrorReply(500, "internal error; the server's log has the details", SERVER_ERROR, None, "internal")


def _from_http_exception(error: HTTPException) -> ErrorReply:
    """What the router itself raises. Its detail is for people; the app words those that name the path."""
    return ErrorReply(
        error.status_code,
        str(error.detail),
        INVALID_REQUEST if error.status_code < 500 else SERVER_ERROR,
        None,
        {404: "path_not_found", 405: "method_not_allowed"}.get(error.status_code),
        dict(error.headers or {}),
    )


def no_such_route(error: HTTPException, method: str, path: str, known: Collection[str]) -> HTTPException:
    """The router's refusal, naming the path and the nearest one that there is."""
    shown = path if len(path) <= _MOST_PATH else path[:_MOST_PATH] + "..."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return HTTPException(405, f"{shown!r} doesn't take {method[:16]}; send {allowed}", error.headers)
    near = next((name for name in known if name.endswith(path) and len(path) > 1), None)
    near = near or next(iter(get_close_matches(path[:_MOST_PATH], known, n=1)), None)
    hint = f"did you mean {near}?" if near else "GET /docs lists what there is"
    return HTTPException(404, f"there is no path {shown!r}; {hint}", error.headers)
