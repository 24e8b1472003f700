"""When workers come and go: the policy on a clock that the test moves, and as Serve carries and calls it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from divisi.deploy.application.queue_policy import QueueDepth, QueueRule, decide, waiting_tokens, wanted
from divisi.deploy.application.worker_count import queue_rule, worker_count
from divisi.deploy.settings import Settings

RULE = QueueRule(least=1, most=8, tokens_per_worker=100, upscale_delay_s=2, downscale_delay_s=10)


@pytest.mark.parametrize(("tokens", "workers"), [(0, 1), (100, 1), (101, 2), (250, 3), (800, 8), (10**9, 8)])
def test_tokens_are_spread_over_workers_within_the_bounds(tokens: float, workers: int) -> None:
    assert wanted(tokens, RULE) == workers


@pytest.mark.parametrize(
    ("history", "now", "workers", "decided"),
    [
        ([], 5.0, 2, 2),  # nobody has said anything
        ([(0.0, 4)], 1.9, 1, 1),  # not for long enough
        ([(0.0, 4)], 2.0, 1, 4),
        ([(0.0, 1), (4.0, 8)], 5.9, 1, 1),
        ([(0.0, 1), (4.0, 8), (5.0, 3)], 6.0, 1, 3),  # all of the time at least three
        ([(0.0, 1), (4.0, 8), (5.0, 1), (5.1, 8)], 6.5, 1, 1),  # a lull in between
        ([(0.0, 5), (1.0, 1)], 10.9, 5, 5),
        ([(0.0, 5), (1.0, 1)], 11.0, 5, 1),
        ([(0.0, 5), (1.0, 1), (6.0, 3), (6.5, 1)], 11.5, 5, 3),  # at most what was wanted meanwhile
        ([(0.0, 1)], 3.0, 5, 5),  # a policy that has begun anew ends nobody before it has watched
        ([(0.0, 1)], 10.0, 5, 1),
        ([(0.0, 3)], 100.0, 3, 3),
        ([(0.0, 15)], 100.0, 16, 16),  # so few are needless that it is not worth an epoch
        ([(0.0, 14)], 100.0, 16, 14),
        ([(0.0, 7)], 100.0, 8, 7),
        ([(0.0, 1)], 100.0, 9, 1),
    ],
)
def test_what_was_wanted_for_long_enough_is_decided(
    history: list[tuple[float, int]], now: float, workers: int, decided: int
) -> None:
    assert decide(history, now, workers, RULE) == decided


def points(*values: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(value=value) for value in values]


def test_the_newest_words_of_running_workers_count() -> None:
    stats = {
        "queued_tokens": {"a": points(900, 30), "b": points(50), "gone": points(7000)},
        "refused_tokens": {"a": points(10, 400), "b": points(300)},
    }
    assert waiting_tokens(stats, ["a", "b", "just started"]) == 30 + 50 + 400
    assert waiting_tokens(stats, ["just started"]) is None
    assert waiting_tokens({}, ["a"]) is None
    assert waiting_tokens({"queued_tokens": {"a": points(5)}}, ["a"]) == 5


def context(workers: int, **tokens: float) -> Any:
    return SimpleNamespace(
        raw_metrics={"queued_tokens": {name: points(value) for name, value in tokens.items()}},
        running_replicas=list(tokens),
        target_num_replicas=workers,
    )


def test_a_day_of_one_policy() -> None:
    now = 0.0
    policy = QueueDepth(lambda: now, **vars(RULE))
    loads = [50, 50, 150, 50, 150, 420, 420, 420, 420, *[50] * 5, 150, *[50] * 20]
    told = [1]
    for second, load in enumerate(loads):
        now = float(second)
        told.append(policy(context(told[-1], a=load))[0])
    told = told[1:]
    assert told[:6] == [1] * 6, "each time it was wanted for less than two seconds"
    assert told[6] == 2, "wanted since 4 s, and five only since 5 s"
    assert told[7:19] == [5] * 12, "until ten seconds after the last that wanted five"
    assert told[19:25] == [2] * 6, "two were wanted at 14 s"
    assert told[25:] == [1] * 10
    assert policy(SimpleNamespace(raw_metrics=None, running_replicas=[], target_num_replicas=3))[0] == 3


def test_what_is_remembered_is_bounded() -> None:
    now = 0.0
    policy = QueueDepth(lambda: now, **vars(RULE))
    for tick in range(10_000):
        now = tick * 0.1
        policy(context(1, a=100.0 * (tick % 7)))
    assert len(policy._history) <= 10 * RULE.downscale_delay_s + 2


SETTINGS: dict[str, Any] = {
    "model": {"model_dir": "/m"},
    "gang": {"expert_shards": 1, "autoscaling": {"min": 1, "max": 4, "upscale_delay_s": 0, "downscale_delay_s": 0}},
    "cache": {"max_seqs": 8},
}


def test_serve_decides_by_it() -> None:
    settings = Settings.from_args(SETTINGS)
    config = worker_count(settings)["autoscaling_config"]
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 1, 4)
    policy = _apply_autoscaling_config(_resolve_policy_callable(config.policy))
    assert settings.queued_tokens_per_worker == 384, "three quarters of eight answers at 64 tokens"
    for tokens, workers in ((384, 1), (385, 2), (900, 3), (10**6, 4), (0, 1)):
        found = policy(_serve_context(config, tokens))
        assert found[0] == workers


def _serve_context(config: Any, tokens: float) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=DeploymentID(name="AttentionWorker"),
        deployment_name="AttentionWorker",
        app_name=None,
        current_num_replicas=1,
        target_num_replicas=1 if tokens else 3,
        running_replicas=["a"],  # type: ignore[list-item]
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=None,
        raw_metrics={"queued_tokens": {"a": [TimeStampedValue(0.0, tokens)]}},  # type: ignore[dict-item]
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=config,
    )


def test_it_goes_into_a_controller_that_has_nothing_of_divisi() -> None:
    policy = worker_count(Settings.from_args(SETTINGS))["autoscaling_config"].policy
    code = (
        "import sys, ray.cloudpickle as pickle\n"
        "sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod(lambda name, *_: "
        "(_ for _ in ()).throw(ImportError(name)) if name.startswith('divisi') else None)}))\n"
        "made = pickle.loads(sys.stdin.buffer.read())(least=1, most=2, tokens_per_worker=1, upscale_delay_s=0, "
        "downscale_delay_s=0)\n"
        "print(made.__class__.__name__, any(name.startswith('divisi') for name in sys.modules))"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, input=policy.get_serialized_policy_def(), capture_output=True, check=False, timeout=60)
    assert done.stdout.split() == [b"QueueDepth", b"False"], done.stderr.decode()


def test_without_autoscaling_there_are_as_many_as_seats() -> None:
    fixed = Settings.from_args(SETTINGS | {"gang": {"expert_shards": 1, "attention_workers": 3}})
    assert worker_count(fixed) == {"num_replicas": 3}
    assert queue_rule(fixed) is None
