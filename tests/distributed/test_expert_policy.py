"""A gang whose worker waits for experts most of the time gets a shard more by itself, and one less once it idles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from divisi.cluster.dispatch.meter import MeteredExperts
from divisi.cluster.gang.membership import watch
from divisi.cluster.gang.membership.layout import step_waits
from divisi.cluster.gang.membership.layout.wait_policy import WaitRule
from divisi.cluster.seats import GangShape
from tests.support.thread_gang import Shard, small_spec, thread_gang

from . import test_scaling
from .test_adoption import wait_for
from .test_scaling import Gang

TOKENS, LEAF_S = 80, 0.0003
ASKED = [replace(request, max_tokens=TOKENS) for request in test_scaling.ASKED]
RULE = WaitRule(least=2, most=3, high=0.3, low=0.1, upscale_delay_s=0.4, downscale_delay_s=0.4)


class SlowShard(Shard):
    """Its experts take longer, the more virtual shards it serves."""

    def loaded(self, experts: MeteredExperts) -> None:
        measured = experts.measured

        def slowly(*call: object) -> object:
            time.sleep(LEAF_S * len(experts._leaves))
            return measured(*call)  # type: ignore[arg-type]

        experts.measured = slowly  # type: ignore[method-assign, assignment]


class SlowGang(Gang):
    shard_type = SlowShard


def stalls(gang: Gang, name: str) -> Mapping[str, float]:
    """By cause."""
    numbers = gang.coordinator.numbers()[name]
    assert isinstance(numbers, Mapping)
    return numbers


def test_a_shard_comes_and_goes_by_the_share_of_waiting(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (worker,):
        worker.submit(*ASKED)
        alone = {request.request_id: worker.finish(request.request_id) for request in ASKED}
    monkeypatch.setattr(watch, "_POLL_S", 0.05)
    monkeypatch.setattr(step_waits, "WINDOW_S", 0.2)
    with contextlib.ExitStack() as stack:
        gang = SlowGang(small_spec(small_model, GangShape(1, 2), wait_rule=RULE), stack)
        with gang.answering(alone, ASKED):
            wait_for(lambda: gang.coordinator.scale_status().wanted == 3, "no shard more is wanted")
            assert "waited for experts" in gang.coordinator.scale_status().why
            gang.start(2)
            gang.scaled(3)
            share = gang.coordinator.numbers()["expert_wait"]
            assert isinstance(share, float)
            assert share > RULE.high
        wait_for(lambda: gang.coordinator.scale_status().wanted == 2, "it is not taken away")
        gang.scaled(2)
        wait_for(lambda: stalls(gang, "stalls")["scaled"] == 2, "each change is told when all have met")
        assert 0 < stalls(gang, "stall_seconds")["scaled"] < 10
        assert sum(stalls(gang, "stalls").values()) == 2, "nothing else has held it up"
        assert gang.worker.engine.stats().aborted_steps == 0, "each change was between two steps"
