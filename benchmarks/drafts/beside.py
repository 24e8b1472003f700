"""What one that drafts costs those beside it: 16 streams without drafts on two workers and two shards, and a 17th.

Over HTTP on `divisi serve` with the demo model and a cap of 8. The 17th stream may draft eight tokens or none, by
turns; what counts is how fast the others are beside it.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from divisi.benchmarks.checkouts.ratio import median_interval
from divisi.benchmarks.served.load import LoadGenerator, Stream
from divisi.benchmarks.served.server import running
from divisi.model.demo import checkpoint_dir

_FLAGS = (
    "--attention-workers", "2", "--expert-shards", "2", "--device", "cpu",
    "--kv-memory", "64MiB", "--max-seqs", "16", "--max-model-len", "2048", "--mtp-max-draft-tokens", "8",
    "--served-model-name", "demo",
)  # fmt: skip
_BOTH_WORKERS = "[gang]\nmin_attention_workers = 2\n"
"""Or the server is ready with one of them."""
_PLAIN, _TOKENS = 16, 96
_AT_MOST = 0.05


def report(pairs: int) -> tuple[str, bool]:
    """The table, and whether what is wanted is so."""
    ratios: list[float] = []
    rates: dict[int, list[float]] = {0: [], 8: []}
    own: dict[int, list[float]] = {0: [], 8: []}
    with (
        tempfile.TemporaryDirectory() as scratch,
        running("measured", checkpoint_dir(), _flags(Path(scratch)), Path(scratch)) as server,
        LoadGenerator() as load,
    ):
        for pair in range(pairs + 1):
            found = {}
            for drafts in (0, 8) if pair % 2 else (8, 0):
                burst = load.run(f"{server.url}/v1/completions", _streams(drafts))
                *plain, (drafter,) = burst.answers
                found[drafts] = statistics.mean(_rate(answer) for (answer,) in plain)
                if pair:  # the first warms up
                    rates[drafts].append(found[drafts])
                    own[drafts].append(_rate(drafter))
            if pair:
                ratios.append(found[8] / found[0])
    ratio, (low, high) = statistics.median(ratios), median_interval(ratios)
    passed = ratio >= 1 - _AT_MOST
    lines = ["| the 17th stream | tokens/s of each of 16 others | its own |", "|---|---|---|"]
    for drafts, name in ((0, "drafts nothing"), (8, "may draft 8")):
        lines.append(f"| {name} | {statistics.median(rates[drafts]):.1f} | {statistics.median(own[drafts]):.1f} |")
    verdict = f"wanted {1 - _AT_MOST:g}: {'met' if passed else 'MISSED'}"
    shown = f"{ratio:.3f} times as fast ({low:.3f} to {high:.3f}, {pairs} pairs)"
    lines += ["", f"beside the one that may draft, the others are {shown}, {verdict}"]
    return "\n".join(lines), passed


def _flags(folder: Path) -> tuple[str, ...]:
    config = folder / "settings.toml"
    config.write_text(_BOTH_WORKERS)
    return (*_FLAGS, "--config", str(config))


def _streams(drafts: int) -> list[Stream]:
    """The one that may draft goes on for longer than the others."""

    def body(number: int, most: int, tokens: int = _TOKENS) -> dict[str, Any]:
        return {
            "model": "demo", "prompt": f"Tell me about the number {number}.", "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
            "mtp": {"max_draft_tokens": most},
        }  # fmt: skip

    return [*(Stream([body(number, 0)]) for number in range(_PLAIN)), Stream([body(_PLAIN, drafts, 6 * _TOKENS)])]


def _rate(answer: Any) -> float:
    return float((answer.tokens - 1) / (answer.last_s - answer.first_s))
