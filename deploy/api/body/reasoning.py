"""How much a chat answer thinks: the template's switch, and a budget in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from divisi.deploy.api.errors import ApiError

Effort = Literal["none", "minimal", "low", "medium", "high"]

BUDGETS: dict[str, int | None] = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": None}
"""Thinking tokens per effort; None for as many as it takes."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a request asks of the thinking part."""

    arguments: dict[str, Any]
    """For the template: `enable_thinking`, unless the request's own arguments say it."""
    budget: int | None


def thinking_of(effort: Effort | None, budget: int | None, arguments: dict[str, Any], *, thinks: bool) -> Thinking:
    """Resolve the fields; an explicit `thinking_token_budget` wins over the effort's.

    Raises ApiError where a model whose template knows no thinking is asked to think.
    """
    if not thinks:
        field = "reasoning_effort" if effort not in (None, "none") else "thinking_token_budget" if budget else None
        if field is not None:
            raise ApiError(f"{field}: this model's chat template knows no thinking; leave it out", param=field)
        return Thinking({}, None)
    switch = {} if effort is None or "enable_thinking" in arguments else {"enable_thinking": effort != "none"}
    return Thinking(switch, BUDGETS[effort] if budget is None and effort is not None else budget)
