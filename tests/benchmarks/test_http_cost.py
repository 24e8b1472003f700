"""The HTTP benchmark's parts in one process, small: every server sends the right answer, and a wrong one is noticed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from divisi.benchmarks.http_cost.capture import capture, check_answer
from divisi.benchmarks.http_cost.layers import layer_table, measure_layers
from divisi.benchmarks.http_cost.report import make_setup, unchunked, with_events
from divisi.benchmarks.http_cost.servers import APPS, Setup
from divisi.model.random_checkpoint.tokenizer import write_random_tokenizer
from divisi.model.text import TextCodec

TOKENS = 10


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_random_tokenizer(folder, 600, 512)
    return make_setup(folder, TOKENS)


@pytest.mark.parametrize("per_event", [1, 4])
@pytest.mark.parametrize("app", APPS)
def test_every_server_sends_the_same_answer(setup: Setup, app: str, per_event: int) -> None:
    grouped = with_events(Setup(setup.model_dir, setup.token_ids, per_event=per_event))
    assert len(grouped.events) == -(-TOKENS // per_event)
    pieces = asyncio.run(capture(APPS[app](grouped), TOKENS))
    check_answer(b"".join(pieces), setup.token_ids, TextCodec.load(setup.model_dir).tokenizer, app)


@pytest.mark.parametrize("damage", [(b"[DONE]", b""), (b'"content":', b'"content_":')])
def test_a_wrong_answer_is_noticed(setup: Setup, damage: tuple[bytes, bytes]) -> None:
    tokenizer = TextCodec.load(setup.model_dir).tokenizer
    with pytest.raises(SystemExit, match="wrong answer"):
        check_answer(b"".join(setup.events).replace(*damage), setup.token_ids, tokenizer, "it")


def test_layers_add_up(setup: Setup) -> None:
    found = measure_layers(setup, streams=3, rounds=2)
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
    assert layer_table(found, [1e-3]).count("\n") == len(found) + 2


def test_chunked_bodies() -> None:
    assert unchunked(b"HTTP/1.1 200 OK\r\na: b\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") == b"abcde"
