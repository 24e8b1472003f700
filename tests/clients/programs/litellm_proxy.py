"""Runs in LiteLLM's own environment: its proxy in front of the server, called with the openai client.

Arguments: base URL, model name. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai

QUESTION = {"role": "user", "content": "What is the weather in Lisbon?"}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Get the {what} in a city.", "parameters": PLACE}}
    for name, what in (("get_time", "time"), ("get_weather", "weather"))
]
READY_S = 180


KEY = "sk-" + secrets.token_hex(32)
"""The proxy's own: it starts with none but a strong one."""


def call_through(url: str) -> dict:
    """A tool's round trip, whole and streamed, then twenty overlong prompts and one more question."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
    messages: list = [QUESTION]
    fields = {"model": "demo", "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 128}
    first = client.chat.completions.create(**fields).choices[0].message
    messages.append(first)
    calls = [[call.function.name, json.loads(call.function.arguments).get("city")] for call in first.tool_calls or []]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "Clear."} for call in first.tool_calls or []]
    with client.chat.completions.stream(**fields) as stream:
        messages += [stream.get_final_completion().choices[0].message, QUESTION]
    client.chat.completions.create(**fields)
    errors = []
    for _ in range(20):
        try:
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "long " * 50_000}])
        except openai.APIStatusError as error:
            errors.append([error.status_code, "ContextWindowExceededError" in str(error)])
    after = client.chat.completions.create(model="demo", messages=[QUESTION], max_tokens=8)
    return {"calls": calls, "errors": errors, "still used": bool(after.choices)}


def main() -> None:
    """Start the proxy, call through it, end it."""
    base_url, model = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    params = {"model": f"openai/{model}", "api_base": base_url, "api_key": "none"}
    config = {
        "model_list": [{"model_name": "demo", "litellm_params": params}],
        "litellm_settings": {"num_retries": 0},
        "general_settings": {"master_key": KEY},
    }
    Path("proxy.yaml").write_text(json.dumps(config))  # JSON is YAML, too
    command = [str(Path(sys.executable).parent / "litellm"), "--config", "proxy.yaml", "--port", str(port)]
    with Path("proxy.log").open("w") as log:
        proxy = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + READY_S
        while True:
            try:
                httpx.get(f"{url}/health/liveliness", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if proxy.poll() is not None or time.monotonic() > until:
                    sys.exit("the proxy does not answer:\n" + Path("proxy.log").read_text()[-3000:])
                time.sleep(0.5)
        print(json.dumps(call_through(url)))
    finally:
        proxy.terminate()
        proxy.wait(30)


main()
