"""What a person sees who opens the server in a browser: where things are, and the API's paths and fields.

The page is one file without scripts, fonts or images, so it needs no other host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from html import escape
from importlib.metadata import version
from typing import Any

from starlette.responses import HTMLResponse, JSONResponse, Response

from divisi.deploy.api.settings import ApiSettings

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
code {{ font: 13px ui-monospace, monospace }} td {{ padding: 0 1rem 0 0; vertical-align: top }}
summary {{ cursor: pointer; margin: .4rem 0 }}
</style>
<h1>{title}</h1>
<p>An OpenAI-compatible API. The whole description: <a href="openapi.json">openapi.json</a>.</p>
{paths}
</html>
"""


class Pages:
    """The two pages of one app."""

    def __init__(self, document: Callable[[], Mapping[str, Any]], settings: ApiSettings) -> None:
        """`document`: gives the OpenAPI document."""
        self._document = document
        self._settings = settings

    async def home(self) -> Response:
        """GET /: what this server is, and where to look next."""
        links = {name: f"/{name}" for name in ("docs", "openapi.json", "health", "metrics")}
        base = {"base_url": "/v1", "models": list(self._settings.model_names)}
        return JSONResponse({"name": "Divisi", "version": version("divisi"), **base, "links": links})

    async def docs(self) -> Response:
        """GET /docs."""
        return HTMLResponse(self._docs)

    @cached_property
    def _docs(self) -> str:
        document = self._document()
        title = f"{document['info']['title']}: {', '.join(self._settings.model_names)}"
        return _PAGE.format(title=escape(title), paths="\n".join(_operations(document)))


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            head = f"<code>{method.upper()} {escape(path)}</code> {escape(operation.get('description', ''))}"
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            yield f"<details><summary>{head}</summary>{_fields(body)}</details>" if body else f"<p>{head}</p>"


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = (
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}"
        f"<td>{escape(_kind(field))}<td>{escape(field.get('description', ''))}"
        for name, field in schema["properties"].items()
    )
    return f"<table>{''.join(rows)}</table>"


def _kind(field: Mapping[str, Any]) -> str:
    """The type of a field in a few words."""
    if "enum" in field:
        return ", ".join(map(repr, field["enum"]))
    kinds = [_kind(option) for option in field.get("anyOf", field.get("oneOf", ()))] or [field.get("type", "any")]
    return " or ".join(dict.fromkeys(kinds))
