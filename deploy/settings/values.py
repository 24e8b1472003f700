"""How the values of settings are spelled, and what is checked of each by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30}


def parse_bytes(value: object) -> object:
    """Turn `512MiB`, `2 GiB`, `1.5GB` or `4096` into bytes; leave what is no text to the caller's validation."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", value.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("not a size: write bytes, or a number with a unit as in 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def as_list(value: object) -> object:
    """Turn `a,b` into a list, as flags spell one, and null into none."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    return () if value is None else value


def _check_origin(origin: str) -> str:
    if origin != "*" and re.fullmatch(r"https?://[^/?#@\s]+", origin) is None:
        raise ValueError("not an origin: write scheme, host and port if any, as in https://chat.example.org, or *")
    return origin.lower()


def _check_endpoint(url: str) -> str:
    if re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", url) is None:
        raise ValueError("not a URL: write scheme, host and port, as in http://127.0.0.1:4318")
    return url.rstrip("/")


_NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}}
COMMAS = WithJsonSchema({"anyOf": [_NAMES, {"type": "string"}]})
ModelName = Annotated[str, Field(min_length=1)]
NodeLabel = Annotated[str, Field(min_length=1)]
Origin = Annotated[str, AfterValidator(_check_origin)]
OtlpUrl = Annotated[str, AfterValidator(_check_endpoint)]
"""A collector, or the path on it that takes one kind of signal."""
_SIZE = {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([bB]|[kKmMgGtT][iI]?[bB]|[kKmMgG])?\s*$"}
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema({"anyOf": [{"type": "integer"}, _SIZE]})]
FilePath = Annotated[Path, WithJsonSchema({"type": "string", "minLength": 1})]
HerePath = Annotated[FilePath, AfterValidator(Path.absolute)]
"""Relative to where the command was given, not to where a process of Ray happens to run."""
