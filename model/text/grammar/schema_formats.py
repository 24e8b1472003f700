"""The values of `format` in JSON schemas: which a grammar enforces, and which are notes to the reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENFORCED = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)
"""What llguidance holds a text to."""

NOTES = frozenset(
    # OpenAPI's registry
    {"binary", "byte", "char", "commonmark", "decimal", "double", "float", "html", "int8", "int16", "int32", "int64"}
    | {"media-range", "password", "uint8", "uint16", "uint32", "uint64"}
    # JSON Schema's own that the library doesn't know
    | {"idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex", "relative-json-pointer"}
    | {"uri-reference", "uri-template"}
    # pydantic's and zod's
    | {"base64", "base64url", "color", "cuid", "cuid2", "directory-path", "emoji", "file-path", "ipv4interface"}
    | {"ipv4network", "ipv6interface", "ipv6network", "ipvanyaddress", "ipvanyinterface", "ipvanynetwork"}
    | {"json-string", "jwt", "multi-host-uri", "nanoid", "new-path", "path", "phone", "socket-path", "ulid", "url"}
    | {"uuid1", "uuid3", "uuid4", "uuid5", "uuid6", "uuid7", "uuid8"}
)
"""What says something to people and validators only: accepted, and told to the client as not enforced."""


def may_be_text(schema: Mapping[str, Any]) -> bool:
    """Whether a text can be of a schema, by its `type`; a format says nothing of other values."""
    kinds = schema.get("type", "string")
    return kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
