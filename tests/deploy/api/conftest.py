from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from divisi.deploy.api import ApiSettings
from divisi.model.random_checkpoint.tokenizer import write_random_tokenizer
from divisi.model.text import TextCodec
from tests.deploy.api.fake_engine import FakeEngine, serve

MODEL = "test-model"
SETTINGS = ApiSettings(
    served_model_name=MODEL, max_model_len=512, max_body_bytes=200_000, max_prompts=8, status_timeout_s=0.5
)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_random_tokenizer(folder, 600, 512)
    return TextCodec.load(folder)


@pytest.fixture(scope="session")
def shared_engine(text: TextCodec) -> FakeEngine:
    return FakeEngine(text.tokenizer)


@pytest.fixture(scope="session")
def url(shared_engine: FakeEngine, text: TextCodec) -> Iterator[str]:
    with serve(shared_engine, text, SETTINGS) as base:
        yield base


@pytest.fixture
def engine(shared_engine: FakeEngine, url: str) -> Iterator[FakeEngine]:
    shared_engine.reset()
    yield shared_engine
    assert shared_engine.all_closed(10), "an engine iterator was left open"


@pytest.fixture
def client(engine: FakeEngine, url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as opened:
        yield opened


@pytest.fixture
def http(engine: FakeEngine, url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20) as opened:
        yield opened
