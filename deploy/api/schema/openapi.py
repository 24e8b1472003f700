"""What the OpenAPI document says of the generating endpoints, whose bodies are parsed by hand."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from divisi.deploy.api.body.protocol import ChatBody, CompletionBody, DetokenizeBody, GangBody, TokenizeBody
from divisi.deploy.api.body.surface import HARMLESS, NEUTRAL, UNSUPPORTED
from divisi.deploy.api.schema.chunks import ChatChunk, CompletionChunk
from divisi.deploy.api.schema.replies import ChatCompletion, Completion, Detokenized, ErrorBody, GangState, Tokenized


def chat_docs() -> dict[str, Any]:
    """Request and replies of /v1/chat/completions."""
    return _docs(ChatBody, ChatCompletion, ChatChunk)


def completion_docs() -> dict[str, Any]:
    """Request and replies of /v1/completions."""
    return _docs(CompletionBody, Completion, CompletionChunk)


def tokenize_docs() -> dict[str, Any]:
    """Request and reply of /tokenize."""
    return _docs(TokenizeBody, Tokenized)


def detokenize_docs() -> dict[str, Any]:
    """Request and reply of /detokenize."""
    return _docs(DetokenizeBody, Detokenized)


def gang_docs() -> dict[str, Any]:
    """Request and replies of POST /v1/admin/gang."""
    docs = _docs(GangBody, GangState)
    error = {"application/json": {"schema": _schema(ErrorBody)}}
    accepted = {"description": "Accepted; GET shows how it goes.", "content": docs["responses"]["200"]["content"]}
    refused = {"description": "No key that is marked as an admin's.", "content": error}
    return docs | {"responses": docs["responses"] | {"202": accepted, "403": refused}}


def reading_docs() -> dict[int | str, dict[str, Any]]:
    """Refusals of the paths that are only read."""
    content = {"application/json": {"schema": _schema(ErrorBody)}}
    return {"4XX": {"description": "Refused: no such model, or no API key that may.", "content": content}}


def ready_docs() -> dict[int | str, dict[str, Any]]:
    """Refusals of the readiness checks, and that the gang cannot serve now."""
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in ("status", "reason")}}
    not_ready = {"description": _ERRORS["503"], "content": {"application/json": {"schema": schema}}}
    return reading_docs() | {"503": not_ready}


def _docs(body: type[BaseModel], reply: type[BaseModel], chunk: type[BaseModel] | None = None) -> dict[str, Any]:
    """`chunk`: an event of the reply, where it can be streamed."""
    error = {"application/json": {"schema": _schema(ErrorBody)}}
    content: dict[str, Any] = {"application/json": {"schema": _schema(reply)}}
    if chunk is not None:
        content["text/event-stream"] = {"itemSchema": _event(chunk)}
    described = "The answer" + ("." if chunk is None else "; server-sent events where `stream` is true.")
    errors = {status: text for status, text in _ERRORS.items() if chunk is not None or status not in _OF_THE_ENGINE}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _body_schema(body)}}},
        "responses": {
            "200": {"description": described, "content": content},
            **{status: {"description": text, "content": error} for status, text in errors.items()},
        },
    }


_ERRORS = {
    "400": "The request cannot be served as it is.",
    "401": "No API key, or one that the server does not know.",
    "404": "No such model.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; see Retry-After.",
    "500": "The answer failed.",
    "503": "The gang cannot serve now; see Retry-After.",
    "504": "The answer took longer than the server allows.",
}
_OF_THE_ENGINE = frozenset({"429", "500", "503", "504"})


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """A server-sent event, as FastAPI and OpenAPI 3.2 describe them: JSON in `data`, and `[DONE]` after the last."""
    kinds: list[dict[str, Any]] = [
        {"contentMediaType": "application/json", "contentSchema": {"anyOf": [_schema(chunk), _schema(ErrorBody)]}},
        {"const": "[DONE]"},
    ]
    return {"type": "object", "properties": {"data": {"type": "string", "anyOf": kinds}}, "required": ["data"]}


def _body_schema(body: type[BaseModel]) -> dict[str, Any]:
    """What a body may hold, the fields without effect too."""
    schema = _schema(body)
    harmless = {name: {"description": "Accepted without effect."} for name in sorted(HARMLESS)}
    neutral = {name: {"enum": list(values)} for name, values in NEUTRAL.items()}
    unsupported = {name: {"type": "null"} for name in sorted(UNSUPPORTED)}
    return schema | {"properties": unsupported | neutral | harmless | schema["properties"]}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """A schema with its definitions in place, so that it can stand anywhere in the document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(definitions[node["$ref"].rpartition("/")[2]])
            return {name: inline(value) for name, value in node.items()}
        return [inline(value) for value in node] if isinstance(node, list) else node

    inlined: dict[str, Any] = inline(schema)
    return inlined
