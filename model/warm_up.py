"""Steps that mean nothing, before the first that does: whatever later steps launch is compiled by then.

A kernel is compiled for its chip at its first launch, and once more where an argument is special (1, a multiple of 16)
or a shape takes other tiles. Which steps these are is known by their sizes alone, so that these go through all of them:
rows of a sequence, sequences and widths of page tables by powers of two. Shapes: as in batch.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from divisi.kernels.gated_delta.layout import Leaves
from divisi.kernels.sampling.layout import Draw, Draws
from divisi.kernels.select import Kernels
from divisi.model.batch import DecodeRows, PrefillRows, StepBatch
from divisi.model.dispatcher import Dispatcher
from divisi.model.experts import ExpertBank
from divisi.model.runner import ModelRunner
from divisi.model.state import StateStore


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest steps."""

    sequences: int
    rows: int
    """Of a decoding sequence."""
    pages: int
    """Of a sequence."""
    tokens: int
    """Of a step."""
    padded: bool = False
    """Whether decode steps are laid out for buckets."""


def warm_up(runner: ModelRunner, dispatcher: Dispatcher, sizes: StepSizes, device: torch.device) -> None:
    """Run steps of all sizes over memory that nobody has anything in yet, and leave it as it was."""
    for rows in range(1, sizes.rows + 1):
        for count in _powers(sizes.sequences):
            logits_RV = runner.forward(decode_batch([rows] * count, 1, device, sizes.padded), dispatcher)
            _choose(runner.kernels, logits_RV[:count])
        for pages in _powers(sizes.pages):
            runner.forward(decode_batch([rows], pages, device, sizes.padded), dispatcher)
    if sizes.rows > 1:
        for count in _powers(sizes.sequences):
            batch, hidden_SD = decode_batch([1] * count, 1, device, sizes.padded), None
            for _ in range(2):
                hidden_SD = runner.draft(batch, dispatcher, hidden_SD).hidden_SD
    for tokens in _powers(min(sizes.tokens, sizes.pages * runner.store.page_size)):
        runner.forward(prefill_batch([tokens], runner.store.page_size, device), dispatcher)
    if sizes.sequences > 1 and sizes.tokens > 1:
        runner.forward(prefill_batch([1, 1], runner.store.page_size, device), dispatcher)
    _forget(runner.store)


@torch.inference_mode()
def warm_up_experts(bank: ExpertBank, layer: int, width: int, chosen: int, rows: int, dtype: torch.dtype) -> None:
    """The same for a shard, that gets up to so many rows at once."""
    for count in _powers(rows):
        x_TD = torch.zeros((count, width), dtype=dtype, device=bank.device)
        ids_TK = torch.arange(chosen, dtype=torch.int32, device=bank.device).expand(count, chosen).contiguous()
        bank.partial_sum(layer, x_TD, ids_TK, torch.ones((count, chosen), device=bank.device))


@dataclass(frozen=True, slots=True)
class Nowhere:
    """A dispatcher without experts: it adds nothing. Implements `Dispatcher`."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _Nothing:
        """See Dispatcher."""
        return _Nothing(torch.zeros_like(x_TD, dtype=torch.float32))


@dataclass(frozen=True, slots=True)
class _Nothing:
    y_TD: Tensor

    def combine(self) -> Tensor:
        return self.y_TD


def decode_batch(rows: Sequence[int], pages: int, device: torch.device, padded: bool = False) -> StepBatch:
    """As the engine lays it out: arrays of int32 begin at 16 bytes. Each sequence has a slot and rows of its own.

    `padded`: as for a bucket, though all rows are somebody's.
    """
    total, runs = sum(rows), len(rows)
    zeros = torch.zeros(total + runs, dtype=torch.int32, device=device)
    slots_T = _ints([slot for slot, count in enumerate(rows) for _ in range(count)], device) if padded else None
    decode = DecodeRows(
        _ints(accumulate(rows, initial=0), device), zeros[:runs], _ints(range(runs), device),
        torch.zeros((runs, pages), dtype=torch.int32, device=device), slots_T,
    )  # fmt: skip
    tokens = torch.zeros(total, dtype=torch.int64, device=device)
    return StepBatch(tokens, zeros[:total], zeros[:total], decode, None, total, torch.arange(total, device=device))


def prefill_batch(rows: Sequence[int], page_size: int, device: torch.device) -> StepBatch:
    """Runs that begin at 0, each of which leaves one state."""
    total, runs = sum(rows), len(rows)
    zeros = torch.zeros(max(total, runs), dtype=torch.int32, device=device)
    leaves = Leaves(_ints(range(runs + 1), device), _ints(rows, device), _ints(range(runs), device))
    pages = torch.zeros((runs, -(-max(rows) // page_size)), dtype=torch.int32, device=device)
    prefill = PrefillRows(_ints(accumulate(rows, initial=0), device), zeros[:runs], zeros[:runs] - 1, leaves, pages)
    tokens = torch.zeros(total, dtype=torch.int64, device=device)
    last = torch.arange(runs, device=device)
    return StepBatch(tokens, zeros[:total], zeros[:total], None, prefill, 0, last)


def _choose(kernels: Kernels, logits_RV: Tensor) -> None:
    rows = logits_RV.shape[0]
    for temperature in (0.0, 1.0):
        kernels.choose_tokens(logits_RV, Draws([Draw(0, temperature)] * rows), np.zeros(rows, dtype=np.int64))


def _forget(store: StateStore) -> None:
    pools = [tensor for pool in store.kv.values() for tensor in (pool.key_PJD, pool.value_PJD)]
    for tensor in (store.hidden_SND, *pools, *(t for state in store.delta.values() for t in state.tensors)):
        tensor.zero_()


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4 and so on, and the most."""
    yield from (1 << bit for bit in range((most - 1).bit_length()))
    yield most


def _ints(values: Iterator[int] | Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)
