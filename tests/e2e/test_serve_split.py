"""The split cluster as its users see it: `divisi serve`, the `openai` client, and processes that die."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from tests.e2e.chaos.asks import asks
from tests.e2e.chaos.blows import plan
from tests.e2e.chaos.harness import Chaos
from tests.e2e.chaos.run import verdict_of
from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)


def metric(cluster: Cluster, name: str) -> list[float]:
    text = httpx.get(f"{cluster.url}/metrics", timeout=10).text
    return [float(value) for value in re.findall(rf"^divisi_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)]


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, what
        threading.Event().wait(0.2)


def complete(client: openai.OpenAI, max_tokens: int) -> str:
    answer = client.completions.create(
        model="small", prompt="Once upon a time", max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


def test_live_before_ready(cluster: Cluster, record_result: Callable[[str, object], None]) -> None:
    record_result("seconds until ready", round(cluster.ready_after_s, 1))
    assert cluster.ready_after_s < 60
    assert cluster.health, "it never said that it was alive but not ready"
    # Until Serve knows the routes, everything is answered 404, and by HAProxy 503, for a second or so.
    assert {pair for pair in cluster.health if pair[0] == 200} == {(200, 503)}
    assert {live for live, _ in cluster.health} <= {200, 404, 503}
    wait_for(lambda: "curl http://" in cluster.log.read_text(), 10, "no ready line")


def test_the_request_log_lies_where_the_start_has_said(cluster: Cluster) -> None:
    named = re.search(r"^Request log: (.*)$", cluster.log.read_text(), re.MULTILINE)
    assert named is not None
    file = Path(named[1])
    assert file.parent == cluster.log.parent / "divisi"  # XDG_STATE_HOME
    httpx.get(f"{cluster.url}/v1/models", headers={"x-request-id": "look-for-me"}, timeout=10)
    wait_for(lambda: "look-for-me" in file.read_text(), 10, "the request is not in the log")


def test_one_request_id_comes_back(cluster: Cluster) -> None:
    """Serve's proxy adds it, so that the ingress must not."""
    reply = httpx.get(f"{cluster.url}/v1/models", headers={"X-Request-Id": "mine"}, timeout=10)
    assert reply.headers.get_list("x-request-id") == ["mine"]


def test_chat_and_completions_stream(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Who are you?"}]
    whole = client.chat.completions.create(model="small", messages=messages, max_tokens=20, temperature=0)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model="small",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=20,
        temperature=0,
        stream=True,
    )
    pieces = [choice for chunk in stream for choice in chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.choices[0].finish_reason]
    text = complete(client, 20)
    parts = client.completions.create(
        model="small",
        prompt="Once upon a time",
        max_tokens=20,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert "".join(choice.text for chunk in parts for choice in chunk.choices) == text


def test_a_disconnected_client_frees_what_it_held(cluster: Cluster) -> None:
    wait_for(lambda: metric(cluster, "requests_running") == [0.0], 10, "something still runs")
    free = metric(cluster, "kv_pages_free")
    assert free
    body = {"model": "small", "prompt": "long", "max_tokens": 900, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=30) as response:
        response.raise_for_status()
        lines = response.iter_lines()  # held, since dropping it would close the connection
        next(lines)
        wait_for(lambda: metric(cluster, "requests_running") == [1.0], 10, "the request never ran")
    wait_for(lambda: metric(cluster, "requests_running") == [0.0], 5, "the request outlived its client")
    assert metric(cluster, "kv_pages_free") == free


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"model": "other", "prompt": "x"}', 404),
        (b'{"model": "small", "prompt": "x", "max_tokens": "many"}', 400),
        (b'{"model": "small", "prompt": "x", "mood": 1}', 400),
        (b'{"model": "small", "prompt": "\xff"}', 400),
        (b'{"model": "small", "prompt": [1,2,3], "max_tokens": 100000}', 400),
    ],
)
def test_bad_input_is_refused_and_the_server_goes_on(
    cluster: Cluster, client: openai.OpenAI, body: bytes, status: int
) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{cluster.url}/v1/completions", content=body, headers=headers, timeout=30)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert complete(client, 2)


def test_a_shard_reads_and_holds_only_its_experts(cluster: Cluster, small_model: Path) -> None:
    config, checkpoint = ModelConfig.load(small_model), Checkpoint.open(small_model)
    for layer in config.moe_layers:
        checkpoint.read_experts(layer, range(config.num_experts), config, None)
    shares = metric(cluster, "expert_weight_bytes_read")
    assert len(shares) == 2
    assert sum(shares) == checkpoint.bytes_read
    assert max(shares) / sum(shares) < 0.55


def test_an_idle_cluster_uses_little_processor_time(
    cluster: Cluster, record_result: Callable[[str, object], None]
) -> None:
    ranks = cluster.shards() + cluster.processes("AttentionWorker")
    assert len(ranks) == 3

    def used() -> float:
        return sum(sum(rank.cpu_times()[:2]) for rank in ranks)

    before, begin = used(), time.monotonic()
    threading.Event().wait(4.0)
    share = (used() - before) / (time.monotonic() - begin)
    record_result("share of a core, three idle rank processes with Ray's own threads", round(share, 3))
    assert share < 0.25


def answer_while_killing(client: openai.OpenAI, victim: psutil.Process) -> tuple[str, float]:
    """Stream an answer of 400 tokens and kill a process early in it: the text, and the longest pause in seconds."""
    stream = client.completions.create(
        model="small",
        prompt="Once upon a time",
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    got, longest, last, killed = "", 0.0, time.monotonic(), False
    for chunk in stream:
        got += "".join(choice.text for choice in chunk.choices)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        if not killed and len(got) > 20:
            os.kill(victim.pid, signal.SIGKILL)
            killed = True
    return got, longest


def test_an_answer_goes_on_when_a_shard_is_killed(
    cluster: Cluster, client: openai.OpenAI, record_result: Callable[[str, object], None]
) -> None:
    want = complete(client, 400)
    got, pause_s = answer_while_killing(client, cluster.shards()[0])
    record_result("seconds of pause when a shard process was killed", round(pause_s, 2))
    assert got == want
    assert sum(metric(cluster, "aborted_steps_total")) >= 1
    cluster.wait_until_ready(30)


def test_an_answer_goes_on_when_the_coordinator_is_killed(
    cluster: Cluster, client: openai.OpenAI, record_result: Callable[[str, object], None]
) -> None:
    """The epoch goes on, and the next coordinator adopts it."""
    want = complete(client, 400)
    before = metric(cluster, "epoch"), metric(cluster, "aborted_steps_total")
    (coordinator,) = cluster.processes("CoordinatorActor")
    got, pause_s = answer_while_killing(client, coordinator)
    record_result("seconds of pause when the coordinator was killed", round(pause_s, 2))
    assert got == want
    wait_for(lambda: not psutil.pid_exists(coordinator.pid), 10, "it lives")
    wait_for(
        lambda: (metric(cluster, "epoch"), metric(cluster, "aborted_steps_total")) == before, 30,
        "the epoch is not adopted, or a step was aborted",
    )  # fmt: skip


def test_an_answer_goes_on_when_the_only_attention_worker_is_killed(
    cluster: Cluster, client: openai.OpenAI, record_result: Callable[[str, object], None]
) -> None:
    want = complete(client, 400)
    (worker,) = cluster.processes("AttentionWorker")
    got, pause_s = answer_while_killing(client, worker)
    record_result("seconds of pause when the only attention worker was killed", round(pause_s, 2))
    assert got == want
    assert metric(cluster, "resumed_requests_total") == [1.0]
    assert metric(cluster, "recomputed_tokens_total")[0] > 4
    cluster.wait_until_ready(30)


def test_an_answer_goes_on_when_the_owner_of_the_gang_is_killed(
    cluster: Cluster, client: openai.OpenAI, record_result: Callable[[str, object], None]
) -> None:
    """The next owner adopts the coordinator and the shards: nobody else notices."""
    want = complete(client, 400)
    epoch = metric(cluster, "epoch")
    owned = {process.pid for process in (*cluster.shards(), *cluster.processes("CoordinatorActor"))}
    (owner,) = cluster.processes("ServeReplica:divisi:Gang")
    got, pause_s = answer_while_killing(client, owner)
    record_result("seconds of pause when the owner of the gang was killed", round(pause_s, 2))
    assert got == want
    wait_for(lambda: bool(cluster.processes("ServeReplica:divisi:Gang")), 60, "it is not replaced")
    assert metric(cluster, "epoch") == epoch
    assert all(psutil.pid_exists(pid) for pid in owned)


def test_three_blows_change_no_answer(cluster: Cluster, small_model: Path) -> None:
    """A small run of `make chaos`: a shard, the coordinator and the gang's owner under eight streams of many kinds.

    Other tests run beside this one, so that gaps are not judged.
    """
    kinds = [ask for ask in asks(1, tokens=60) if not ask.name.startswith(("drafts", "stop"))]  # no MTP layer, no words
    asked = [replace(ask, body={**ask.body, "model": "small", "mtp": {"max_draft_tokens": 0}}) for ask in kinds]
    cluster.wait_until_ready(30)
    blows = plan(8, 3, ("gang", "shard", "coordinator"), apart_s=(1.0, 2.0))
    record = asyncio.run(Chaos(cluster, blows, print).run(asked))
    verdict = verdict_of(record, asked, 60.0, small_model)
    assert [hit.processes for hit in record.struck] == [1, 1, 1]
    assert verdict.whole >= 8
    assert verdict.faults == []
    wait_for(lambda: bool(cluster.processes("ServeReplica:divisi:Gang")), 60, "it is not replaced")
