"""Fixed depths and the adaptive one beside none, on the demo model: the same tokens first, then the time.

Held-out conversations are decoded greedily, so many at once, by engines that take turns, some waves each. All prompts
of a wave are taken in by its first step; the steps after it are timed while all its answers go on: drafts let some end
before others, and what remains is a smaller batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.cluster.triggers import Span
from divisi.model.demo import checkpoint_dir
from divisi.model.demo.evaluation.cases import make_cases
from divisi.model.text.template import ChatTemplate

BATCHES = (1, 4, 16, 32)
_SKILLS = ("chat", "recall 1k")
_SHORTEST, _LONGEST = 16, 64
"""Tokens of each answer that is timed: longer ones are cut, conversations with shorter ones left out."""
_CALLS = 8
_POOL = 32
"""Conversations, all of which each round serves, in as many waves as that takes."""
_TURN = 8
"""Conversations in a row that a contender serves: by itself, as a server does. What another engine leaves in the caches
slows the first steps of a turn, of which drafts make an answer to few.
"""
DEPTHS: dict[str, tuple[int, bool]] = {
    "off": (0, False),
    "k = 1": (1, False),
    "k = 3": (3, False),
    "k = 5": (5, False),
    "adaptive": (5, True),
}
"""Most drafts, and whether fewer are taken where that pays."""
_OF_BEST, _OF_OFF, _ALONE = 0.95, 0.97, 1.5
"""What is wanted of the adaptive depth: beside the best fixed one and beside none, and at batch 1 beside none."""


@dataclass(slots=True)
class Wave:
    """What one engine did with some conversations."""

    answers: dict[str, list[int]]
    tokens: int = 0
    """Of the steps that were timed."""
    steps: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def add(self, other: Wave) -> None:
        """Count another one, too, but for its answers."""
        self.tokens += other.tokens
        self.steps += other.steps
        self.seconds += other.seconds


class Contender:
    """An engine with one way to draft."""

    def __init__(self, name: str) -> None:
        self.name = name
        most, adaptive = DEPTHS[name]
        spec = demo_spec(checkpoint_dir(), most, adaptive)
        self._engine, experts = build_engine(spec, served_config(spec))
        assert experts is not None, "a gang of one rank holds all experts"
        self._end = LocalEnd(experts)
        self.serve(())  # what it measures by itself comes first

    def serve_in_waves(self, requests: Sequence[Request], batch: int) -> Wave:
        """So many at once, one wave after the other."""
        total = Wave({})
        for first in range(0, len(requests), batch):
            total.add(self.serve(requests[first : first + batch]))
        return total

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
            if len(plan.rings) == len(requests):
                wave.tokens += sum(len(event.token_ids) for event in events)
                wave.seconds += end - start
                wave.steps += 1
            start = time.perf_counter()
        return wave


Waves = dict[tuple[str, int], list[Wave]]


def report(rounds: int, batches: Sequence[int] = BATCHES) -> tuple[str, bool]:
    """Measure; the tables, and whether what is wanted is so. Raises SystemExit where tokens differ."""
    contenders = [Contender(name) for name in DEPTHS]
    pool = _pool(contenders[0])
    expected = contenders[0].serve(pool).answers
    for contender in contenders[1:]:
        if contender.serve(pool).answers != expected:
            raise SystemExit(f"{contender.name}: other tokens than without drafts; no speed is reported")
    waves: Waves = {(name, batch): [] for name in DEPTHS for batch in batches}
    for turn in tqdm(range(rounds), desc="drafts", unit="round", leave=False):
        for batch in batches:
            for name, total in _in_turns(contenders, pool, batch, turn).items():
                waves[name, batch].append(total)
    title = f"checked: the tokens of {len(expected)} answers are the same with any number of drafts"
    verdicts = list(_verdicts(waves, batches))
    tables = [*_table(waves, batches), "", *verdicts, "", *_calls(contenders[0], contenders[-1], rounds)]
    return "\n".join([title, "", *tables]), not any("MISSED" in verdict for verdict in verdicts)


def _in_turns(contenders: Sequence[Contender], pool: Sequence[Request], batch: int, turn: int) -> dict[str, Wave]:
    """Some waves by all contenders, one after the other, so that what disturbs the machine for longer disturbs all."""
    totals, each = {contender.name: Wave({}) for contender in contenders}, max(batch, _TURN)
    for number, first in enumerate(range(0, len(pool), each)):
        begin = (turn + number) % len(contenders)
        for contender in (*contenders[begin:], *contenders[:begin]):
            totals[contender.name].add(contender.serve_in_waves(pool[first : first + each], batch))
    return totals


def _calls(off: Contender, adaptive: Contender, rounds: int) -> Iterator[str]:
    """Tool calls, one at a time: without drafts, single-step inside of the call, and free."""
    free = list(_conversations("call", _CALLS, _LONGEST))
    span = Span(*_call_ids(), max_draft_tokens=0)
    single = [replace(request, spans=(span,)) for request in free]
    kinds = {"off": (off, free), "single-step": (adaptive, single), "free": (adaptive, free)}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(max(rounds // 3, 1)):
        for name, (contender, requests) in kinds.items():
            rates[name].append(contender.serve_in_waves(requests, 1).rate)
    yield "| tool calls, batch 1 | tokens/s | times of off |"
    yield "|---|---|---|"
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["off"], strict=True))
        yield f"| {name} | {statistics.median(found):,.0f} | {ratio:.2f}x |"


def _call_ids() -> tuple[int, int]:
    tokenizer = Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))
    begin, end = (tokenizer.token_to_id(name) for name in ("<tool_call>", "</tool_call>"))
    assert begin is not None and end is not None, "the demo model calls tools"  # noqa: PT018
    return begin, end


def _table(waves: Waves, batches: Sequence[int]) -> Iterator[str]:
    columns = " | ".join(f"batch {batch}" for batch in batches)
    yield f"| tokens/s; times of off, quartiles; tokens per step and sequence | {columns} |"
    yield "|---" * (len(batches) + 1) + "|"
    for name in DEPTHS:
        yield f"| {name} | {' | '.join(_cell(waves, name, batch) for batch in batches)} |"


def _cell(waves: Waves, name: str, batch: int) -> str:
    own = waves[name, batch]
    rate = statistics.median(wave.rate for wave in own)
    ratios = _ratios(waves, name, "off", batch)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    a_step = sum(wave.tokens for wave in own) / sum(wave.steps for wave in own) / batch
    return f"{rate:,.0f}; {middle:.2f}x ({low:.2f} to {high:.2f}); {a_step:.2f}"


def _verdicts(waves: Waves, batches: Sequence[int]) -> Iterator[str]:
    """Pairs of the same round, so that what disturbs a round disturbs both."""
    fixed = [name for name, (most, adaptive) in DEPTHS.items() if not adaptive]
    for batch in batches:
        best = max(fixed, key=lambda name: statistics.median(_ratios(waves, name, "off", batch)))
        wanted = {best: _OF_BEST} | {"off": _ALONE if batch == 1 else _OF_OFF}
        for name, least in wanted.items():
            ratio = statistics.median(_ratios(waves, "adaptive", name, batch))
            verdict = "met" if ratio >= least else "MISSED"
            yield f"batch {batch}: adaptive is {ratio:.3f} of {name}, wanted {least}: {verdict}"


def _ratios(waves: Waves, name: str, other: str, batch: int) -> list[float]:
    return [a.rate / b.rate for a, b in zip(waves[name, batch], waves[other, batch], strict=True)]


def _pool(contender: Contender) -> list[Request]:
    """Conversations of each skill in turn whose answers are long enough."""
    chosen: list[list[Request]] = []
    for skill in _SKILLS:
        conversations = list(_conversations(skill, _POOL, _LONGEST))
        answers = contender.serve(conversations).answers
        enough = [each for each in conversations if len(answers[each.request_id]) >= _SHORTEST]
        chosen.append(enough[: _POOL // len(_SKILLS)])
    pool = [request for pair in zip(*chosen, strict=False) for request in pair]
    return [replace(request, request_id=str(number)) for number, request in enumerate((pool * _POOL)[:_POOL])]


def _conversations(skill: str, count: int, longest: int) -> Iterator[Request]:
    folder = checkpoint_dir()
    template = ChatTemplate((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = (tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>"))
    stops = frozenset(token for token in ends if token is not None)
    for number, case in enumerate(make_cases(skill, count, seed=16)):
        text = template.render(case.messages, tools=case.tools, enable_thinking=case.thinks)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        yield Request(str(number), ids, longest, Sampling(temperature=0.0), stops)


def demo_spec(model_dir: Path, most: int, adaptive: bool, **changes: object) -> GangSpec:
    """One process that serves the demo model, with room for the largest wave's prompts in one step."""
    fields: dict[str, object] = {
        "name": "drafts",
        "model_dir": str(model_dir),
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "kernels": "auto",
        "deterministic": False,
        "shape": GangShape(1, 0),
        "max_model_len": 2048,
        "kv_memory": 2**28,
        "page_size": 16,
        "max_seqs": max(BATCHES),
        "max_step_tokens": 40_000,
        "step_deadline_s": 60.0,
        "max_draft_tokens": most,
        "adaptive_drafts": adaptive,
    }
    return GangSpec(**(fields | changes))  # type: ignore[arg-type]  # the fields have several types
