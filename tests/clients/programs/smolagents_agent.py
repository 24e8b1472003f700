"""Runs in smolagents' own environment: its agent that calls tools, for a few steps.

Arguments: base URL, model name. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool

CALLS: list = []


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city.

    Args:
        city: The city.
    """
    CALLS.append(city)
    return json.dumps({"temperature": 16, "sky": "clear"})


def main() -> None:
    """Run the agent, and say what it did."""
    base_url, model = sys.argv[1:]
    served = OpenAIModel(model_id=model, api_base=base_url, api_key="none", temperature=0, max_tokens=128)
    runs = []
    for streamed in (False, True):
        agent = ToolCallingAgent(tools=[get_weather], model=served, max_steps=3, stream_outputs=streamed)
        result = agent.run("What is the weather in Lisbon?", return_full_result=True)
        steps = [step for step in result.steps if "step_number" in step]
        names = [call["function"]["name"] for step in steps for call in step.get("tool_calls") or []]
        errors = [str(step["error"])[:300] for step in steps if step.get("error")]
        runs.append({"steps": len(steps), "names": names, "errors": errors})
    print(json.dumps({"runs": runs, "calls": CALLS}))


main()
