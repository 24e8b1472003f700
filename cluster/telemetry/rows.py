"""Names of the numbers that processes keep by themselves: of an engine, a shard, the coordinator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from divisi.cluster.gang.membership.status import Stats


@dataclass(frozen=True, slots=True)
class StatRow:
    """One number, as a scrape shows it."""

    name: str
    """Without the `divisi_` prefix and without `_total`: `"step_seconds"`, `"requests_running"`."""
    value: float
    labels: tuple[tuple[str, str], ...] = ()
    """For instance `(("part", "mixer"), ("worker", "0"))`. Rows of one name carry the same label names."""
    kind: Literal["counter", "gauge"] = "gauge"
    help: str = ""


_TOTALS = {
    "steps": "Steps that this worker took part in",
    "aborted_steps": "Steps that were aborted and replayed",
    "aborted_drafting": "Of the aborted steps those that were drafting",
    "preemptions": "Sequences sent back to the queue for want of pages",
    "prefill_tokens": "Tokens computed in prefill chunks",
    "generated_tokens": "Tokens sampled",
    "epochs": "Epochs that have begun",
    "expert_moves": "Moves and swaps of virtual shards for the sake of balance",
    "expert_moves_given_up": "Of moves those that were not loaded in time",
    "expert_moved_bytes": "Bytes of weights that were read for moves",
}
_GAUGES = {
    "running": ("requests_running", "Sequences that run"),
    "waiting": ("requests_waiting", "Sequences in the queue"),
    "queued_tokens": ("queued_tokens", "Tokens still to be prefilled"),
    "free_pages": ("kv_pages_free", "KV pages that no sequence holds"),
    "total_pages": ("kv_pages", "KV pages"),
    "free_slots": ("state_slots_free", "State slots that no sequence holds"),
    "total_slots": ("state_slots", "State slots"),
    "weight_bytes": ("expert_weight_bytes", "Bytes of routed-expert weights held"),
    "weight_bytes_read": ("expert_weight_bytes_read", "Bytes of the checkpoint that were read"),
    "seats": ("seats", "Seats of the gang"),
    "seats_filled": ("seats_filled", "Seats that a process holds"),
    "refused_tokens": ("refused_tokens", "Tokens of requests that had no room and may come again"),
    "expert_shards": ("expert_shards", "Expert shards that serve, where everybody is there"),
    "expert_shards_wanted": ("expert_shards_wanted", "Expert shards that there are to be"),
    "expert_wait": ("expert_wait_ratio", "Of the time in steps that for experts, where that was least, of late"),
    "expert_imbalance": ("expert_imbalance_ratio", "Rows of the busiest shard over the mean, in the last window"),
    "ready": ("ready", "1 when the gang can serve"),
    "epoch": ("epoch", "Number of the epoch that runs, 0 between epochs"),
}
_BY_KEY: Mapping[str, tuple[str, Literal["counter", "gauge"], tuple[str, ...], str]] = {
    "step_seconds": ("step_seconds", "counter", ("part",), "Time in steps by part"),
    "drafted_tokens": (
        "drafted_tokens", "counter", ("slice", "position"),
        "Tokens proposed by the MTP layer, by slice of the answer and place in the step",
    ),
    "accepted_tokens": ("accepted_tokens", "counter", ("slice", "position"), "Proposed tokens that stood"),
    "memory_bytes": ("memory_bytes", "gauge", ("pool",), "Bytes for KV pages and state slots"),
    "memory_free_bytes": ("memory_free_bytes", "gauge", ("pool",), "Bytes of KV pages and state slots that are free"),
    "expert_tokens": ("expert_tokens", "counter", ("layer",), "Rows of the experts served here, in measured steps"),
    "expert_busiest": ("expert_busiest_ratio", "gauge", ("layer",), "Rows of the busiest expert served, over the mean"),
    "expert_spread": ("expert_spread_ratio", "gauge", ("layer",), "Standard deviation of the rows, over the mean"),
    "leaf_rows": (
        "virtual_shard_tokens", "counter", ("virtual_shard",), "Rows of experts served here, in measured steps",
    ),
    "stall_seconds": (
        "epoch_stall_seconds", "counter", ("cause",), "Time between two epochs, in which no step ran, by why one ended",
    ),
    "stalls": ("epoch_stalls", "counter", ("cause",), "Times at which the gang stood still between two epochs"),
    "seat_joins": ("seat_joins", "counter", ("seat",), "Processes that have taken a seat"),
}  # fmt: skip


def rank_rows(stats: Stats) -> list[StatRow]:
    """Rows of one rank or of the coordinator, without a label that says whose they are."""
    rows: list[StatRow] = []
    for name, value in stats.items():
        if isinstance(value, Mapping):
            shown, kind, labels, told = _BY_KEY[name]
            for key, number in value.items():
                rows.append(StatRow(shown, number, tuple(zip(labels, key.split(), strict=True)), kind, told))
        elif name in _TOTALS:
            rows.append(StatRow(name, value, (), "counter", _TOTALS[name]))
        elif name in _GAUGES:
            shown, told = _GAUGES[name]
            rows.append(StatRow(shown, value, (), "gauge", told))
    return rows


def stat_rows(stats: Mapping[str, Stats], gang: Stats | None = None) -> tuple[StatRow, ...]:
    """Rows for statistics keyed by seat (`attention:0`), and of the gang as a whole."""
    rows = rank_rows(gang or {})
    for seat, numbers in sorted(stats.items()):
        role, index = seat.split(":")
        rows += labelled(rank_rows(numbers), "worker" if role == "attention" else "shard", index)
    return tuple(rows)


def labelled(rows: Iterable[StatRow], label: str, value: str) -> list[StatRow]:
    """The rows with a label more."""
    return [replace(row, labels=(*row.labels, (label, value))) for row in rows]
