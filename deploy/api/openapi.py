"""What the OpenAPI document says of the generating endpoints, whose bodies are parsed by hand."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from divisi.deploy.api.protocol import ChatBody, CompletionBody
from divisi.deploy.api.replies import ChatCompletion, Completion, ErrorBody


def chat_docs() -> dict[str, Any]:
    """Request and replies of /v1/chat/completions."""
    return _docs(ChatBody, ChatCompletion)


def completion_docs() -> dict[str, Any]:
    """Request and replies of /v1/completions."""
    return _docs(CompletionBody, Completion)


def _docs(body: type[BaseModel], reply: type[BaseModel]) -> dict[str, Any]:
    error = {"application/json": {"schema": _schema(ErrorBody)}}
    streamed = {"schema": {"type": "string"}}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _schema(body)}}},
        "responses": {
            "200": {
                "description": "The answer; server-sent events where `stream` is true.",
                "content": {"application/json": {"schema": _schema(reply)}, "text/event-stream": streamed},
            },
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }


_ERRORS = {
    "400": "The request cannot be served as it is.",
    "404": "No such model.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; see Retry-After.",
    "500": "The answer failed.",
    "503": "The gang cannot serve now; see Retry-After.",
}


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
