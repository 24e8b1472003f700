"""What the dashboards show: titles, queries and units, without anything of Grafana's.

The queries take the labels that `/metrics/targets` gives: `role`, and `ingress`, `worker` or `shard`.
"""

from __future__ import annotations

from dataclasses import dataclass

RATE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart of one or more queries, each with the legend of its lines."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    """Of Grafana's: `s`, `bytes`, `percentunit`, `reqps`, `short`."""


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page of panels."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def _quantiles(family: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """p50, p95 and p99 of a histogram."""
    labels, legend = (f"le, {by}", f"{{{{{by}}}}} ") if by else ("le", "")
    return tuple(
        (f"histogram_quantile({share}, sum by ({labels}) (rate({family}_bucket{RATE})))", f"{legend}p{share * 100:g}")
        for share in (0.5, 0.95, 0.99)
    )


def _rate(counter: str, by: str = "", where: str = "") -> str:
    return f"sum{f' by ({by}) ' if by else ''}(rate({counter}{where}{RATE}))"


SERVICE = Dashboard("divisi-service", "Divisi: service", (
    Panel("Ready", (("max(divisi_ready)", "ready"),)),
    Panel("Requests by status", ((_rate("divisi_http_requests_total", "status"), "{{status}}"),), "reqps"),
    Panel("Answers by finish reason", ((_rate("divisi_requests_finished_total", "reason"), "{{reason}}"),), "reqps"),
    Panel("Tokens per second", (
        (_rate("divisi_prompt_tokens_total"), "prompt"), (_rate("divisi_completion_tokens_total"), "answer"),
    )),
    Panel("Time to first token", _quantiles("divisi_time_to_first_token_seconds"), "s"),
    Panel("Time to first token by slice", _quantiles("divisi_time_to_first_token_seconds", "slice"), "s"),
    Panel("Time between tokens", _quantiles("divisi_inter_token_seconds"), "s"),
    Panel("Mean time per token of an answer", _quantiles("divisi_time_per_output_token_seconds"), "s"),
    Panel("Duration by slice", _quantiles("divisi_request_duration_seconds", "slice"), "s"),
    Panel("Open requests", (
        ("sum(divisi_http_open_requests)", "HTTP"), ("sum(divisi_admitted_requests)", "answers let in"),
        ("sum(divisi_admitted_queued_tokens)", "prompt tokens let in"),
    )),
    Panel("Gaps, requests sent again, answers that moved", (
        ("sum(increase(divisi_stream_gaps_total[$__rate_interval]))", "gaps of 1 s and more"),
        ("sum(increase(divisi_resent_requests_total[$__rate_interval]))", "sent again"),
        ("sum(increase(divisi_resumed_requests_total[$__rate_interval]))", "gone on with another worker"),
    )),
    Panel("Requests by ingress", ((_rate("divisi_http_requests_total", "ingress"), "ingress {{ingress}}"),), "reqps"),
))  # fmt: skip

GANG = Dashboard("divisi-gang", "Divisi: gang", (
    Panel("Seats", (("max(divisi_seats_filled)", "filled"), ("max(divisi_seats)", "all"))),
    Panel("Epochs that began", (("increase(divisi_epochs_total[10m])", "in ten minutes"),)),
    Panel("Standing still between two epochs, by why one ended: mean", ((
        f"{_rate('divisi_epoch_stall_seconds_total', 'cause')} / {_rate('divisi_epoch_stalls_total', 'cause')}",
        "{{cause}}",
    ),), "s"),
    Panel("Standing still, in ten minutes", (
        ("sum by (cause) (increase(divisi_epoch_stall_seconds_total[10m]))", "{{cause}}"),
    ), "s"),
    Panel("Processes that took a seat", (("sum by (seat) (increase(divisi_seat_joins_total[10m]))", "{{seat}}"),)),
    Panel("Running and waiting", (
        ("sum by (worker) (divisi_requests_running)", "worker {{worker}} runs"),
        ("sum by (worker) (divisi_requests_waiting)", "worker {{worker}} queues"),
    )),
    Panel("Tokens still to prefill, and refused (autoscaling reads this)", (
        ("sum by (worker) (divisi_queued_tokens)", "worker {{worker}}"), ("max(divisi_refused_tokens)", "refused"),
    )),
    Panel("Time in the queue", _quantiles("divisi_queue_seconds"), "s"),
    Panel("Time to prefill", _quantiles("divisi_prefill_seconds", "slice"), "s"),
    Panel("Duration of a step by phase", _quantiles("divisi_step_duration_seconds", "phase"), "s"),
    Panel("Where steps take their time", ((_rate("divisi_step_seconds_total", "part"), "{{part}}"),), "percentunit"),
    Panel("Steps", (
        (_rate("divisi_steps_total", "worker"), "worker {{worker}}"),
        (_rate("divisi_aborted_steps_total", "worker"), "worker {{worker}} aborted"),
    )),
    Panel("Tokens of workers", (
        (_rate("divisi_prefill_tokens_total", "worker"), "worker {{worker}} prefills"),
        (_rate("divisi_generated_tokens_total", "worker"), "worker {{worker}} generates"),
    )),
    Panel("Preemptions", ((_rate("divisi_preemptions_total", "worker"), "worker {{worker}}"),)),
    Panel("Memory head-room", (
        ("divisi_memory_free_bytes / (divisi_memory_bytes > 0)", "worker {{worker}} {{pool}}"),
    ), "percentunit"),
    Panel("KV pages and state slots that are free", (
        ("divisi_kv_pages_free", "worker {{worker}} pages of {{instance}}"),
        ("divisi_state_slots_free", "worker {{worker}} slots of {{instance}}"),
    )),
    Panel("Drafts by position", (
        (_rate("divisi_drafted_tokens_total", "position"), "{{position}} drafted"),
        (_rate("divisi_accepted_tokens_total", "position"), "{{position}} stood"),
    )),
    Panel("Drafts that stand, by slice of the answer", ((
        f"{_rate('divisi_accepted_tokens_total', 'slice')} / {_rate('divisi_drafted_tokens_total', 'slice')}",
        "{{slice}}",
    ),), "percentunit"),
))  # fmt: skip

EXPERTS = Dashboard("divisi-experts", "Divisi: experts", (
    Panel("Rows by shard (in measured steps)", (
        (_rate("divisi_expert_tokens_total", "shard, worker"), "shard {{shard}}{{worker}}"),
    )),
    Panel("Expert shards", (("max(divisi_expert_shards)", "serve"), ("max(divisi_expert_shards_wanted)", "wanted"))),
    Panel("Time in steps that is waiting for experts (autoscaling reads this)", (
        ("max(divisi_expert_wait_ratio)", "share"),
    ), "percentunit"),
    Panel("Rows of the busiest shard over the mean, by virtual shards (rebalancing reads this)", (
        ("max(divisi_expert_imbalance_ratio)", "imbalance"),
    )),
    Panel("Moves of virtual shards", (
        ("sum(increase(divisi_expert_moves_total[10m]))", "in ten minutes"),
        ("sum(increase(divisi_expert_moves_given_up_total[10m]))", "given up"),
    )),
    Panel("Weights read for moves", (
        ("sum(increase(divisi_expert_moved_bytes_total[10m]))", "in ten minutes"),
    ), "bytes"),
    Panel("Rows of the busiest shard over the mean", ((
        f"max({_rate('divisi_expert_tokens_total', 'shard, worker')}) / "
        f"avg({_rate('divisi_expert_tokens_total', 'shard, worker')})", "imbalance",
    ),)),
    Panel("Busiest expert over the mean, by layer", (
        ("max by (layer) (divisi_expert_busiest_ratio)", "layer {{layer}}"),
    )),
    Panel("Spread of rows over the mean, by layer", (
        ("max by (layer) (divisi_expert_spread_ratio)", "layer {{layer}}"),
    )),
    Panel("Weights held", (("sum by (shard) (divisi_expert_weight_bytes)", "shard {{shard}}"),), "bytes"),
    Panel("Waiting for experts", (
        ('sum by (worker) (rate(divisi_step_seconds_total{part="experts"}[$__rate_interval]))', "worker {{worker}}"),
    ), "percentunit"),
    Panel("Sending to experts", (
        ('sum by (worker) (rate(divisi_step_seconds_total{part="dispatch"}[$__rate_interval]))', "worker {{worker}}"),
    ), "percentunit"),
))  # fmt: skip

COST = Dashboard("divisi-cost", "Divisi: cost", (
    Panel("Processor cores by role", ((_rate("process_cpu_seconds_total", "role"), "{{role}}"),)),
    Panel("Processor time per generated token, by role", ((
        f"{_rate('process_cpu_seconds_total', 'role')} / on() group_left() {_rate('divisi_completion_tokens_total')}",
        "{{role}}",
    ),), "s"),
    Panel("Generated tokens per second and processor core", ((
        f"{_rate('divisi_completion_tokens_total')} / {_rate('process_cpu_seconds_total')}", "tokens",
    ),)),
    Panel("Memory by role", (("sum by (role) (process_resident_memory_bytes)", "{{role}}"),), "bytes"),
    Panel("Prompt tokens computed again", ((
        f"{_rate('divisi_prefill_tokens_total')} - {_rate('divisi_prompt_tokens_total')}", "tokens per second",
    ),)),
    Panel("Tokens of prompts and answers", (
        ("sum(increase(divisi_prompt_tokens_total[1h]))", "prompts, last hour"),
        ("sum(increase(divisi_completion_tokens_total[1h]))", "answers, last hour"),
    )),
    Panel("Sequences per step", ((
        f"{_rate('divisi_generated_tokens_total')} / {_rate('divisi_steps_total')}", "tokens per step",
    ),)),
    Panel("Share of drafts that was thrown away", ((
        f"1 - {_rate('divisi_accepted_tokens_total')} / {_rate('divisi_drafted_tokens_total')}", "drafts",
    ),), "percentunit"),
))  # fmt: skip

DASHBOARDS = (SERVICE, GANG, EXPERTS, COST)
