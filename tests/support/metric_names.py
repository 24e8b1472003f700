"""The names of all samples that some process of a gang shows, without starting one."""

from __future__ import annotations

from functools import cache

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from divisi.cluster.engine.stats import EngineStats
from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.seats import Address, GangShape
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.ranks import WorkerStats, show_coordinator, show_shard, show_worker
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.deploy.api.metrics import Metrics
from divisi.deploy.application.moved_answers import MovedAnswers
from divisi.deploy.limits import Gate, GateLimits

ENGINE = EngineStats(
    running=1, waiting=0, queued_tokens=0, free_pages=1, total_pages=2, free_slots=1, total_slots=2, steps=1,
    aborted_steps=0, preemptions=0, prefill_tokens=1, generated_tokens=1, drafted_tokens={"chat 1": 1},
    accepted_tokens={"chat 1": 1}, step_seconds={"mixer": 1.0},
)  # fmt: skip


class StillMeter:
    """Of experts that get no rows."""

    measuring = False
    seconds = 0.0

    def stats(self) -> dict[str, dict[str, float]]:
        by_layer = {"expert_tokens": {"0": 1.0}, "expert_busiest": {"0": 1.0}, "expert_spread": {"0": 0.0}}
        return by_layer | {"leaf_rows": {"0": 1.0}}


class StillWorker:
    """A worker that does nothing."""

    seat = "attention:0"

    def step_seconds(self) -> dict[str, float]:
        return {}

    def stats(self) -> object:
        return WorkerStats(10, 20).told(ENGINE)


def pages() -> dict[str, str]:
    """By role, what a scrape of such a process shows, but for the process's own memory and time."""
    made = {
        role: Telemetry(TelemetrySpec(scraped=False), role)
        for role in ("ingress", "attention", "expert", "coordinator")
    }
    metrics = Metrics(made["ingress"].metrics)
    metrics.watch(Gate(GateLimits()))
    metrics.http_requests.add(1, {"path": "/v1/models", "method": "GET", "status": "200"})
    MovedAnswers(made["ingress"])
    show_worker(made["attention"], None, StillWorker())  # type: ignore[arg-type]
    show_shard(made["expert"], StillMeter(), "expert:0", {"weight_bytes": 1.0, "weight_bytes_read": 1.0})
    coordinator = Coordinator(GangShape(1, 1), Address("127.0.0.1", 1), rebalance=True)
    coordinator.join("a", "attention", Address("127.0.0.1", 1))
    show_coordinator(made["coordinator"], coordinator.numbers)
    return {role: generate_latest(telemetry.metrics.registry).decode() for role, telemetry in made.items()}


@cache
def shown_names() -> frozenset[str]:
    """Of all processes."""
    found = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
    for page in pages().values():
        found |= {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}
    return frozenset(found)
