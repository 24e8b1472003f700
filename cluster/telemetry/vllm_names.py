"""Our metrics under the names that vLLM's users have dashboards for, in scrapes only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_NAMES: Mapping[str, str] = {
    "divisi_requests_running": "num_requests_running",
    "divisi_requests_waiting": "num_requests_waiting",
    "divisi_preemptions": "num_preemptions",
    "divisi_prompt_tokens": "prompt_tokens",
    "divisi_completion_tokens": "generation_tokens",
    "divisi_requests_finished": "request_success",
    "divisi_time_to_first_token_seconds": "time_to_first_token_seconds",
    "divisi_inter_token_seconds": "inter_token_latency_seconds",
    "divisi_request_duration_seconds": "e2e_request_latency_seconds",
    "divisi_queue_seconds": "request_queue_time_seconds",
    "divisi_prefill_seconds": "request_prefill_time_seconds",
    "divisi_drafted_tokens": "spec_decode_num_draft_tokens",
    "divisi_accepted_tokens": "spec_decode_num_accepted_tokens",
}
_LABELS = {"reason": "finished_reason"}
_NOT_THERE = frozenset({"slice", "endpoint", "position"})
"""Labels that vLLM does not have; what differs in nothing else is added up."""


class VllmNames(Collector):
    """Shows the metrics of a registry again."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry, self._model = registry, model
        self._asking = False

    def collect(self) -> Iterator[Metric]:
        """The families that have a name in vLLM."""
        if self._asking:  # by ourselves, as a part of the registry
            return
        self._asking = True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_asking", False)
            families = {family.name: family for family in self._registry.collect()}
        for name, family in families.items():
            if name in _NAMES:
                yield self._renamed(family, _NAMES[name])
        if {"divisi_kv_pages", "divisi_kv_pages_free"} <= families.keys():
            free, pages = families["divisi_kv_pages_free"], families["divisi_kv_pages"]
            used = Metric("vllm:kv_cache_usage_perc", "Share of the KV pages that sequences hold.", "gauge")
            for left, size in zip(free.samples, pages.samples, strict=True):
                labels = {"model_name": self._model} | left.labels
                used.add_sample(used.name, labels, 1 - left.value / max(size.value, 1))
            yield used

    def _renamed(self, family: Metric, name: str) -> Metric:
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for sample in family.samples:
            kept = {_LABELS.get(k, k): v for k, v in sample.labels.items() if k not in _NOT_THERE}
            key = sample.name.replace(family.name, f"vllm:{name}", 1), tuple(kept.items())
            sums[key] = sums.get(key, 0.0) + sample.value
        renamed = Metric(f"vllm:{name}", family.documentation, family.type)
        for (sample_name, labels), value in sums.items():
            renamed.add_sample(sample_name, {"model_name": self._model} | dict(labels), value)
        return renamed
