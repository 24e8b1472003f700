"""Decode and prefill beside transformers, interleaved in one run; correctness first, losing rows printed too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen3NextForCausalLM

from divisi.benchmarks.contenders import CompiledTransformers, Contender, DivisiEngine, Transformers, prompts
from divisi.benchmarks.machine import read_bandwidth

EXPERT_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
COMPILED_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
CHECKED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """One column of the table."""

    title: str
    tokens: int
    """Tokens of work in one run."""
    run: Callable[[Contender], float | None]
    target: float | None = None
    """What times the best of transformers is wanted."""


@dataclass(slots=True)
class Result:
    """Tokens per second of every contender, one list per cell, in the order of the rounds."""

    cells: Sequence[Cell]
    bandwidths: list[float] = field(default_factory=list)
    rates: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, name: str, cell: int, rate: float) -> None:
        """Keep one run's tokens per second."""
        self.rates[name][cell].append(rate)

    def median(self, name: str, cell: int) -> float:
        """Tokens per second; 0 where the contender does not take part."""
        return statistics.median(self.rates[name][cell] or [0.0])

    def hopeless(self, name: str, cell: int, ours: str) -> bool:
        """Whether a peer is far behind another peer, or does not take part."""
        best = max(self.median(peer, cell) for peer in self.rates if peer != ours)
        return name != ours and self.median(name, cell) < best / 4

    def forget_warm_ups(self, going_on: set[tuple[str, int]]) -> None:
        """Drop the first run of those that will be run again."""
        for name, cell in going_on:
            self.rates[name][cell].clear()


def cells(quick: bool) -> list[Cell]:
    """The table's columns; the quick ones are shorter, not other."""
    steps, long = (8, 1024) if quick else (32, 4096)
    return [
        Cell("decode 1", steps, lambda c: c.decode(1, steps), 2.0),
        Cell("decode 4", 4 * steps, lambda c: c.decode(4, steps)),
        Cell("decode 16", 16 * steps, lambda c: c.decode(16, steps), 2.0),
        Cell("prefill 512", 512, lambda c: c.prefill(512), 1.2),
        Cell(f"prefill {long}", long, lambda c: c.prefill(long), 1.2),
    ]


def check_correct(model_dir: Path) -> str:
    """Compare greedy tokens in fp32 with transformers'; return how it went. Raises SystemExit on a difference."""
    model = Qwen3NextForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    sequences = prompts(4, 48, model.config.vocab_size)
    ours = DivisiEngine.local(model_dir, "float32").generate(sequences, CHECKED_TOKENS)
    for prompt, answer in zip(sequences, ours, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
        best = logits.max(-1).values
        gap = float((best - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]).max())
        if gap > 1e-3:
            raise SystemExit(f"wrong tokens: one lies {gap:.2e} below the oracle's best logit; no speed is reported")
    return f"checked: 4 x {CHECKED_TOKENS} greedy tokens in fp32 are transformers' own"


def load_contenders(model_dir: Path, compiled: bool) -> list[Contender]:
    """Divisi, then transformers in each of its ways to run experts; all in bf16."""
    model = Qwen3NextForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    peers: list[Contender] = [Transformers(model, experts) for experts in EXPERT_IMPLEMENTATIONS]
    if compiled:
        peers += [CompiledTransformers(model, experts) for experts in COMPILED_IMPLEMENTATIONS]
    return [DivisiEngine.local(model_dir, "bfloat16"), *peers]


def measure(contenders: Sequence[Contender], columns: Sequence[Cell], rounds: int) -> Result:
    """Time every contender in every cell, round after round, after one warm-up each.

    A peer whose warm-up is over four times slower than the best peer's is not run again in that cell.
    """
    result = Result(columns, rates={contender.name: [[] for _ in columns] for contender in contenders})
    runs = [(index, contender) for index in range(len(columns)) for contender in contenders]
    for turn in range(rounds + 1):
        result.bandwidths.append(read_bandwidth(torch.get_num_threads()))
        for index, contender in tqdm(runs, desc=f"round {turn} of {rounds}", unit="run", leave=False):
            seconds = columns[index].run(contender)
            if seconds is not None:
                result.add(contender.name, index, columns[index].tokens / seconds)
        if turn == 0:
            runs = [run for run in runs if not result.hopeless(run[1].name, run[0], contenders[0].name)]
            result.forget_warm_ups({(contender.name, index) for index, contender in runs})
    return result


def table(result: Result, ours: str) -> str:
    """Markdown: medians with their range, then the ratio to the fastest peer."""
    titles = [cell.title for cell in result.cells]
    lines = [f"| tokens/s | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, columns in result.rates.items():
        lines.append(f"| {name} | {' | '.join(map(_shown, columns))} |")
    verdicts = [_verdict(result, ours, index) for index in range(len(titles))]
    lines.append(f"| **{ours} : best peer** | {' | '.join(verdicts)} |")
    return "\n".join(lines)


def _shown(rates: Sequence[float]) -> str:
    if len(rates) < 2:
        return f"{rates[0]:,.0f} (once)" if rates else "as eager"
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _verdict(result: Result, ours: str, index: int) -> str:
    best = max(result.median(name, index) for name in result.rates if name != ours)
    ratio, target = result.median(ours, index) / best, result.cells[index].target
    if target is None:
        return f"{ratio:.2f}x"
    return f"{ratio:.2f}x, wanted {target:g}x: {'met' if ratio >= target else 'MISSED'}"
