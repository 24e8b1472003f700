"""The numbers of a run as tables: while it goes on, and at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from divisi.deploy.cli.bench.outcome import PERCENTILES, Distribution, Summary

REFRESH_S = 0.25


def table(summary: Summary) -> RenderableType:
    """Counts, rates and percentiles."""
    counts = summary.counts
    line = Text.assemble(
        (f"{summary.seconds:.1f} s", "bold"),
        f"  sent {counts['sent']}  running {counts['running']}  ",
        (f"ok {counts['ok']}", "green"),
        "  ",
        _count("429", counts["rejected"], "yellow"),
        "  ",
        _count("errors", counts["error"], "red"),
        "  ",
        _count("aborted", counts["aborted"], "red"),
    )
    return Group(line, _rates(summary), _percentiles(summary), *_remarks(summary))


def _count(name: str, value: int, style: str) -> tuple[str, str]:
    return (f"{name} {value}", style if value else "dim")


def _rates(summary: Summary) -> Text:
    cached = "" if summary.cached_tokens is None else f" ({summary.cached_tokens} of them cached)"
    steps = "" if summary.tokens_per_step is None else f", {summary.tokens_per_step:.2f} tokens per step"
    known = summary.without_usage < summary.counts["ok"] or not summary.counts["ok"]
    output = f"{summary.per_second(summary.output_tokens):.1f}" if known else "unknown"
    return Text(
        f"{summary.per_second(summary.counts['ok']):.2f} requests/s, {output} output tokens/s; "
        f"{summary.input_tokens} tokens in{cached}, {summary.output_tokens} out{steps}"
    )


def _percentiles(summary: Summary) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("ms")
    for name in ("mean", *(f"p{percent}" for percent in PERCENTILES), "max"):
        grid.add_column(name, justify="right")
    rows = (
        ("time to first token", summary.ttft),
        ("inter-token latency", summary.itl),
        ("longest gap", summary.longest_gap),
        ("whole request", summary.latency),
    )
    for name, distribution in rows:
        grid.add_row(name, *_cells(distribution))
    return grid


def _cells(distribution: Distribution) -> list[str]:
    values = (distribution.mean, *distribution.percentiles.values(), distribution.max)
    return ["-" if value is None else f"{value * 1e3:.1f}" for value in values]


def _remarks(summary: Summary) -> list[Text]:
    remarks = [Text(f"{count} x {message}", style="red") for message, count in summary.errors.items()]
    if summary.without_usage:
        remarks.append(
            Text(f"{summary.without_usage} answers came without usage: their tokens are not counted", style="yellow")
        )
    if (summary.late.max or 0) > 0.1:
        remarks.append(
            Text(
                f"requests left up to {summary.late.max:.2f} s late: this client is too slow for that rate",
                style="yellow",
            )
        )
    return remarks


async def watch(console: Console, summary: Callable[[], Summary]) -> None:
    """Redraw the table until cancelled; the last one vanishes, for the report to take its place."""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(table(summary()), refresh=True)
            await asyncio.sleep(REFRESH_S)
