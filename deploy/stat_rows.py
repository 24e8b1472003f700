"""Statistics of the gang's seats as rows for /metrics. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from divisi.cluster.gang.coordinator import Stats
from divisi.deploy.api.engine_client import StatRow

_TOTALS = {
    "steps": "Steps that this worker took part in",
    "aborted_steps": "Steps that were aborted and replayed",
    "aborted_drafting": "Of the aborted steps those that were drafting",
    "preemptions": "Sequences sent back to the queue for want of pages",
    "prefill_tokens": "Tokens computed in prefill chunks",
    "generated_tokens": "Tokens sampled",
}
_DRAFTS = {
    "drafted_tokens": "Tokens proposed by the MTP layer, by slice of the answer and place in the step",
    "accepted_tokens": "Proposed tokens that stood",
}
_GAUGES = {
    "running": ("requests_running", "Sequences that run"),
    "waiting": ("requests_waiting", "Sequences in the queue"),
    "queued_tokens": ("queued_tokens", "Tokens still to be prefilled"),
    "free_pages": ("kv_pages_free", "KV pages that no sequence holds"),
    "total_pages": ("kv_pages", "KV pages"),
    "free_slots": ("state_slots_free", "State slots that no sequence holds"),
    "total_slots": ("state_slots", "State slots"),
}
_SHARD_GAUGES = {
    "weight_bytes": ("expert_weight_bytes", "Bytes of routed-expert weights held"),
    "weight_bytes_read": ("expert_weight_bytes_read", "Bytes of the checkpoint that were read"),
}


def stat_rows(stats: Mapping[str, Stats]) -> tuple[StatRow, ...]:
    """Rows for statistics keyed by seat (`attention:0`)."""
    rows: list[StatRow] = []
    for seat, numbers in sorted(stats.items()):
        role, index = seat.split(":")
        label = ("worker" if role == "attention" else "shard", index)
        for name, value in numbers.items():
            if isinstance(value, Mapping) and name in _DRAFTS:
                for key, count in value.items():
                    part, place = key.split()
                    labels = (("slice", part), ("position", place), label)
                    rows.append(StatRow(name, count, labels, "counter", _DRAFTS[name]))
            elif isinstance(value, Mapping):
                parts = ((part, seconds) for part, seconds in value.items())
                rows += [
                    StatRow(name, seconds, (("part", part), label), "counter", "Time in steps by part")
                    for part, seconds in parts
                ]
            elif name in _TOTALS:
                rows.append(StatRow(name, value, (label,), "counter", _TOTALS[name]))
            elif named := (_GAUGES.get(name) or _SHARD_GAUGES.get(name)):
                rows.append(StatRow(named[0], value, (label,), "gauge", named[1]))
    return tuple(rows)
