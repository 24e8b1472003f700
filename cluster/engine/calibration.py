"""Measures what passes cost by their rows, before a worker serves: the table that decides how far drafts go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from divisi.cluster.drafting import StepTimes
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.passes import PassKind
from divisi.model.batch import DecodeRows, StepBatch
from divisi.model.dispatcher import Dispatcher, Pending
from divisi.model.mtp import Drafted

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 47, 48, 64, 96, 128, 192, 256)
_REPEATS = 3
_BUDGET_S = 6.0
"""For the whole table; what is left out then is estimated from the rest."""


class Runner(Protocol):
    """The model and its memory, of which nothing is in use yet."""

    def forward(self, batch: StepBatch, dispatcher: Dispatcher) -> Tensor:
        """Run a full pass."""
        ...

    def draft(self, batch: StepBatch, dispatcher: Dispatcher, hidden_SD: Tensor | None) -> Drafted:
        """Run a draft pass."""
        ...


class NoExperts:
    """Stands for experts elsewhere, whose share of the time only steps of the gang can tell."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        """See Dispatcher."""
        return _Nothing(x_TD)


@dataclass(frozen=True, slots=True)
class _Nothing:
    x_TD: Tensor

    def combine(self) -> Tensor:
        return torch.zeros(self.x_TD.shape, device=self.x_TD.device)


def measure(runner: Runner, dispatcher: Dispatcher, config: SchedulerConfig, device: torch.device) -> StepTimes:
    """The best of a few runs each, of rows at the beginning of their texts. What they write counts for nothing."""
    end = perf_counter() + _BUDGET_S
    found: dict[PassKind, dict[int, float]] = {PassKind.FULL: {}, PassKind.DRAFT: {}}
    most_rows = 1 + config.max_draft_tokens
    for rows in _ROWS:
        fits = rows <= min(config.max_step_tokens, config.max_seqs * most_rows)
        for kind, each in ((PassKind.FULL, most_rows), (PassKind.DRAFT, 1)):
            if not fits or (found[kind] and (perf_counter() > end or rows > config.max_seqs * each)):
                continue
            batch = _batch(rows, each, config, device)
            found[kind][rows] = _best(_pass_of(runner, kind, batch, dispatcher), device)
    return StepTimes(found)


def _pass_of(runner: Runner, kind: PassKind, batch: StepBatch, dispatcher: Dispatcher) -> Callable[[], object]:
    if kind is PassKind.FULL:
        return lambda: runner.forward(batch, dispatcher)
    return lambda: runner.draft(batch, dispatcher, None)


def _best(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS):
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - start)
    return min(times)


def _batch(rows: int, each: int, config: SchedulerConfig, device: torch.device) -> StepBatch:
    """Rows of as few sequences as can have them, at their first positions, in pages and slots that may be shared."""
    counts = [min(each, rows - first) for first in range(0, rows, each)]
    needed = -(-each // config.page_size)
    pages = [[(index * needed + page) % config.num_pages for page in range(needed)] for index in range(len(counts))]
    positions = [position for count in counts for position in range(count)]
    size = config.page_size
    kv_rows = [
        own[position // size] * size + position % size
        for own, count in zip(pages, counts, strict=True)
        for position in range(count)
    ]

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
    pages_SN = torch.tensor(pages, dtype=torch.int32, device=device)
    slots = [index % config.num_slots for index in range(len(counts))]
    return StepBatch(
        token_ids_T=torch.arange(rows, device=device) % config.vocab_size,
        positions_T=ints(positions),
        kv_rows_T=ints(kv_rows),
        decode=DecodeRows(ints(starts), ints([0] * len(counts)), ints(slots), pages_SN),
        prefill=None,
        decode_rows=rows,
        logit_rows_R=torch.arange(rows, device=device),
    )
