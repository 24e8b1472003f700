"""Workers over time, above the requests that come, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_WIDTH, _HEIGHT, _LEFT, _TOP, _BETWEEN = 900, 190, 50, 24, 46
_COLOURS = ("#888888", "#c9a227", "#1f5fa8", "#b23a48", "#7b4fa3")


@dataclass
class Panel:
    """One case."""

    title: str
    rates: Sequence[tuple[float, float]]
    """Seconds, and requests a second from then on."""
    lines: dict[str, Sequence[tuple[float, int]]] = field(default_factory=dict)
    """By name: seconds, and workers from then on."""


def plot(panels: Sequence[Panel]) -> str:
    """All of them below each other, with a legend."""
    colours = dict(zip(panels[0].lines, _COLOURS, strict=False)) if panels else {}
    height = _TOP + len(panels) * (_HEIGHT + _BETWEEN) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, _TOP + number * (_HEIGHT + _BETWEEN), colours)
    for number, (name, colour) in enumerate(colours.items()):
        x = _LEFT + number * 168
        parts.append(f'<rect x="{x}" y="{height - 22}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{height - 13}" font-size="10">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: float, colours: Mapping[str, str]) -> list[str]:
    end = max(at for at, _ in panel.rates) or 1.0
    most = max(number for line in panel.lines.values() for _, number in line)
    peak = max(rate for _, rate in panel.rates) or 1.0

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 20) * min(at / end, 1.0)

    def y(part: float) -> float:
        return top + _HEIGHT * (1 - part)

    area = " ".join(f"{x(at):.1f},{y(rate / peak):.1f}" for at, rate in panel.rates)
    parts = [
        f'<polygon points="{x(0):.1f},{y(0):.1f} {area} {x(end):.1f},{y(0):.1f}" fill="#e8e8e8"/>',
        f'<text x="{_LEFT}" y="{top - 6}">{panel.title}: workers; grey: requests, {peak:.1f}/s at most</text>',
        f'<line x1="{_LEFT}" x2="{x(end):.1f}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="#444"/>',
    ]
    for part in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{_LEFT - 6}" y="{y(part) + 4:.1f}" text-anchor="end">{most * part:.0f}</text>')
    for quarter in range(5):
        at = end * quarter / 4
        parts.append(f'<text x="{x(at):.1f}" y="{y(0) + 15:.1f}" text-anchor="middle">{at / 60:.0f} min</text>')
    for name, line in panel.lines.items():
        corners = []
        for (at, number), (until, _) in zip(line, [*line[1:], (end, 0)], strict=True):
            corners += [f"{x(at):.1f},{y(number / most):.1f}", f"{x(until):.1f},{y(number / most):.1f}"]
        parts.append(
            f'<polyline points="{" ".join(corners)}" fill="none" stroke="{colours[name]}" stroke-width="1.6"/>'
        )
    return parts
