"""How many replicas the attention workers' deployment has, as Serve is told."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from divisi.deploy.application.queue_policy import QueueDepth, QueueRule
from divisi.deploy.settings import Settings

_STATS_EVERY_S = 0.25


def queue_rule(settings: Settings) -> QueueRule | None:
    """By what they are more or fewer; None: there are always as many as there are seats."""
    if (scaling := settings.gang.autoscaling) is None:
        return None
    tokens = settings.queued_tokens_per_worker
    return QueueRule(scaling.min, scaling.max, tokens, scaling.upscale_delay_s, scaling.downscale_delay_s)


def worker_count(settings: Settings) -> dict[str, Any]:
    """The options of the deployment for it."""
    if (rule := queue_rule(settings)) is None:
        return {"num_replicas": settings.gang.attention_workers}
    with warnings.catch_warnings():  # its successor is a variable in the environment of each process
        warnings.filterwarnings("ignore", ".*metrics_interval_s", DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=rule.least,
            max_replicas=rule.most,
            initial_replicas=rule.least,
            metrics_interval_s=_STATS_EVERY_S,
            look_back_period_s=4 * _STATS_EVERY_S,
            upscale_delay_s=0,  # the policy has delays of its own
            downscale_delay_s=0,
            policy=AutoscalingPolicy(policy_function=QueueDepth, policy_kwargs=asdict(rule)),
        )
    return {"autoscaling_config": config}
