"""Two colocated ranks behind two ingress replicas: the right answers, everybody at work, and one of them killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
from transformers import Qwen3NextForCausalLM

from tests.parity.oracle import Excuses, Oracle

from .conftest import Cluster, running_cluster
from .test_serve_split import metric, wait_for

pytestmark = pytest.mark.timeout(240)

SEED = 31
ROW = re.compile(r"^divisi_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def colocated(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("colocated") / "log.txt"
    sizes = ("--kv-memory", "32MiB", "--max-seqs", "8", "--max-model-len", "1024", "--dtype", "float32")
    ranks = ("--topology", "colocated", "--attention-workers", "2", "--ingress-replicas", "2", "--device", "cpu")
    with running_cluster(small_model, log, *ranks, *sizes) as cluster:
        yield cluster


@dataclass
class Answer:
    """A stream in a thread of its own."""

    url: str
    prompt: list[int]
    count: int
    tokens: list[int] = field(default_factory=list)
    error: str = ""

    def read(self) -> None:
        body = {
            "model": "small", "prompt": self.prompt, "max_tokens": self.count, "temperature": 0, "stream": True,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=90) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                self.error = self.error or str(chunk.get("error") or "")
                for choice in chunk.get("choices", ()):
                    self.tokens += choice.get("token_ids") or []


def rows(cluster: Cluster, name: str, label: str) -> dict[str, float]:
    """The rows of a metric in one scrape, by one of their labels, summed over the others."""
    found: dict[str, float] = {}
    for row, labels, value in ROW.findall(httpx.get(f"{cluster.url}/metrics", timeout=10).text):
        if row == name and (match := re.search(rf'{label}="([^"]*)"', labels)):
            found[match[1]] = found.get(match[1], 0.0) + float(value)
    return found


def oracle_of(path: Path) -> Oracle:
    return Oracle(Qwen3NextForCausalLM.from_pretrained(path, dtype=torch.float32).eval())


def test_answers_are_right_and_everybody_works(colocated: Cluster, small_model: Path, excuses: Excuses) -> None:
    rng = random.Random(SEED)
    answers = [
        Answer(colocated.url, [rng.randrange(10, 1000) for _ in range(rng.choice((1, 20, 70, 150)))], 24)
        for _ in range(24)
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Answer.read, answers))
    oracle = oracle_of(small_model)
    for answer in answers:
        assert not answer.error
        expected = oracle.greedy(answer.prompt, answer.count)
        excuses.expect_same(oracle, answer.prompt, expected, answer.tokens, f"colocated, seed {SEED}")
    wait_for(lambda: metric(colocated, "requests_running") == [0.0, 0.0], 10, "something still runs")
    generated = rows(colocated, "generated_tokens_total", "worker")
    assert set(generated) == {"0", "1"}
    assert min(generated.values()) > 24, f"one worker had hardly anything to do: {generated}"
    assert colocated.processes("ExpertShardActor") == []


def test_each_ingress_replica_counts_its_own_requests(colocated: Cluster) -> None:
    finished: dict[str, float] = {}

    def both_seen() -> bool:
        finished.update(rows(colocated, "requests_finished_total", "ingress"))
        return len(finished) == 2

    wait_for(both_seen, 30, f"only these ingress replicas answered a scrape: {finished}")
    before = sum(finished.values())
    for _ in range(6):
        answer = Answer(colocated.url, [1, 2, 3], 2)
        answer.read()
    assert not answer.error
    seen: dict[str, float] = {}

    def all_counted() -> bool:
        seen.update(rows(colocated, "requests_finished_total", "ingress"))
        return sum(seen.values()) == before + 6

    wait_for(all_counted, 30, f"{before} + 6 answers, but the replicas count {seen}")


def test_one_rank_is_killed_and_replaced(
    colocated: Cluster, small_model: Path, record_result: Callable[[str, object], None], excuses: Excuses
) -> None:
    """Its own answers and the other rank's go on when the seat is filled again."""
    answers: list[Answer] = []
    threads: list[threading.Thread] = []
    # The ingress replicas learn of each other's requests by the workers' next report, so that the second may follow
    # the first to one worker.
    while min(metric(colocated, "requests_running")) == 0.0:
        assert len(answers) < 6, "the router sent everything to one worker"
        answers.append(Answer(colocated.url, [7 + len(answers), 8, 9], 500))
        threads.append(threading.Thread(target=answers[-1].read))
        threads[-1].start()
        wait_for(lambda: sum(metric(colocated, "requests_running")) == len(answers), 20, "the request never ran")
    os.kill(colocated.processes("AttentionWorker")[0].pid, signal.SIGKILL)
    assert all(len(answer.tokens) < 500 for answer in answers), "too late to show anything"
    for thread in threads:
        thread.join(90)
    assert [answer.error for answer in answers] == [""] * len(answers)
    oracle = oracle_of(small_model)
    for answer in answers:
        expected = oracle.greedy(answer.prompt, answer.count)
        excuses.expect_same(oracle, answer.prompt, expected, answer.tokens, "an answer that a rank's death interrupted")
    record_result("seconds until the gang served again", round(colocated.wait_until_ready(60), 1))
