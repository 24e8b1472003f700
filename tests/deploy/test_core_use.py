"""What each process gets of the machine, as it is said at the start."""

from __future__ import annotations

import os
from typing import Any

import pytest

from divisi.cluster.cores import plan_cores
from divisi.deploy import core_use
from divisi.deploy.core_use import core_lines, core_plan, waiting_policy
from divisi.deploy.settings import Settings, SettingsError


def settings(replicas: int = 1, **gang: Any) -> Settings:
    return Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang, "http": {"ingress_replicas": replicas}})


def test_without_a_plan() -> None:
    assert core_lines(settings(), 8, None, haproxy=True) == [
        "  1 rank with 8 threads, 1 ingress replica and HAProxy with 1, on any of 8 cores"
    ]
    split = settings(replicas=2, expert_shards=2)
    assert core_lines(split, 8, None, haproxy=False) == [
        "  3 ranks with 2 threads each, 2 ingress replicas and the proxy with 1, on any of 8 cores"
    ]


def test_with_a_plan() -> None:
    split = settings(expert_shards=1, pin_cores=True)
    assert core_lines(split, 8, plan_cores([0, 1, 2, 3, 4, 6, 8, 9], 2, 1), haproxy=True) == [
        "  attention:0: 4 threads, on cores 0-3",
        "  expert:0: 3 threads, on cores 4,6,8",
        "  1 ingress replica and HAProxy: 1 thread each, on core 9",
    ]


@pytest.mark.parametrize(("threads", "cores", "sleep"), [(None, 2, False), (1, 1, False), (2, 3, True), (2, 4, False)])
def test_threads_that_wait_on_each_others_cores_sleep(threads: int | None, cores: int, sleep: bool) -> None:
    split = settings(expert_shards=1, threads_per_process=threads)
    assert waiting_policy(split, cores) == ({"OMP_WAIT_POLICY": "PASSIVE"} if sleep else {})
    assert (len(core_lines(split, cores, None, haproxy=True)) == 2) == sleep


@pytest.mark.parametrize(("threads", "line"), [(None, 0), (1, 0), (2, 1)])
def test_ranks_that_a_policy_may_have_need_cores_too(threads: int | None, line: int) -> None:
    split = settings(expert_autoscaling={"max": 4}, threads_per_process=threads)
    assert bool(waiting_policy(split, 5)) == bool(line)
    told = "  more threads than cores once there are 5 ranks: those that wait sleep, as not with 1 thread each"
    assert core_lines(split, 5, None, haproxy=True)[1:] == [told] * line
    assert "than cores: those" in core_lines(split, 3, None, haproxy=True)[-1] or not line, "they are too many at first"


def test_a_plan_is_for_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert core_plan(settings()) is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3, 1})
    monkeypatch.setattr(core_use, "usable_cores", lambda: 3)
    plan = core_plan(settings(pin_cores=True))
    assert plan is not None
    assert (plan.ranks, plan.service) == (((1, 3),), (5,))
    monkeypatch.setattr(core_use, "usable_cores", lambda: 2)
    with pytest.raises(SettingsError, match=r"gang.pin_cores: .* time of 2 cores"):
        core_plan(settings(pin_cores=True))
