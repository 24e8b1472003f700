"""Drafts in real clusters: the replies of a server without them, and answers that outlive killed shards."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from divisi.model.demo import checkpoint_dir
from tests.e2e.conftest import Cluster, running_cluster
from tests.e2e.test_serve_split import metric, wait_for
from tests.support.drafted_replies import ask_all, bodies, compare

pytestmark = [pytest.mark.verify, pytest.mark.timeout(900)]

SIZES = ("--device", "cpu", "--kv-memory", "64MiB", "--max-seqs", "16", "--max-model-len", "2048", "--dtype", "float32")
SHAPES = {
    "split": ("--attention-workers", "2", "--expert-shards", "2"),
    "colocated": ("--topology", "colocated", "--attention-workers", "2"),
}
KILLS, IN_DRAFTS = 20, 3
TOKENS = 400
ROW = re.compile(r"^divisi_(drafted|accepted)_tokens_total\{(.*)\} (\S+)$", re.MULTILINE)
Record = Callable[[str, object], None]


def draft_counts(cluster: Cluster) -> dict[str, float]:
    """Over all workers and slices, by place."""
    found: dict[str, float] = {}
    for name, labels, value in ROW.findall(httpx.get(f"{cluster.url}/metrics", timeout=10).text):
        place = re.search(r'position="(\d+)"', labels)
        assert place is not None
        key = f"{name} {place[1]}"
        found[key] = found.get(key, 0.0) + float(value)
    return found


def both_serve(cluster: Cluster) -> None:
    """The gang serves with one attention worker, and the other comes a moment later."""
    wait_for(lambda: len(metric(cluster, "requests_running")) == 2, 60, "the second worker")


@pytest.mark.parametrize("shape", SHAPES)
def test_replies_are_those_of_a_server_without_drafts(shape: str, tmp_path: Path, record_result: Record) -> None:
    """Two hundred conversations, eight at a time: every field of sampling, different numbers of drafts in one batch."""
    asked, flags = list(bodies(50)), (*SHAPES[shape], *SIZES)
    with running_cluster(checkpoint_dir(), tmp_path / "plain.txt", *flags, "--mtp-max-draft-tokens", "0") as cluster:
        both_serve(cluster)
        expected = ask_all(cluster.url, asked)
    drafting = ("--mtp-max-draft-tokens", "5", "--no-mtp-adaptive")
    with running_cluster(checkpoint_dir(), tmp_path / "drafts.txt", *flags, *drafting) as cluster:
        both_serve(cluster)
        found = ask_all(cluster.url, asked)
        accepted, rejected = compare(asked, expected, found)
        counts = draft_counts(cluster)
    assert accepted > len(asked)
    told = {name: sum(counts[f"{name} {at}"] for at in range(1, 6)) for name in ("drafted", "accepted")}
    rates = [round(counts[f"accepted {at}"] / counts[f"drafted {at}"], 3) for at in range(1, 6)]
    record_result(f"{shape}: drafts that stood, by position", rates)
    record_result(f"{shape}: accepted and rejected", [accepted, rejected])
    # Failed answers have no usage, and both count in /metrics.
    assert told["accepted"] >= accepted
    assert told["drafted"] >= accepted + rejected
    assert told["accepted"] <= accepted * 1.1


def stream_and_kill(cluster: Cluster, number: int, after: int, rng: random.Random) -> str:
    """An answer whose cluster loses a shard after so many characters."""
    body = {
        "model": "divisi-demo", "prompt": f"Once upon a time, {number}", "max_tokens": TOKENS, "temperature": 0,
        "stream": True, "ignore_eos": True,
    }  # fmt: skip
    got, killed = "", after < 0
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                got += "".join(re.findall(r'"text":"((?:[^"\\]|\\.)*)"', line))
            if not killed and len(got) >= after:
                shards = cluster.shards()
                os.kill(rng.choice(shards).pid, signal.SIGKILL)
                killed = True
    assert killed, "the answer ended too early"
    return got


def test_answers_outlive_twenty_killed_shards(tmp_path: Path, record_result: Record) -> None:
    """Three drafts in every step; at least three of the shards die in a draft pass, as the worker counts them."""
    rng, log = random.Random(16), tmp_path / "log.txt"
    flags = ("--expert-shards", "2", *SIZES, "--mtp-max-draft-tokens", "3", "--no-mtp-adaptive")
    in_drafts = kills = 0
    with running_cluster(checkpoint_dir(), log, *flags) as cluster:
        wanted = {number: stream_and_kill(cluster, number, -1, rng) for number in range(4)}
        while kills < KILLS or in_drafts < IN_DRAFTS:
            assert kills < 3 * KILLS, f"only {in_drafts} of {kills} kills hit a draft pass"
            number = kills % len(wanted)
            after = rng.randrange(1, len(wanted[number]) // 2)
            assert stream_and_kill(cluster, number, after, rng) == wanted[number], (
                f"kill {kills}, after {after} characters"
            )
            kills += 1
            cluster.wait_until_ready(60)
            in_drafts = int(sum(metric(cluster, "aborted_drafting_total")))
    record_result("shards killed, in draft passes", [kills, in_drafts])
