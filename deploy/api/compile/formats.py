"""The formats of a request's schemas that its answer is not held to, for a header of the reply."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from divisi.deploy.api.body.protocol import ChatBody, GenerationBody
from divisi.deploy.api.body.structured import JsonSchema
from divisi.deploy.api.body.tools import is_forced
from divisi.model.text.grammar.compiler import GrammarCompiler
from divisi.model.text.grammar.reader import GrammarError

UNENFORCED = "X-Unenforced-Formats"


def unenforced_formats(body: GenerationBody, grammars: GrammarCompiler) -> Sequence[str]:
    """Their names, sorted; of schemas that hold the answer only. The body has been compiled."""
    found: set[str] = set()
    for schema in _schemas(body):
        with contextlib.suppress(GrammarError):  # arguments of a forced call, which are free then
            found.update(grammars.enforceable(schema).notes)
    return sorted(found)


def _schemas(body: GenerationBody) -> Iterator[Mapping[str, Any] | bool]:
    if isinstance(body.response_format, JsonSchema):
        yield body.response_format.json_schema.schema_
    if body.structured_outputs is not None and body.structured_outputs.json_ is not None:
        yield body.structured_outputs.json_
    if isinstance(body, ChatBody) and body.tool_choice != "none":
        forced = is_forced(body.tool_choice)
        functions = [tool.function for tool in body.tools or ()]
        yield from (
            function.parameters for function in functions if function.parameters and (forced or function.strict)
        )
