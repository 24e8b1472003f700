"""Decode and prefill beside transformers, interleaved in one run; correctness first, losing rows printed too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen3NextForCausalLM

from divisi.benchmarks.contenders import Contender, DivisiEngine, Transformers, prompts
from divisi.benchmarks.machine import read_bandwidth

EXPERT_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
CHECKED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """One column of the table."""

    title: str
    tokens: int
    """Tokens of work in one run."""
    run: Callable[[Contender], float]
    target: float | None = None
    """What times the best of transformers is wanted."""


@dataclass(slots=True)
class Result:
    """Tokens per second of every contender, one list per cell, in the order of the rounds."""

    cells: Sequence[Cell]
    bandwidths: list[float] = field(default_factory=list)
    rates: dict[str, list[list[float]]] = field(default_factory=dict)

    def median(self, name: str, cell: int) -> float:
        """Tokens per second."""
        return statistics.median(self.rates[name][cell])


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


def load_contenders(model_dir: Path) -> list[Contender]:
    """Divisi, and transformers in each of its ways to run experts; all in bf16."""
    model = Qwen3NextForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    peers = [Transformers(model, experts) for experts in EXPERT_IMPLEMENTATIONS]
    return [DivisiEngine.local(model_dir, "bfloat16"), *peers]


def measure(contenders: Sequence[Contender], columns: Sequence[Cell], rounds: int) -> Result:
    """Time every contender in every cell, round after round; one warm-up each that does not count."""
    result = Result(columns)
    result.rates = {contender.name: [[] for _ in columns] for contender in contenders}
    bar = tqdm(total=(rounds + 1) * len(contenders) * len(columns), unit="run", leave=False)
    for turn in range(rounds + 1):
        result.bandwidths.append(read_bandwidth(torch.get_num_threads()))
        for index, cell in enumerate(columns):
            for contender in contenders:
                bar.set_description(f"{contender.name}, {cell.title}")
                rate = cell.tokens / cell.run(contender)
                if turn:
                    result.rates[contender.name][index].append(rate)
                bar.update()
    bar.close()
    return result


def table(result: Result, ours: str, peers: Sequence[str]) -> str:
    """Markdown: medians with their range, then the ratio to the fastest peer."""
    lines = [
        "| tokens/s | " + " | ".join(cell.title for cell in result.cells) + " |",
        "|---" * (len(result.cells) + 1) + "|",
    ]
    for name, columns in result.rates.items():
        shown = [f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})" for rates in columns]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    ratios = []
    for index, cell in enumerate(result.cells):
        ratio = result.median(ours, index) / max(result.median(peer, index) for peer in peers)
        wanted = (
            "" if cell.target is None else f", wanted {cell.target:g}: {'met' if ratio >= cell.target else 'MISSED'}"
        )
        ratios.append(f"{ratio:.2f}x{wanted}")
    lines.append("| **best of transformers** | " + " | ".join(ratios) + " |")
    return "\n".join(lines)
