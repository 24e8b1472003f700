"""A request that kills an expert shard in every step, beside eight that do not, on a server of two workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from .conftest import running_cluster
from .test_streams import SIZES, Answer, body, clients, read

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

HOOK = Path(__file__).parents[1] / "support" / "poison"
TOKENS = 300
SHAPE = ("--attention-workers", "2", "--expert-shards", "2")


async def poison(url: str) -> str:
    """The code of the error by which it ends."""
    request = body(0, TOKENS) | {"prompt": [7, 7, 8, 9], "stream": False}
    async with httpx.AsyncClient(base_url=url, timeout=240) as http:
        reply = await http.post("/v1/completions", json=request)
    return str(reply.json()["error"]["code"])


async def streams(url: str, poisoned: bool) -> tuple[list[Answer], str]:
    answers, code = [Answer() for _ in range(8)], ""
    async with clients(url) as http, asyncio.TaskGroup() as group:
        for number, answer in enumerate(answers):
            group.create_task(read(http, number, TOKENS, answer))
        async with asyncio.timeout(60):
            while not all(len(answer.tokens) >= 5 for answer in answers):
                await asyncio.sleep(0.01)
        if poisoned:
            code = await poison(url)
    return answers, code


async def test_it_ends_and_the_eight_others_do_not(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_result: Callable[[str, object], None]
) -> None:
    deaths = tmp_path / "deaths"
    monkeypatch.setenv("PYTHONPATH", str(HOOK))
    monkeypatch.setenv("DIVISI_TEST_DEATHS", str(deaths))
    with running_cluster(small_model, tmp_path / "log.txt", *SHAPE, *SIZES, ready_within_s=200.0) as cluster:
        alone, _ = await streams(cluster.url, poisoned=False)
        assert not deaths.exists()
        answers, code = await streams(cluster.url, poisoned=True)
    died = len(deaths.read_text().splitlines())
    record_result("shards killed by a poisoned newcomer before it ended", died)
    assert code == "answer_lost"
    assert [answer.error for answer in answers] == [""] * 8
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    assert 2 < died <= 6
