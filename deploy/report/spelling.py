"""A report as text, and as a page with plots that needs nothing but itself."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from divisi.deploy.report.figures import Latency, Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem } th, td { padding: 0.2rem 0.8rem; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
svg { background: #f7f7f7; margin: 0.3rem 0 1rem } figcaption { color: #555 } figure { margin: 0 }
"""
_WIDTH, _HEIGHT, _EDGE = 720, 160, 28


def as_text(report: Report) -> str:
    """For a terminal."""
    lines = [f"Divisi: {report.where}", ""]
    for title, rows in _tables(report):
        lines += [title, *_aligned(rows), ""]
    return "\n".join(lines)


def as_page(report: Report) -> str:
    """HTML with its plots inside."""
    parts = [f"<h1>Divisi</h1><p>{html.escape(report.where)}</p>"]
    for title, rows in _tables(report):
        parts.append(f"<h2>{html.escape(title)}</h2>{_table(rows)}")
    for title, of_slice in report.latencies.items():
        parts += [_bars(f"{title}, {name}", latency) for name, latency in of_slice.items()]
    parts += [_line(title, points) for title, points in report.lines.items() if points]
    style = f"<style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Divisi</title>{style}{"".join(parts)}</html>\n'


def _tables(report: Report) -> Iterable[tuple[str, list[list[str]]]]:
    latencies = [["", "answers", "p50", "p95", "p99"]]
    for title, of_slice in report.latencies.items():
        for name, latency in of_slice.items():
            times = [_seconds(time) for time in (latency.p50, latency.p95, latency.p99)]
            latencies.append([f"{title}, {name}", f"{latency.count:,}", *times])
    yield "Latency", latencies
    rate = "" if report.tokens_per_second is None else f"{report.tokens_per_second:,.1f}"
    yield (
        "Tokens",
        [
            ["", "tokens", "per second"],
            ["prompts", f"{report.prompt_tokens:,.0f}", ""],
            ["answers", f"{report.completion_tokens:,.0f}", rate],
        ],
    )
    yield "Answers by finish reason", [["", "answers"], *([name, f"{n:,.0f}"] for name, n in report.finished.items())]
    pools = [[name, _bytes(of["bytes"]), f"{of['free']:.0%}"] for name, of in report.memory.items()]
    yield "Memory", [["", "size", "free"], *pools, *([r, _bytes(n), ""] for r, n in report.resident_bytes.items())]
    stands = [[f"draft {name}", f"{share:.1%}"] for name, share in report.acceptance.items()]
    yield "Drafts that stood", [["", "share"], *(stands or [["none were made", ""]])]
    uneven = [
        ["busiest shard over the mean", _ratio(report.imbalance)],
        ["busiest expert", _ratio(report.busiest_expert)],
    ]
    yield "Balance of experts", [["", "times"], *uneven]
    yield (
        "Trouble",
        [
            ["", "times"],
            ["an answer stood still for 1 s or more", f"{report.gaps:,.0f}"],
            ["epochs began", f"{report.epochs:,.0f}"],
            ["steps were aborted", f"{report.aborted_steps:,.0f}"],
        ],
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *cells]))
    return lines


def _table(rows: Sequence[Sequence[str]]) -> str:
    spelled = []
    for place, row in enumerate(rows):
        tag = "td" if place else "th"
        spelled.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(spelled)}</table>"


def _bars(title: str, latency: Latency) -> str:
    """Counts by bucket, from the first that has any to the last."""
    used = [bound for bound, count in latency.buckets.items() if count]
    shown = {b: n for b, n in sorted(latency.buckets.items()) if min(used) <= b <= max(used)}
    most, width = max(shown.values()), (_WIDTH - 2 * _EDGE) / len(shown)
    marks = []
    for place, (bound, count) in enumerate(shown.items()):
        left, height = _EDGE + place * width, count / most * (_HEIGHT - 2 * _EDGE)
        marks.append(
            f'<rect x="{left:.1f}" y="{_HEIGHT - _EDGE - height:.1f}" width="{width * 0.9:.1f}" height="{height:.1f}" '
            f'fill="#4878a8"><title>{count:,.0f} up to {_bound(bound)}</title></rect>'
            + _label(left + width / 2, _HEIGHT - 10, _bound(bound))
        )
    return _figure(f"{title}: {latency.count:,} by seconds, upper bounds below the bars", marks)


def _line(title: str, points: Sequence[tuple[float, float]]) -> str:
    first, last, most = points[0][0], points[-1][0], max(value for _, value in points) or 1.0
    across = (_WIDTH - 2 * _EDGE) / ((last - first) or 1.0)
    path = " ".join(
        f"{_EDGE + (at - first) * across:.1f},{_HEIGHT - _EDGE - value / most * (_HEIGHT - 2 * _EDGE):.1f}"
        for at, value in points
    )
    marks = [f'<polyline points="{path}" fill="none" stroke="#4878a8" stroke-width="2"/>']
    marks += [_label(_EDGE, _HEIGHT - 10, f"{first:.0f} s"), _label(_WIDTH - _EDGE, _HEIGHT - 10, "now")]
    return _figure(f"{title}: up to {most:,.4g}", marks)


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="10" text-anchor="middle">{html.escape(text)}</text>'


def _figure(caption: str, marks: Iterable[str]) -> str:
    drawn = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">{"".join(marks)}</svg>'
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{drawn}</figure>"


def _bound(bound: float) -> str:
    return "more" if math.isinf(bound) else f"{bound:g}"


def _seconds(time: float | None) -> str:
    return "" if time is None else f"{time * 1e3:,.1f} ms" if time < 1 else f"{time:,.2f} s"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _bytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
