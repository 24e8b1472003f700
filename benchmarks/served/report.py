"""`served`: HTTP rows beside the engine in process and any OpenAI servers, round after round; and the tables."""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from divisi.benchmarks import machine
from divisi.benchmarks.model import bench_model
from divisi.benchmarks.served.cells import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    STREAMS,
    Figures,
    Mix,
    completion_streams,
    mixes,
    of_burst,
    of_engine,
    with_clocks,
)
from divisi.benchmarks.served.in_process import EngineAlone
from divisi.benchmarks.served.load import LoadGenerator
from divisi.benchmarks.served.server import RunningServer, running
from divisi.deploy.serve_app import gang_spec
from divisi.deploy.settings import Settings
from divisi.model.config import ModelConfig
from divisi.model.text import TextCodec

OURS, ALONE = "divisi", "engine in process"
COMPLETIONS = "/v1/completions"
_FEW_STREAMS = 8
Table = dict[Mix, dict[str, Figures]]

# What is wanted: processor time in ms per token at 32 streams, and what the way over HTTP may cost.
_LIMITS = {"beyond": 0.05, "ingress": 0.10, "front": 0.05}
_GAPS = {1: 1.4, 32: 1.6}
_RATES = {1: 0.68, 8: 0.68, 32: 0.70}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `python -m divisi.benchmarks served`."""
    parser.add_argument("--model", type=Path, help="checkpoint folder; without it, a random one of bench-s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, interleaved (default 5)")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=URL",
        help="another OpenAI server with the same model, for instance vllm=http://127.0.0.1:8001",
    )  # fmt: skip
    parser.add_argument("--serve-args", default="", metavar="FLAGS", help="more flags of `divisi serve`")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, metavar="N", help="default: 1 8 32 64")
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=PROMPT_TOKENS, metavar="N", help="default: 16 256"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there, and FILE.json beside it")


def main(options: argparse.Namespace) -> int:
    """Measure and print. Exits where an answer is wrong."""
    peers = dict(peer.split("=", 1) for peer in options.peer)
    with tempfile.TemporaryDirectory() as name:
        model_dir = bench_model(options.model, Path(name))
        max_seqs = max(options.streams)
        flags = ["--max-seqs", str(max_seqs), *options.serve_args.split()]
        with running("measured", model_dir, flags, Path(name)) as server, LoadGenerator() as load:
            contest = Contest(server, load, model_dir, max_seqs, peers)
            contest.check()
            table = contest.measure(mixes(options.streams, options.prompt_tokens), options.rounds)
    told = (
        f"{machine.describe()}\n\nbf16, {model_dir.name}, {ANSWER_TOKENS} tokens out, client and server on the same "
        f"cores, {options.rounds} rounds, medians (lowest to highest)"
    )
    text = f"{told}\n\n{speed_table(table)}\n\n{cost_table(table)}\n\n{verdicts(table)}"
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
        rounds = {mix.title: {who: found.rounds for who, found in row.items()} for mix, row in table.items()}
        options.out.with_suffix(".json").write_text(json.dumps({"told": told, "rounds": rounds}, indent=1) + "\n")
    return 0


class Contest:
    """The server, its engine alone, and peers, on the same prompts."""

    def __init__(
        self, server: RunningServer, load: LoadGenerator, model_dir: Path, max_seqs: int, peers: Mapping[str, str]
    ) -> None:
        """`peers`: name to URL."""
        self._server = server
        self._load = load
        self._model_dir = model_dir
        settings = Settings.load(None, {"model": {"model_dir": model_dir}, "cache": {"max_seqs": max_seqs}})
        self._engine = EngineAlone(gang_spec(settings, 0))
        self._vocabulary = ModelConfig.load(model_dir).vocab_size
        self._urls = {OURS: server.url, **peers}
        self._models = {who: _model_of(url) for who, url in self._urls.items()}

    def check(self) -> None:
        """The server's answer to a prompt must be the engine's, which `speed` compares with transformers'."""
        mix = Mix(1, 16, 1)
        prompts = mix.prompts(-1, self._vocabulary)
        _, _, answers = self._engine.run(prompts, ANSWER_TOKENS)
        text = self._burst(OURS, mix, prompts).answers[0][0].text
        expected = TextCodec.load(self._model_dir).tokenizer.decode(answers[0].token_ids)
        if text != expected:
            raise SystemExit(f"the server's answer is {text[:200]!r}, the engine's {expected[:200]!r}")

    def measure(self, rows: Sequence[Mix], rounds: int) -> Table:
        """All contenders at all mixes, after a warm-up with few streams."""
        table: Table = {mix: {who: Figures() for who in (*self._urls, ALONE)} for mix in rows}
        warm_up = [(0, mix) for mix in rows if mix.streams <= _FEW_STREAMS]
        turns = [*warm_up, *((turn, mix) for turn in range(1, rounds + 1) for mix in rows)]
        for turn, mix in tqdm(turns, unit="mix", leave=False):
            prompts = mix.prompts(turn, self._vocabulary)
            for who in (*self._urls, ALONE) if turn % 2 else (ALONE, *self._urls):
                figures = self._run(who, mix, prompts)
                if turn:
                    table[mix][who].add(**figures)
        return table

    def _run(self, who: str, mix: Mix, prompts: list[list[list[int]]]) -> dict[str, float]:
        if who == ALONE:
            return of_engine(self._engine, prompts)
        if who == OURS:
            return with_clocks(self._server.clocks, lambda: self._burst(who, mix, prompts))
        return of_burst(self._burst(who, mix, prompts))

    def _burst(self, who: str, mix: Mix, prompts: list[list[list[int]]]) -> Any:
        streams = completion_streams(mix, prompts, self._models[who])
        return self._load.run(self._urls[who] + COMPLETIONS, streams)


def speed_table(table: Table) -> str:
    """Tokens per second, the time between tokens, the time to the first; each beside the engine's own."""
    lines = [
        "| | | tokens/s | of the engine's | ms between tokens | times the engine's | ms to the first token |",
        "|---|---|---|---|---|---|---|",
    ]
    for mix, row in table.items():
        alone = row[ALONE]
        for who, found in row.items():
            rate, gap = found.median("rate") / alone.median("rate"), found.median("gap") / alone.median("gap")
            ratios = ("", "") if who == ALONE else (f"{rate:.2f}x", f"{gap:.2f}x")
            cells = (mix.title, who, _shown(found, "rate", 0), ratios[0], _shown(found, "gap", 1), ratios[1],
                     _shown(found, "first", 0))  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(table: Table) -> str:
    """Processor time of our server by part."""
    parts = {"engine": "worker: engine", "beyond": "worker: beyond it", "plan": "plan", "loop": "rest of its thread",
             "threads": "other threads", "ingress": "ingress", "front": "front", "other": "other of Ray",
             "client": "client"}  # fmt: skip
    lines = ["| CPU ms per token | engine in process | " + " | ".join(parts.values()) + " |"]
    lines.append("|---" * (len(parts) + 2) + "|")
    for mix, row in table.items():
        costs = [f"{row[ALONE].median('engine'):.3f}", *(f"{row[OURS].median(part):.3f}" for part in parts)]
        lines.append(f"| {mix.title} | {' | '.join(costs)} |")
    return "\n".join(lines)


def verdicts(table: Table) -> str:
    """What is wanted, and whether it is so."""
    lines = []
    for mix, row in table.items():
        ours, alone = row[OURS], row[ALONE]
        if mix.streams == 32 and mix.prompt_tokens == 16:
            lines += [_verdict(mix, f"{part}, ms per token", ours.median(part), at_most=limit)
                      for part, limit in _LIMITS.items()]  # fmt: skip
        if mix.prompt_tokens == 16 and (limit := _GAPS.get(mix.streams)) is not None:
            ratio = ours.median("gap") / alone.median("gap")
            lines.append(_verdict(mix, "ms between tokens, times the engine's", ratio, at_most=limit))
        if mix.prompt_tokens == 256 and (limit := _RATES.get(mix.streams)) is not None:
            ratio = ours.median("rate") / alone.median("rate")
            lines.append(_verdict(mix, "tokens/s, of the engine's", ratio, at_least=limit))
    return "\n".join(lines)


def _verdict(mix: Mix, what: str, found: float, at_most: float | None = None, at_least: float | None = None) -> str:
    met = found <= at_most if at_most is not None else found >= (at_least or 0.0)
    wanted = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
    return f"- {mix.title}: {what}: {found:.3f}, wanted {wanted}: {'met' if met else 'MISSED'}"


def _shown(found: Figures, name: str, digits: int) -> str:
    low, high = found.spread(name)
    return f"{found.median(name):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _model_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        found: str = json.load(answer)["data"][0]["id"]
    return found
