"""What changes in a running application, and the sentences by which everything else is refused."""

from __future__ import annotations

from typing import Any

import pytest

from divisi.deploy.application.live_settings import LIVE, refusal, told, with_live
from divisi.deploy.settings import Settings, SettingsError
from divisi.model.demo import checkpoint_dir

ARGS: dict[str, Any] = {
    "model": {"model_dir": checkpoint_dir()},
    "gang": {"attention_workers": 3, "expert_shards": 2},
    "limits": {"max_queued_requests": 8},
}


def settings(**changes: dict[str, Any]) -> Settings:
    return Settings.from_args({**ARGS, **{group: ARGS.get(group, {}) | fields for group, fields in changes.items()}})


def test_what_may_change_does() -> None:
    config = {
        "log": {"level": "debug"},
        "limits": {"max_queued_requests": 16, "max_queued_tokens": 99, "request_timeout_s": 5, "retry_after_s": 7},
        "gang": {"min_attention_workers": 2},
    }
    assert {group: tuple(fields) for group, fields in config.items()} == LIVE
    found = with_live(settings(), config)
    for group, fields in config.items():
        for name, value in fields.items():
            assert getattr(getattr(found, group), name) == value
    assert told(with_live(settings(), {})) == told(with_live(settings(), None)) == told(settings())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"cache": {"page_size": 32}}, "cache.page_size cannot change while the server runs"),
        ({"limits": {"max_n": 3}}, "limits.max_n cannot change"),
        ({"limits": {"max_queued_requests": 0}}, "limits.max_queued_requests: "),
        ({"log": {"level": "loud"}}, "log.level: "),
        ({"log": "debug"}, "log: expected a table of settings, got 'debug'"),
        ({"moods": {"good": 1}}, "moods.good cannot change"),
        ({"gang": {"min_attention_workers": 4}}, "min_attention_workers=4"),
    ],
)
def test_what_may_not_is_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        with_live(settings(), config)


def test_a_bound_below_the_buffers_is_refused() -> None:
    high = settings(gang={"min_attention_workers": 2})
    with pytest.raises(SettingsError, match="min_attention_workers=1 is below the 2 of args"):
        with_live(high, {"gang": {"min_attention_workers": 1}})
    assert with_live(high, {"gang": {"min_attention_workers": 3}}).gang.least_workers == 3


def test_other_args_are_refused_with_a_sentence_while_a_gang_serves() -> None:
    running = told(settings(cache={"page_size": 16}))
    assert refusal(None, settings()) == ""
    assert refusal(running, settings(cache={"page_size": 16})) == ""
    said = refusal(running, settings(cache={"page_size": 32}, log={"level": "debug"}))
    assert "cache.page_size is 16 and cannot become 32" in said
    assert "End the application first" in said
    said = refusal(running, settings(limits={"max_queued_requests": 9}))
    assert "limits.max_queued_requests is 8 and cannot become 9" in said
    assert "user_config" in said
