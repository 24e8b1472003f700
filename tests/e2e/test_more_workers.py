"""What is let in follows the attention workers that are there: one is lost with its node, and another comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import httpx
import pytest

from .test_deaths_owners import cluster_of_nodes
from .test_serve_split import wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

MAX_SEQS = 8
"""As `test_deaths_owners.DEPLOY` has it."""
TWO = """{
    "gang": {"attention_workers": 2, "expert_shards": 1, "device": "cpu", "threads_per_process": 1},
    "placement": {"attention": {"resources": {"worker": 1}}, "experts": {"labels": {"role": "head"}},
                  "ingress": {"labels": {"role": "head"}}},
}"""


def let_in(url: str) -> int:
    """So many long answers are begun beside each other before one is refused; 0 where a proxy is lost on the way."""
    with contextlib.suppress(httpx.TransportError):
        return _let_in(url)
    return 0


def _let_in(url: str) -> int:
    body = {"model": "divisi-demo", "prompt": "Hello", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as client, contextlib.ExitStack() as open_answers:
        for count in range(4 * MAX_SEQS):
            answer = client.stream("POST", f"{url}/v1/completions", json=body)
            status = open_answers.enter_context(answer).status_code
            if status != 200:
                assert status == 429
                return count
    raise AssertionError("nothing is refused")


def test_twice_as_many_are_let_in_once_there_are_two_workers(record_result: Callable[[str, object], None]) -> None:
    with cluster_of_nodes() as nodes:
        nodes.add("--num-cpus", "6", "--labels", "role=head", "--resources", '{"worker": 1}')
        other = nodes.add("--num-cpus", "2", "--resources", '{"worker": 1}')
        nodes.deploy("one", placement=TWO)
        url = f"{nodes.url}/one"
        wait_for(lambda: len(nodes.processes(":AttentionWorker")) == 2, 60, "not two workers")
        time.sleep(1.0)
        counts = {"two": let_in(url)}
        for process in other.processes(""):
            process.kill()
        wait_for(lambda: let_in(url) == MAX_SEQS, 20, "as many are let in as by two")
        counts["one"] = let_in(url)
        nodes.add("--num-cpus", "2", "--resources", '{"worker": 1}')
        wait_for(lambda: len(nodes.processes(":AttentionWorker")) == 2, 120, "no second worker")
        wait_for(lambda: let_in(url) > MAX_SEQS, 60, "no more are let in")
        counts["two again"] = let_in(url)
    record_result("answers let in by so many workers", counts)
    assert counts == {"two": 2 * MAX_SEQS, "one": MAX_SEQS, "two again": 2 * MAX_SEQS}
