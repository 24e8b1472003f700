"""`steps`: a whole server whose steps compute nothing, at one pace after another: how many tokens it delivers."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from divisi.benchmarks import machine
from divisi.benchmarks.model import bench_model
from divisi.benchmarks.served.cells import Figures
from divisi.benchmarks.served.load import Burst, LoadGenerator, Stream
from divisi.benchmarks.served.nothing import expected_tokens, plain_tokens
from divisi.benchmarks.served.server import RunningServer, running
from divisi.model.text import TextCodec

STREAMS = 64
_PACES_MS = (32.0, 16.0, 8.0, 6.4, 5.0, 4.0, 3.2)
_RUN_S = 4.0
_PAUSE_S, _PAUSED_RUN_S = 5.0, 8.0
_WANTED = 10_000
_PARTS = {"engine": "worker: empty steps", "plan": "plan", "loop": "rest of its thread", "threads": "other threads",
          "ingress": "ingress", "front": "front", "other": "other of Ray", "client": "client"}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `python -m divisi.benchmarks steps`."""
    parser.add_argument("--model", type=Path, help="checkpoint folder, for its tokenizer; without it, bench-s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, all paces in each (default 5)")
    parser.add_argument("--serve-args", default="", metavar="FLAGS", help="more flags of `divisi serve`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there, and FILE.json beside it")


def main(options: argparse.Namespace) -> int:
    """Measure and print. Exits where a token is lost, or out of order."""
    with tempfile.TemporaryDirectory() as name:
        model_dir = bench_model(options.model, Path(name))
        flags = ["--max-seqs", str(STREAMS), *options.serve_args.split()]
        with running("idle", model_dir, flags, Path(name)) as server, LoadGenerator() as load:
            flow = Flow(server, load, model_dir)
            found = flow.at_paces(options.rounds)
            paused = flow.with_a_pause(_fastest_kept(found))
    told = (
        f"{machine.describe()}\n\nSteps that compute nothing, {STREAMS} streams, a token each a step; client and "
        f"server on the same cores, {options.rounds} rounds, medians. All texts checked: every token, in order."
    )
    text = f"{told}\n\n{table(found)}\n\n{verdict(found)}\n\n{paused}"
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
        rounds = {f"a step every {pace:g} ms": figures.rounds for pace, figures in found.items()}
        options.out.with_suffix(".json").write_text(json.dumps({"told": told, "rounds": rounds}, indent=1) + "\n")
    return 0


class Flow:
    """Tokens through a server with nothing to compute."""

    def __init__(self, server: RunningServer, load: LoadGenerator, model_dir: Path) -> None:
        self._server = server
        self._load = load
        self._plain = plain_tokens(model_dir)
        self._tokenizer = TextCodec.load(model_dir).tokenizer
        self._model = model_dir.name

    def at_paces(self, rounds: int) -> dict[float, Figures]:
        """By milliseconds of a step; the warm-up ends at the first pace of which less than half is reached."""
        found: dict[float, Figures] = {}
        for pace in _PACES_MS:
            found[pace] = Figures()
            if self._one_run(pace)["rate"] < _rate(pace) / 2:
                break
        for pace in tqdm(list(found) * rounds, unit="run", leave=False):
            found[pace].add(**self._one_run(pace))
        return found

    def _one_run(self, pace: float) -> dict[str, float]:
        before = self._server.clocks()
        burst = self._run(pace, int(_RUN_S * 1e3 / pace), 0.0)
        after = self._server.clocks()
        answers = [answer for stream in burst.answers for answer in stream]
        return {
            "rate": burst.tokens / burst.seconds,
            "events": sum(answer.events for answer in answers) / burst.tokens,
            "gap": max(answer.longest_gap_s for answer in answers) * 1e3,
            "client": burst.cpu_seconds / burst.tokens * 1e3,
            **{part: (after[part] - before[part]) / burst.tokens * 1e3 for part in after},
        }

    def with_a_pause(self, pace: float) -> str:
        """One stream's reader stops for a while."""
        count = int(_PAUSED_RUN_S * 1e3 / pace)
        burst = self._run(pace, count, _PAUSE_S)
        (slow,), *others = burst.answers
        gap = max(answer.longest_gap_s for (answer,) in others) * 1e3
        merged = sum(answer.tokens - answer.events for (answer,) in others)
        last = max(answer.last_s for (answer,) in others)
        return (
            f"A reader that stops for {_PAUSE_S:g} s, {count} tokens each, a step every {pace:g} ms: "
            f"it got all of its tokens, in order, in {slow.events} events, with a gap of {slow.longest_gap_s:.1f} s. "
            f"The other {STREAMS - 1} ended after {last:.1f} s, their longest gap was {gap:.0f} ms, and {merged} of "
            "their tokens shared an event with another."
        )

    def _run(self, pace_ms: float, count: int, pause_s: float) -> Burst:
        """Exits where a text is not what the engine sent."""
        prompts = [[number, *range(15)] for number in range(STREAMS)]
        bodies: list[dict[str, Any]] = [
            {"model": self._model, "prompt": prompt, "max_tokens": count, "seed": round(pace_ms * 1e3),
             "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
            for prompt in prompts
        ]  # fmt: skip
        streams = [Stream([body], pause_s if number == 0 else 0.0) for number, body in enumerate(bodies)]
        burst = self._load.run(f"{self._server.url}/v1/completions", streams)
        for prompt, (answer,) in zip(prompts, burst.answers, strict=True):
            expected = self._tokenizer.decode(expected_tokens(self._plain, prompt, count))
            if answer.text != expected or answer.tokens != count:
                raise SystemExit(f"stream {prompt[0]} lost or mixed up tokens: {answer.text[:200]!r}")
        return burst


def table(found: dict[float, Figures]) -> str:
    """By pace."""
    lines = [
        "| a step every | tokens/s wanted | tokens/s | events per token | longest gap, ms | "
        f"CPU ms per token: {' | '.join(_PARTS.values())} |",
        "|---" * (5 + len(_PARTS)) + "|",
    ]
    for pace, figures in found.items():
        low, high = figures.spread("rate")
        rate = f"{figures.median('rate'):,.0f} ({low:,.0f} to {high:,.0f})"
        cells = [f"{pace:g} ms", f"{_rate(pace):,.0f}", rate, f"{figures.median('events'):.4f}",
                 f"{figures.median('gap'):.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join([*cells, *(f'{figures.median(part):.3f}' for part in _PARTS)])} |")
    return "\n".join(lines)


def verdict(found: dict[float, Figures]) -> str:
    """The most tokens per second with an event for each, in every round."""
    whole = [figures.median("rate") for figures in found.values() if figures.spread("events")[0] == 1.0]
    most = max(figures.median("rate") for figures in found.values())
    best = max(whole, default=0.0)
    return (
        f"With an event for every token, in every round: {best:,.0f} tokens/s, wanted {_WANTED:,}: "
        f"{'met' if best >= _WANTED else 'MISSED'}. With events that several tokens share: {most:,.0f}."
    )


def _rate(pace: float) -> float:
    """Tokens per second at milliseconds of a step."""
    return STREAMS / pace * 1e3


def _fastest_kept(found: dict[float, Figures]) -> float:
    """The fastest pace that was kept up, else the slowest."""
    kept = [pace for pace, figures in found.items() if figures.median("rate") > 0.8 * _rate(pace)]
    return min(kept, default=max(found))
