"""What every part of a request body shares."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator

# Alternatives of a union are tagged, so that an error is reported for the one that the client meant. Tags begin with
# "<" to tell them from field names when an error's place is spelled out.


class Body(BaseModel):
    """Exact types, no unknown fields, finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def text_or_list(value: object) -> str | None:
    """The tag of a value that may be a text or a list."""
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def one_of(kind: Any, expected: str) -> Discriminator:
    """Of tagged alternatives, the one that `kind` finds; `expected` is what the error says where it finds none."""
    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be {expected}")
