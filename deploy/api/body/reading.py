"""From the bytes of an HTTP request to a validated body, or an error that names the field."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request as HttpRequest

from divisi.deploy.api.body.inflating import Gunzip, Plain, TooMuchError
from divisi.deploy.api.body.replayed import Dropped
from divisi.deploy.api.body.surface import has_no_effect, refusal
from divisi.deploy.api.body.surrogates import mend_surrogates
from divisi.deploy.api.errors import ApiError

_INLINE_BYTES = 32_768
"""A body of so many bytes takes 1 ms, and a thread's turn 0.1 ms."""
BodyT = TypeVar("BodyT", bound=BaseModel)
_LENGTHS = {
    "too_short": ("at least", "min_length"),
    "too_long": ("at most", "max_length"),
    "string_too_short": ("at least", "min_length"),
    "string_too_long": ("at most", "max_length"),
}
_OBJECT_TYPES = frozenset({"model_type", "dict_type"})


async def read_body(http: HttpRequest, max_bytes: int) -> bytes:
    """The body of a JSON request. Raises ApiError: 415 for another content type or encoding, 413 past the limit.

    The limit counts what comes out of a compressed body.
    """
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(
            f"Content-Type is {content_type or 'missing'!r}; send 'Content-Type: application/json'",
            status=415,
            code="unsupported_media_type",
        )
    encoding = http.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise ApiError(
            f"Content-Encoding {encoding[:64]!r} is not supported; send the body uncompressed, or in one layer of gzip",
            status=415,
            code="unsupported_media_type",
        )
    declared = http.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    sink = Plain(max_bytes) if encoding == "identity" else Gunzip(max_bytes)
    try:
        async for piece in http.stream():
            sink.write(piece)
        return sink.close()
    except TooMuchError:
        raise _too_large(max_bytes) from None
    except zlib.error as error:
        raise ApiError(
            f"the body is not what gzip makes ({error}); send it whole, or uncompressed", code="invalid_encoding"
        ) from None


async def read_parsed(kind: type[BodyT], http: HttpRequest, max_bytes: int, dropped: Dropped) -> BodyT:
    """Read and validate a body; a long one in a thread, so that it holds up no stream. Raises as its two parts do."""
    raw = await read_body(http, max_bytes)
    if len(raw) <= _INLINE_BYTES:
        return parse_body(kind, raw, dropped)
    return await asyncio.to_thread(parse_body, kind, raw, dropped)


def parse_body(kind: type[BodyT], raw: bytes, dropped: Dropped | None = None) -> BodyT:
    """Validate a body; `dropped` takes note of what it loses. Raises ApiError for the first thing that is wrong."""
    data = _from_json(raw)
    if not isinstance(data, dict):
        raise ApiError(f"the body must be a JSON object, not {_shown(data)}", code="invalid_type")
    known = kind.model_fields
    for name in [name for name in data if name not in known]:
        if not has_no_effect(name, data[name]):
            message, code = refusal(name, list(known))
            raise ApiError(message, param=name[:64], code=code)
        del data[name]
    try:
        return kind.model_validate(data, context=dropped)
    except ValidationError as error:
        raise _from_validation(error) from None


def _from_json(raw: bytes) -> Any:
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        # Latin-1 gives each byte a character of its own, and back.
        mended = mend_surrogates(raw.decode("latin-1")).encode("latin-1")
        if mended != raw:
            return _from_json(mended)
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from error


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(f"the body has more than {max_bytes} bytes; send less", status=413, code="body_too_large")


def _from_validation(error: ValidationError) -> ApiError:
    """The first complaint, as `field: what is wrong, what was sent`."""
    first: Mapping[str, Any] = error.errors(include_url=False)[0]
    param, given = _place(first["loc"]), first["input"]
    kind, message = first["type"], first["msg"]
    if kind == "role":  # found by a message's role, so the place is the message's
        param, given = f"{param}.role", given["role"]
    if kind == "missing":
        return ApiError(f"{param} is required", param=param, code="missing_parameter")
    if kind == "extra_forbidden":
        return ApiError(f"{param} is not supported here; leave it out", param=param, code="unsupported_parameter")
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        # A check across fields has no place of its own; its text begins with the field's name.
        return ApiError(f"{param}: {text}" if param else text, param=param or text.split()[0].strip(":"))
    if kind in _LENGTHS:
        # Pydantic's text goes on about validation and says the length twice.
        return ApiError(f"{param}: {_length_text(kind, first)}", param=param, code=_code(kind))
    text = "input should be a JSON object" if kind in _OBJECT_TYPES else _lower(message)
    return ApiError(f"{param}: {text}, but it is {_shown(given)}", param=param, code=_code(kind))


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _length_text(kind: str, first: Mapping[str, Any]) -> str:
    word, bound = _LENGTHS[kind]
    limit = first["ctx"][bound]
    unit = ("character" if kind.startswith("string") else "item") + ("" if limit == 1 else "s")
    return f"must have {word} {limit} {unit}, but has {len(first['input'])}"


def _place(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`; union tags left out."""
    place = ""
    for step in location:
        if isinstance(step, int):
            place += f"[{step}]"
        elif not step.startswith("<") and step != "[key]":
            place += f".{step[:64]}" if place else step[:64]
    return place


def _code(kind: str) -> str:
    return "invalid_type" if kind.endswith("_type") or kind == "kind" else "invalid_value"


def _shown(value: object) -> str:
    """A value for people, cut short; containers by size, since theirs may hold megabytes."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return f"an object of {len(value)}"
        case list():
            return f"a list of {len(value)}"
        case str() if len(value) > 64:
            return f"a string of {len(value)} characters"
        case int() if abs(value) > 10**20:
            return "a huge integer"
        case _:
            return repr(value)
