"""SDKs, agents and proxies, unmodified, against the demo model: nothing that they send by default is refused.

Each runs in its own environment. What is asserted is the effect: the tool was called, the schema met, `stop` honoured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Bench, replies

pytestmark = [pytest.mark.verify, pytest.mark.timeout(1800)]  # the first use of a client installs it

PROGRAMS = Path(__file__).parent / "programs"
CALL = ["get_weather", "Lisbon"]
CHAT = "/v1/chat/completions"


@pytest.fixture
def refused(demo: Bench) -> Iterator[list[int]]:
    """How many chat requests of the test may be refused: the test says it by appending."""
    expected: list[int] = []
    before = replies(demo)
    yield expected
    after = replies(demo)
    after.subtract(before)
    assert not [key for key, count in after.items() if count and key[1] >= "500"]
    assert sum(count for key, count in after.items() if key[1].startswith("4")) == sum(expected), after


def run(demo: Bench, client: str, program: str) -> Any:
    """What a program saw: the last line that it printed."""
    return json.loads(demo.run(client, "python", PROGRAMS / program, f"{demo.url}/v1", demo.model).splitlines()[-1])


def test_openai(demo: Bench, refused: list[int]) -> None:
    seen = run(demo, "openai", "openai_turns.py")
    assert seen["calls"] == [["get_weather", city] for city in ("Lisbon", "Oslo", "Paris", "Rome", "Berlin")]
    assert all(seen["answers"])
    assert seen["schema"]
    assert seen["stopped"]


def test_langchain(demo: Bench, refused: list[int]) -> None:
    refused.append(1)  # the overlong prompt
    seen = run(demo, "langchain-openai", "langchain_agent.py")
    assert seen["calls"] == [CALL, CALL]
    assert seen["json_schema"]
    assert seen["function_calling"]
    assert seen["stopped"]
    assert "ContextOverflowError" in seen["overlong"]


def test_litellm(demo: Bench, refused: list[int]) -> None:
    refused.append(20)
    seen = run(demo, "litellm", "litellm_library.py")
    for provider in ("openai", "hosted_vllm"):
        assert seen[provider]["calls"] == [CALL, CALL]
        assert seen[provider]["answer"]
        assert seen[provider]["stopped"]
        assert seen[provider]["schema"] == ["sky"]
    assert seen["errors"] == {"ContextWindowExceededError": 20}
    assert seen["still used"]


def test_litellm_proxy(demo: Bench, refused: list[int]) -> None:
    refused.append(20)
    seen = run(demo, "litellm", "litellm_proxy.py")
    assert seen["calls"] == [CALL]
    assert seen["errors"] == [[400, True]] * 20
    assert seen["still used"]


def test_pydantic_ai(demo: Bench, refused: list[int]) -> None:
    seen = run(demo, "pydantic-ai-slim", "pydantic_ai_agent.py")
    assert seen["calls"] == [CALL, CALL]
    assert all(seen["answers"])
    assert seen["tool"]
    assert seen["native"]
    assert seen["stopped"]


def test_instructor(demo: Bench, refused: list[int]) -> None:
    seen = run(demo, "instructor", "instructor_models.py")
    assert len(seen["places"]) == 3
    assert all(seen["places"].values())
    assert seen["partials"]
    assert seen["retries"] > 3
    assert not seen["refused"]


def test_smolagents(demo: Bench, refused: list[int]) -> None:
    seen = run(demo, "smolagents", "smolagents_agent.py")
    assert seen["calls"]
    for done in seen["runs"]:
        assert done["names"]
        assert not [error for error in done["errors"] if "400" in error]


def test_ai_sdk(demo: Bench, refused: list[int]) -> None:
    out = demo.run_node("ai-sdk", PROGRAMS / "ai_sdk.mjs", f"{demo.url}/v1", demo.model)
    for seen in json.loads(out.splitlines()[-1]).values():
        assert seen["calls"] == [CALL] * 3
        assert all(seen["answers"])
        assert seen["schema"]["sky"] in ("clear", "cloudy")
        assert seen["stopped"]
