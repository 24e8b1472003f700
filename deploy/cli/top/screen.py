"""Two snapshots as tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from divisi.deploy.cli.top.snapshot import Snapshot

_COLUMNS = (
    "seat", "runs", "waits", "queued tokens", "KV used", "prefill tokens/s", "tokens/s", "steps/s", "aborted",
    "taken", "experts, MiB",
)  # fmt: skip


def screen(server: str, now: Snapshot, before: Snapshot | None, problem: str = "") -> RenderableType:
    """All of it; `problem` is why there is nothing newer."""
    parts: list[RenderableType] = [_head(server, now), _requests(now, before), _seats(now, before)]
    return Group(*parts, Text(problem, style="red")) if problem else Group(*parts)


def _head(server: str, now: Snapshot) -> Text:
    state = ("ready", "green") if now.ready else (f"not ready: {now.reason}", "yellow")
    seats = f"  seats {_number(now.sum('seats_filled'))} of {_number(now.sum('seats'))}"
    epochs = f"  epoch {_number(now.sum('epoch'))}, the {_number(now.sum('epochs_total'))}. of this coordinator"
    return Text.assemble((server, "bold"), "  ", state, seats, epochs, _experts(now))


def _experts(now: Snapshot) -> str:
    """How many shards there are, and how much of a step waits for them; empty where no rank holds experts alone."""
    shards, wanted, share = (now.sum(f"expert_{name}") for name in ("shards", "shards_wanted", "wait_ratio"))
    if shards is None:
        return ""
    coming = "" if wanted in (None, shards) else f", {_number(wanted)} wanted"
    return f"  expert shards {_number(shards)}{coming}, waited for in {share or 0.0:.0%} of steps' time"


def _requests(now: Snapshot, before: Snapshot | None) -> Text:
    asked, refused = now.rate(before, "http_requests_total"), now.rate(before, "http_requests_total", status="429")
    if refused is None and asked is not None:
        refused = 0.0
    return Text.assemble(
        f"answers open {_number(now.sum('admitted_requests'))}  queued tokens {_number(now.sum('queued_tokens'))}  ",
        (f"refused tokens {_number(now.sum('refused_tokens'))}", "yellow" if now.sum("refused_tokens") else ""),
        f"  HTTP {_rate(asked)}/s  ",
        (f"429 {_rate(refused)}/s", "yellow" if refused else ""),
        f"  tokens {_rate(now.rate(before, 'completion_tokens_total'))}/s",
    )


def _seats(now: Snapshot, before: Snapshot | None) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for name in _COLUMNS:
        grid.add_column(name, justify="left" if name == "seat" else "right")
    for worker in now.labels("requests_running", "worker"):
        grid.add_row(*_worker(now, before, worker))
    for shard in now.labels("expert_weight_bytes", "shard"):
        grid.add_row(*_shard(now, shard))
    return grid


def _worker(now: Snapshot, before: Snapshot | None, worker: str) -> list[str]:
    pages, free = now.sum("kv_pages", worker=worker), now.sum("kv_pages_free", worker=worker)
    used = "-" if not pages or free is None else f"{1 - free / pages:.0%}"
    seat = f"attention:{worker}"
    return [
        seat,
        *(_number(now.sum(name, worker=worker)) for name in ("requests_running", "requests_waiting", "queued_tokens")),
        used,
        *(
            _rate(now.rate(before, name, worker=worker))
            for name in ("prefill_tokens_total", "generated_tokens_total", "steps_total")
        ),
        _number(now.sum("aborted_steps_total", worker=worker)),
        _number(now.sum("seat_joins_total", seat=seat)),
        "",
    ]


def _shard(now: Snapshot, shard: str) -> list[str]:
    seat, held = f"expert:{shard}", (now.sum("expert_weight_bytes", shard=shard) or 0) / 2**20
    joins = _number(now.sum("seat_joins_total", seat=seat))
    return [seat, *[""] * (len(_COLUMNS) - 3), joins, f"{held:,.1f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
