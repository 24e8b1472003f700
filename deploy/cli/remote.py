"""An OpenAI-compatible server as the command line's own clients see it: its address, its errors, its event streams."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import httpx

from divisi.cluster.errors import DivisiError
from divisi.deploy.settings import SettingsError

CONNECT_TIMEOUT_S = 10.0
_ADVICE = {
    401: "give the server's key with --api-key, or --api-key @FILE",
    403: "this key may not do that; give another with --api-key",
    429: "the server is full or your key's rate is used up",
    503: "the server cannot serve now; it may still be loading or recovering",
}


class RemoteError(DivisiError):
    """The server, or the way to it, failed. `status` is None where no HTTP answer came."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def connection(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of an httpx client for the flags of `add_connection_flags`. Raises SettingsError."""
    url = args.base_url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"--base-url: {args.base_url!r} has no scheme; write it as http://HOST:PORT/v1")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise SettingsError(
            f"--base-url: {args.base_url!r} is no URL: {error}; write it as http://HOST:PORT/v1"
        ) from None
    key = read_key(args.api_key)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return {"base_url": url, "headers": headers, "timeout": httpx.Timeout(args.timeout, connect=CONNECT_TIMEOUT_S)}


def read_key(value: str | None) -> str | None:
    """An API key as given, or out of the file that `@FILE` names. Raises SettingsError."""
    key = value
    if value is not None and value.startswith("@"):
        try:
            key = Path(value[1:]).read_text(encoding="utf-8-sig", errors="replace").strip()
        except OSError as error:
            raise SettingsError(f"--api-key: {value[1:]}: cannot be read: {error.strerror}") from None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise SettingsError("--api-key: the key has other than printable ASCII characters; give it as it was issued")
    return key


def refusal(status: int, body: bytes, retry_after: str | None = None) -> RemoteError:
    """The error of a reply that is none of the 200s: the server's words, and what to do."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace").strip()[:200] or "no reason given"
    advice = _ADVICE.get(status, "")
    if status == 404 and "model" not in message:
        advice = "does the base URL end in /v1 (or whatever stands before /chat/completions)?"
    if retry_after is not None:
        advice = f"{advice}; try again in {retry_after} s".lstrip("; ")
    return RemoteError(f"HTTP {status}: {message}" + (f" ({advice})" if advice else ""), status)


def unreachable(error: httpx.RequestError, url: str) -> RemoteError:
    """The error of a request that got no answer, or not a whole one."""
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout():
            return RemoteError(
                f"no server answers at {url}: start one with `divisi serve MODEL_DIR`, or name another with --base-url"
            )
        case httpx.TimeoutException():
            return RemoteError(f"{url} took too long to answer; give it more time with --timeout SECONDS")
        case _:
            return RemoteError(f"the connection to {url} broke off: {str(error) or type(error).__name__}")


def served_models(client: httpx.Client) -> list[str]:
    """The ids that GET /models names. Raises RemoteError."""
    try:
        reply = client.get("/models")
    except httpx.RequestError as error:
        raise unreachable(error, str(client.base_url).rstrip("/")) from None
    if reply.status_code != 200:
        raise refusal(reply.status_code, reply.content, reply.headers.get("retry-after"))
    try:
        return [str(entry["id"]) for entry in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise RemoteError(f"{client.base_url} is no OpenAI API: GET /models answers something else") from None


def pick_model(client: httpx.Client, wanted: str | None) -> str:
    """`wanted`, or the first model that the server names. Raises RemoteError."""
    if wanted is not None:
        return wanted
    names = served_models(client)
    if not names:
        raise RemoteError("the server names no model; name one with --model")
    return names[0]


def parse_event(line: str) -> dict[str, Any] | None:
    """The JSON of one line of an event stream; None for a line that carries none.

    Raises RemoteError for an event that reports an error, or that is no JSON.
    """
    if not line.startswith("data:"):
        return None
    data = line[5:].strip()
    if not data or data == "[DONE]":
        return None
    try:
        event = json.loads(data)
    except ValueError:
        raise RemoteError(f"the stream holds something that is no JSON: {data[:80]}") from None
    if not isinstance(event, dict):
        raise RemoteError(f"the stream holds something that is no event: {data[:80]}")
    if "error" in event:
        raise RemoteError(f"the answer broke off: {_reason(event['error'])}", 200)
    return event


def is_end(line: str) -> bool:
    """Whether this line ends a stream as it should end."""
    return line.startswith("data:") and line[5:].strip() == "[DONE]"


def stream_events(client: httpx.Client, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """POST `body` and yield the events of the stream. Raises RemoteError; closing it ends the request."""
    try:
        with client.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                raise refusal(reply.status_code, reply.read(), reply.headers.get("retry-after"))
            for line in reply.iter_lines():
                if is_end(line):
                    return
                if (event := parse_event(line)) is not None:
                    yield event
    except httpx.RequestError as error:
        raise unreachable(error, str(client.base_url).rstrip("/")) from None
    raise RemoteError("the stream ended before its end: the server or a proxy closed it")


async def stream_events_async(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The same for many requests at once."""
    try:
        async with client.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                raise refusal(reply.status_code, await reply.aread(), reply.headers.get("retry-after"))
            async for line in reply.aiter_lines():
                if is_end(line):
                    return
                if (event := parse_event(line)) is not None:
                    yield event
    except httpx.RequestError as error:
        raise unreachable(error, str(client.base_url).rstrip("/")) from None
    raise RemoteError("the stream ended before its end: the server or a proxy closed it")


def _reason(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
