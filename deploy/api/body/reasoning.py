"""How much a chat answer thinks: the template's switch, and a budget in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from divisi.deploy.api.body.base import Body
from divisi.deploy.api.body.sampling_fields import MAX_INT
from divisi.deploy.api.errors import ApiError

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

BUDGETS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 2048,
    "medium": 8192,
    "high": None,
    "xhigh": None,
}
"""Thinking tokens per effort; None for as many as it takes."""


class ThinkingSwitch(Body):
    """Anthropic's form; `adaptive` leaves it to the model's own default."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)

    @property
    def on(self) -> bool | None:
        """What it says, None for nothing."""
        return {"enabled": True, "disabled": False, "adaptive": None}[self.type]


@dataclass(frozen=True, slots=True)
class ThinkingWish:
    """What a request's fields say, None for nothing. The switch wins over the effort's, and so does the budget."""

    effort: Effort | None
    switch: bool | None
    budget: int | None

    @property
    def asking(self) -> str | None:
        """The field by which it asks for thinking; None where it doesn't."""
        if self.switch is not None:
            return "enable_thinking" if self.switch else None
        if self.effort not in (None, "none"):
            return "reasoning_effort"
        return "thinking_token_budget" if self.budget else None


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a request asks of the thinking part."""

    arguments: dict[str, Any]
    """For the template: `enable_thinking`, unless the request's own arguments say it."""
    budget: int | None


def thinking_of(wish: ThinkingWish, arguments: dict[str, Any], *, thinks: bool) -> Thinking:
    """Resolve the fields; `arguments` are the request's own for the template, and win.

    Raises ApiError where a model whose template knows no thinking is asked to think.
    """
    if not thinks:
        if (field := wish.asking) is not None:
            raise ApiError(f"{field}: this model's chat template knows no thinking; leave it out", param=field)
        return Thinking({}, None)
    switch = wish.switch if wish.switch is not None or wish.effort is None else wish.effort != "none"
    said = {} if switch is None or "enable_thinking" in arguments else {"enable_thinking": switch}
    return Thinking(said, BUDGETS[wish.effort] if wish.budget is None and wish.effort is not None else wish.budget)
