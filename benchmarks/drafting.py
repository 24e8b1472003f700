"""Multi-token prediction on the demo model: fixed depths and the adaptive one beside none; the same tokens first.

Waves of held-out conversations are decoded to their ends, greedily, by engines of one process. Only steps without
prefill are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.model.demo import checkpoint_dir
from divisi.model.demo.evaluation.cases import make_cases
from divisi.model.text.template import ChatTemplate

BATCHES = (1, 4, 16, 32)
_SKILLS = ("chat", "recall 1k")
_LONGEST = 64
"""Tokens of an answer."""
DEPTHS: dict[str, tuple[int, bool]] = {
    "off": (0, False),
    "k = 1": (1, False),
    "k = 3": (3, False),
    "k = 5": (5, False),
    "adaptive": (5, True),
}
"""Most drafts, and whether fewer are taken where that pays."""


@dataclass(slots=True)
class Wave:
    """What one engine did with some conversations."""

    answers: dict[str, list[int]]
    tokens: int = 0
    """Of the steps that were timed."""
    steps: int = 0
    seconds: float = 0.0


class Drafting:
    """An engine with one way to draft."""

    def __init__(self, name: str) -> None:
        self.name = name
        most, adaptive = DEPTHS[name]
        spec = _spec(checkpoint_dir(), most, adaptive)
        self._engine, experts = build_engine(spec, served_config(spec))
        assert experts is not None, "a gang of one rank holds all experts"
        self._end = LocalEnd(experts)

    def serve(self, requests: Sequence[Request]) -> Wave:
        """Decode a wave to its end."""
        wave = Wave({request.request_id: [] for request in requests})
        for request in requests:
            self._engine.submit(request)
        start = time.perf_counter()
        while (plan := self._engine.plan()) is not None:
            events = self._engine.run(plan, self._end)
            end = time.perf_counter()
            for event in events:
                wave.answers[event.request_id] += event.token_ids
            if not plan.scans:
                wave.tokens += sum(len(event.token_ids) for event in events)
                wave.seconds += end - start
                wave.steps += 1
            start = time.perf_counter()
        return wave


def report(rounds: int, quick: bool) -> str:
    """Measure; the table. Raises SystemExit where tokens differ."""
    batches = BATCHES[:2] if quick else BATCHES
    contenders = [Drafting(name) for name in DEPTHS]
    conversations = _conversations(max(batches) * 2)
    expected = contenders[0].serve(conversations).answers
    for contender in contenders[1:]:
        if contender.serve(conversations).answers != expected:
            raise SystemExit(f"{contender.name}: other tokens than without drafts; no speed is reported")
    waves: dict[tuple[str, int], list[Wave]] = {(name, batch): [] for name in DEPTHS for batch in batches}
    for turn in tqdm(range(rounds), desc="drafting", unit="round", leave=False):
        for batch in batches:
            first = turn * batch % (len(conversations) - batch + 1)
            for contender in contenders:
                waves[contender.name, batch].append(contender.serve(conversations[first : first + batch]))
    return "\n".join([_head(len(expected), batches), *(_row(name, waves, batches) for name in DEPTHS)])


def _head(checked: int, batches: Sequence[int]) -> str:
    title = f"checked: the tokens of {checked} answers are the same with any number of drafts"
    columns = " | ".join(f"batch {batch}" for batch in batches)
    return f"{title}\n\n| tokens/s, times of off, tokens per step | {columns} |\n" + "|---" * (len(batches) + 1) + "|"


def _row(name: str, waves: dict[tuple[str, int], list[Wave]], batches: Sequence[int]) -> str:
    cells = []
    for batch in batches:
        own, off = waves[name, batch], waves["off", batch]
        ratios = sorted((a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in zip(own, off, strict=True))
        rate = sum(wave.tokens for wave in own) / sum(wave.seconds for wave in own)
        a_step = sum(wave.tokens for wave in own) / sum(wave.steps for wave in own) / batch
        spread = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        cells.append(f"{rate:,.0f}, {spread}, {a_step:.2f}")
    return f"| {name} | {' | '.join(cells)} |"


def _conversations(count: int) -> list[Request]:
    folder = checkpoint_dir()
    template = ChatTemplate((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = (tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>"))
    stops = frozenset(token for token in ends if token is not None)
    cases = [case for skill in _SKILLS for case in make_cases(skill, count // len(_SKILLS), seed=16)]
    found = []
    for number, case in enumerate(cases[:: len(_SKILLS)] + cases[1 :: len(_SKILLS)]):
        text = template.render(case.messages, tools=case.tools, enable_thinking=case.thinks)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        found.append(Request(str(number), ids, _LONGEST, Sampling(temperature=0.0), stops))
    return found


def _spec(model_dir: Path, most: int, adaptive: bool) -> GangSpec:
    return GangSpec(
        name="drafting",
        model_dir=str(model_dir),
        dtype="bfloat16",
        device="cpu",
        threads=torch.get_num_threads(),
        kernels="auto",
        deterministic=False,
        shape=GangShape(1, 0),
        max_model_len=4096,
        kv_memory=2**28,
        page_size=16,
        max_seqs=max(BATCHES),
        max_step_tokens=512,
        step_deadline_s=60.0,
        max_draft_tokens=most,
        adaptive_drafts=adaptive,
    )
