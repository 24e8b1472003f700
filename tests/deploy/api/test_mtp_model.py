"""The demo model over HTTP with and without drafts: the same replies, whatever is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from divisi.deploy.api import ApiSettings
from divisi.model.demo import checkpoint_dir
from divisi.model.text import TextCodec
from tests.deploy.api.fake_engine import serve
from tests.support.drafted_replies import FIELDS, ask_all, bodies, compare
from tests.support.local_client import local_client


def replies(asked: list[dict[str, Any]], **drafting: Any) -> list[dict[str, Any]]:
    """What a server says, to many at once."""
    drafts = drafting.get("max_draft_tokens", 0)
    settings = ApiSettings(
        served_model_name="divisi-demo", max_model_len=2048, max_draft_tokens=drafts, model_dir=str(checkpoint_dir())
    )
    text = TextCodec.load(checkpoint_dir())
    with local_client(checkpoint_dir(), **drafting) as engine, serve(engine, text, settings) as url:
        return ask_all(url, asked)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("adaptive", [False, pytest.param(True, marks=pytest.mark.verify)])
def test_replies_are_those_of_a_server_without_drafts(
    adaptive: bool, full_tier: bool, record_result: Callable[[str, object], None]
) -> None:
    asked = list(bodies(50 if full_tier else 4))
    expected = replies(asked)
    found = replies(asked, max_draft_tokens=5, adaptive_drafts=adaptive)
    accepted, rejected = compare(asked, expected, found)
    record_result("accepted and rejected drafts", [accepted, rejected])
    assert accepted > len(asked)


def test_each_field_is_in_twenty_of_two_hundred_requests() -> None:
    fields = Counter(name for body in bodies(50) for name in body)
    for name in {name for each in FIELDS for name in each}:
        assert fields[name] >= 20, name
