"""What the MTP layer costs where nobody drafts: an engine that has it, all of its requests with 0, beside one without.

The two decode the same prompts by turns, four steps each, so that what disturbs the machine hits both. Every three
pairs both are made anew, in the other order: where an engine has its memory can favour it for life.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from divisi.benchmarks.checkouts.ratio import Ratios
from divisi.benchmarks.contenders import prompts
from divisi.benchmarks.drafts.depths import demo_spec
from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.request import Request, Sampling
from divisi.model.demo import checkpoint_dir
from divisi.model.random_checkpoint import write_random_checkpoint

_CONFIG = Path(__file__).parents[1] / "configs" / "bench-s.json"
_BATCHES = (1, 16)
_TURNS, _A_TURN = 16, 4
_ANEW_EVERY = 3
_CAP = 3
_TARGET = 0.98


class _Decoder:
    """An engine in the middle of answers."""

    def __init__(self, model_dir: Path, drafts: int) -> None:
        spec = demo_spec(model_dir, drafts, True, max_step_tokens=2048)
        config = served_config(spec)
        self._vocabulary = config.vocab_size
        self._engine, experts = build_engine(spec, config)
        assert experts is not None, "a gang of one rank holds all experts"
        self._end = LocalEnd(experts)
        self.steps(None)  # what it measures by itself comes first

    def begin(self, batch: int) -> None:
        """Take in as many prompts."""
        for index, prompt in enumerate(prompts(batch, 16, self._vocabulary)):
            count, greedy = _TURNS * _A_TURN + 1, Sampling(temperature=0.0)
            self._engine.submit(Request(str(index), tuple(prompt), count, greedy, max_draft_tokens=0))
        self.steps(1)

    def steps(self, count: int | None) -> float:
        """Seconds of so many steps; None: of all that there are."""
        start = time.perf_counter()
        while count != 0 and (plan := self._engine.plan()) is not None:
            self._engine.run(plan, self._end)
            count = None if count is None else count - 1
        return time.perf_counter() - start


def report(pairs: int) -> tuple[str, bool]:
    """The table, and whether what is wanted of bench-s is so; the demo model's rows are for information."""
    rows, passed = [Ratios.HEADER], True
    with tempfile.TemporaryDirectory() as scratch:
        bench = Path(scratch) / "bench-s"
        write_random_checkpoint(bench, json.loads(_CONFIG.read_text()), tokenizer=False, mtp=True)
        for name, model_dir in (("bench-s", bench), ("divisi-demo", checkpoint_dir())):
            for batch, ratios in zip(_BATCHES, _measure(model_dir, pairs), strict=True):
                rows.append(f"| {name}, batch {batch} {ratios.row(_TARGET)}")
                passed = passed and (name != "bench-s" or ratios.verdict(_TARGET).passed)
    title = f"BEFORE: cap 0, no layer loaded. AFTER: cap {_CAP}, every request with 0. Wanted of bench-s: {_TARGET}"
    return "\n".join([title, "", *rows]), passed


def _measure(model_dir: Path, pairs: int) -> list[Ratios]:
    found = [Ratios() for _ in _BATCHES]
    decoders: dict[int, _Decoder] = {}
    for pair in range(pairs):
        if pair % _ANEW_EVERY == 0:
            order = (0, _CAP) if pair // _ANEW_EVERY % 2 == 0 else (_CAP, 0)
            decoders.clear()
            decoders |= {drafts: _Decoder(model_dir, drafts) for drafts in order}
        for batch, ratios in zip(_BATCHES, found, strict=True):
            ratios.add(*_pair([decoders[0], decoders[_CAP]], batch))
    return found


def _pair(decoders: Sequence[_Decoder], batch: int) -> tuple[float, float]:
    seconds = [0.0, 0.0]
    for decoder in decoders:
        decoder.begin(batch)
    for turn in range(_TURNS):
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[index] += decoders[index].steps(_A_TURN)
    return seconds[0], seconds[1]
