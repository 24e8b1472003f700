"""Runs in instructor's own environment: typed answers in each of its modes, and a retry that sends an answer back.

Arguments: base URL, model name. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import sys

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel, field_validator

MODES = (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA)
ASK = [{"role": "user", "content": "What is the weather in Lisbon?"}]


class Place(BaseModel):
    """A place."""

    city: str


class Never(Place):
    """A place that no answer is."""

    @field_validator("city")
    @classmethod
    def _refuse(cls, city: str) -> str:
        raise ValueError(f"{city} is not a city; try again")


def main() -> None:
    """Ask in every mode, and say what was seen."""
    base_url, model = sys.argv[1:]
    raw = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
    fields = {"model": model, "messages": ASK, "temperature": 0, "max_tokens": 128}
    seen: dict = {"places": {}}
    for mode in MODES:
        client = instructor.from_openai(raw, mode=mode)
        seen["places"][mode.value] = client.chat.completions.create(response_model=Place, **fields).city
    client = instructor.from_openai(raw)
    partials = list(client.chat.completions.create_partial(response_model=Place, **fields))
    seen["partials"] = partials[-1].city
    try:
        client.chat.completions.create(response_model=Never, max_retries=3, **fields)
    except InstructorRetryException as error:
        seen["retries"] = error.n_attempts
        seen["refused"] = "400" in str(error)
    print(json.dumps(seen))


main()
