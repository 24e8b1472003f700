"""Fields of OpenAI's and vLLM's surface that have no effect here: which are harmless, neutral, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

HARMLESS = frozenset(
    ["user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity"]
)
"""Accepted with any value: notes to the operator, or wishes that no model of this family can read."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "store": (None, False),
    "length_penalty": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none"),
    "modalities": (None, ["text"]),
    "spaces_between_special_tokens": (None, True),
    "use_beam_search": (None, False),
    "suffix": (None, ""),
    "priority": (None, 0),
}
"""Accepted with a value that asks for nothing beyond what is done anyway; refused with any other."""

UNSUPPORTED = frozenset(
    [
        "audio",
        "cache_salt",
        "chat_template",
        "documents",
        "function_call",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "include_reasoning",
        "kv_transfer_params",
        "logits_processors",
        "mm_processor_kwargs",
        "parallel_tool_calls",
        "prediction",
        "reasoning",
        "reasoning_effort",
        "request_id",
        "return_tokens_as_token_ids",
        "thinking",
        "thinking_token_budget",
        "vllm_xargs",
        "web_search_options",
        "prompt_embeds",
        "max_completion_tokens",
        "top_logprobs",
        "chat_template_kwargs",
        "messages",
        "prompt",
        "echo",
        "enable_thinking",
        "logprobs",
        "best_of",
        "add_generation_prompt",
        "continue_final_message",
    ]
)
"""Known by name, refused unless null. The last ones belong to one endpoint and are refused on the other."""


def strip_without_effect(data: object, neutral: Mapping[str, tuple[object, ...]]) -> object:
    """`data` without the fields whose value changes nothing; other values stay, to be refused by name."""
    if not isinstance(data, dict):
        return data
    return {name: value for name, value in data.items() if name not in neutral or not _is_one_of(value, neutral[name])}


def has_no_effect(name: str, value: object) -> bool:
    """Whether a field that the body's model lacks may be dropped."""
    if name in HARMLESS:
        return True
    if name in NEUTRAL:
        return _is_one_of(value, NEUTRAL[name])
    return name in UNSUPPORTED and value is None


def refusal(name: str, known: list[str]) -> tuple[str, str]:
    """Message and error code for a field that is refused."""
    if name in NEUTRAL and len(NEUTRAL[name]) > 1:
        return f"{name}: only {NEUTRAL[name][1]!r} is supported by this server; leave it out", "unsupported_parameter"
    if name in NEUTRAL or name in UNSUPPORTED:
        return f"{name} is not supported by this endpoint of this server; leave it out", "unsupported_parameter"
    close = get_close_matches(name[:64], known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; leave it out"
    return f"{name[:64]!r} is not a known field{hint}", "unknown_parameter"


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    # 1 == True in Python, but not in JSON.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)
