"""Loaded by schemathesis: turns bodies that the schema allows into ones that reach the model.

The name of the served model is not in the schema, and an answer as long as the context would take seconds. What the
schema forbids stays as it was drawn.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Name the served model, and keep answers to eight tokens."""
    if not isinstance(body, dict):
        return body
    changed = dict(body)
    if isinstance(body.get("model"), str) and 1 <= len(body["model"]) <= 512:
        changed["model"] = os.environ["SERVED_MODEL"]
    for name in ("max_tokens", "max_completion_tokens"):
        if type(body.get(name)) is int and 1 <= body[name] < 2**31:
            changed[name] = 1 + body[name] % 8
    return changed
