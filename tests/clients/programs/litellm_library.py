"""Runs in LiteLLM's own environment: as a library, and as a router that must not give its deployment up.

Arguments: base URL, model name. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import litellm

QUESTION = "What is the weather in Lisbon?"
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Get the {what} in a city.", "parameters": PLACE}}
    for name, what in (("get_time", "time"), ("get_weather", "weather"))
]
OVERLONG = [{"role": "user", "content": "long " * 50_000}]


def agent(**fields: object) -> dict:
    """Two rounds of question, call, result and answer, its messages sent back as they came."""
    messages: list = []
    calls = []
    for _ in range(2):
        messages.append({"role": "user", "content": QUESTION})
        message = (
            litellm.completion(messages=messages, tools=TOOLS, temperature=0, max_tokens=128, **fields)
            .choices[0]
            .message
        )
        messages.append(message)
        for call in message.tool_calls or []:
            calls.append([call.function.name, json.loads(call.function.arguments).get("city")])
            messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "Clear."})
        chunks = list(litellm.completion(messages=messages, tools=TOOLS, stream=True, max_tokens=64, **fields))
        messages.append(litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message)
    return {"calls": calls, "answer": messages[-1].content}


def stopped(**fields: object) -> bool:
    """Whether a stop string ends an answer."""
    asked = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40, **fields}
    text = litellm.completion(**asked).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    return litellm.completion(stop=[stop], **asked).choices[0].message.content == text[: text.index(stop)]


def overlong(base_url: str, model: str) -> dict:
    """Errors of twenty overlong prompts through a router, and whether its deployment answers after them."""
    deployment = {"model": f"openai/{model}", "api_base": base_url, "api_key": "none"}
    router = litellm.Router(model_list=[{"model_name": "demo", "litellm_params": deployment}], num_retries=0)
    errors: Counter[str] = Counter()
    for _ in range(20):
        try:
            router.completion(model="demo", messages=OVERLONG)
        except Exception as error:  # noqa: BLE001 - which it is, is what is asked
            errors[type(error).__name__] += 1
    answer = router.completion(model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8)
    return {"errors": errors, "still used": bool(answer.choices)}


def main() -> None:
    """Call everything, and say what was seen."""
    base_url, model = sys.argv[1:]
    sky = {"type": "object", "properties": {"sky": {"enum": ["clear", "cloudy"]}}, "required": ["sky"]}
    sky["additionalProperties"] = False
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "schema": sky, "strict": True}}
    seen: dict = {}
    for provider in ("openai", "hosted_vllm"):
        fields = {"model": f"{provider}/{model}", "api_base": base_url, "api_key": "none"}
        seen[provider] = agent(**fields) | {"stopped": stopped(**fields)}
        asked = [{"role": "user", "content": QUESTION}]
        reply = litellm.completion(messages=asked, response_format=schema, max_tokens=200, **fields)
        seen[provider]["schema"] = list(json.loads(reply.choices[0].message.content))
    print(json.dumps(seen | overlong(base_url, model)))


main()
