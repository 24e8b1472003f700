"""A run as text: what was struck, the gaps by kind as a table and as a plot (SVG), and what the judge found."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tests.e2e.chaos.blows import KINDS
from tests.e2e.chaos.harness import Record
from tests.e2e.chaos.judge import Struck, Verdict, gap_of

Gap = tuple[Struck, float]
_SHOWN = 25
_WIDTH, _ROW, _LEFT, _SECONDS = 760, 34, 150, 30.0


def gaps(record: Record) -> list[Gap]:
    """Of every blow that struck somebody."""
    return [(hit, gap_of(hit, record.answers)) for hit in record.struck if hit.processes]


def table(found: Sequence[Gap]) -> list[str]:
    """Markdown: by kind and way, how many blows and the longest gap after each."""
    lines = ["| struck | blows | found a stream of theirs | median gap, s | longest, s |", "|---|---|---|---|---|"]
    for kind in KINDS:
        for way, killed in (("killed", True), ("stopped", False)):
            of = [(hit, gap) for hit, gap in found if hit.blow.kind == kind and (hit.blow.stopped_s is None) == killed]
            if of:
                open_ = sum(hit.streams > 0 for hit, _ in of)
                seconds = [gap for _, gap in of]
                row = (f"{kind}, {way}", str(len(of)), str(open_), f"{median(seconds):.2f}", f"{max(seconds):.2f}")
                lines.append("| " + " | ".join(row) + " |")
    return lines


def plot(found: Sequence[Gap]) -> str:
    """SVG: a dot a blow, by kind and seconds of its longest gap; hollow: stopped."""
    height = _ROW * (len(KINDS) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for second in (0, 1, 2, 5, 10, 15, 20, 25):
        x = _x(second)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - _ROW}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle">{second} s</text>')
    for row, kind in enumerate(KINDS):
        y = _ROW * (row + 0.6)
        parts.append(f'<text x="8" y="{y + 4:.1f}">{kind}</text>')
        for hit, gap in found:
            if hit.blow.kind == kind:
                fill = "none" if hit.blow.stopped_s is not None else "#1f5fa8"
                parts.append(f'<circle cx="{_x(gap):.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="#1f5fa8"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(seconds: float) -> float:
    """The axis is that of the square root, since most gaps are short."""
    return _LEFT + (_WIDTH - _LEFT - 30) * (min(seconds, _SECONDS) / _SECONDS) ** 0.5


def summary(record: Record, verdict: Verdict) -> list[str]:
    """Counts first, then each fault."""
    tokens = sum(answer.num_tokens for answer in record.answers)
    hits = [hit for hit in record.struck if hit.processes]
    found = sum(hit.streams > 0 for hit in hits)
    lines = [
        f"{len(record.answers)} requests, {tokens} tokens in {record.seconds:.0f} s",
        f"{verdict.whole} whole answers equal to their references, {len(verdict.undecided)} parted at a tie",
        f"{len(record.struck)} blows, {len(hits)} struck somebody: {found} found a stream of theirs open, "
        f"{sum(hit.processes > 1 for hit in hits)} struck two at once",
        f"{len(verdict.broken)} requests failed with their ingress or front; {verdict.prefixes} streams had begun, and "
        "were right as far as they came",
        f"{len(verdict.refused)} requests told 503 while the gang was struck",
        f"{len(verdict.long_gaps)} long gaps with an excuse; {len(verdict.faults)} FAULTS",
    ]
    for title, texts in (("tie", verdict.undecided), ("long gap", verdict.long_gaps), ("FAULT", verdict.faults)):
        lines += [f"  {title}: {text}" for text in texts[:_SHOWN]]
        lines += [f"  and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return lines
