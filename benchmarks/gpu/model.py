"""The whole model on the device, kernels and references, against the references in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from divisi.kernels.gated_delta.layout import Leaves
from divisi.kernels.select import select_kernels
from divisi.model.batch import DecodeRows, PrefillRows, StepBatch
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import whole_share
from divisi.model.runner import ModelRunner
from divisi.model.state import StateStore
from divisi.model.weights import load_weights

_PAGE, _PAGES, _MAX_ROWS = 8, 200, 4
_PROMPTS = (70, 1, 131)
_STEPS = ((1, 1, 1), (3, 1, 4), (1, 0, 2), (2, 2, 1))
"""Rows that each sequence decodes; all but the last of them are accepted where there are more than one."""


@dataclass(frozen=True, slots=True)
class _Local:
    """A dispatcher to the experts of this process."""

    bank: ExpertBank

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _Done:
        return _Done(self.bank.partial_sum(layer, x_TD, expert_ids_TK, gates_TK))


@dataclass(frozen=True, slots=True)
class _Done:
    y_TD: Tensor

    def combine(self) -> Tensor:
        return self.y_TD


def log_probabilities(path: Path, kernels: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of every token after every row of a fixed series of steps: prompts in two chunks, then 1 to 4 rows a sequence."""
    config, checkpoint = ModelConfig.load(path), Checkpoint.open(path)
    chosen = select_kernels(device, kernels)
    store = StateStore(
        config, num_pages=_PAGES, page_size=_PAGE, num_slots=8, max_rows=_MAX_ROWS, dtype=dtype, device=device
    )
    bank = ExpertBank.load(checkpoint, config, whole_share(config), chosen, dtype, device)
    runner = ModelRunner(config, load_weights(checkpoint, config, chosen, dtype, device), store, chosen)
    told = [runner.forward(batch, _Local(bank)).clone() for batch in _steps(config.vocab_size, device)]
    return torch.log_softmax(torch.cat(told).float().cpu(), -1)


def _steps(vocab: int, device: torch.device) -> Iterator[StepBatch]:
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 0, 0]
    cuts = [p * 2 // 3 for p in _PROMPTS]
    yield _prefill(lengths, cuts, [-1, -1, -1], [0, 1, 2], vocab, generator, device)
    rest = [p - cut for p, cut in zip(_PROMPTS, cuts, strict=True)]
    sources = [slot if cut else -1 for slot, cut in zip((0, 1, 2), cuts, strict=True)]
    yield _prefill(cuts, rest, sources, [3, 4, 5], vocab, generator, device)
    lengths = list(_PROMPTS)
    for rows in _STEPS:
        yield _decode(lengths, rows, [3, 4, 5], vocab, generator, device)
        lengths = [length + max(n - 1, min(n, 1)) for length, n in zip(lengths, rows, strict=True)]


def _prefill(
    lengths: list[int], rows: list[int], sources: list[int], targets: list[int], vocab: int,
    generator: torch.Generator, device: torch.device,
) -> StepBatch:  # fmt: skip
    runs = [i for i, n in enumerate(rows) if n]
    ends = [lengths[i] + rows[i] for i in runs]
    prefill = PrefillRows(
        starts_S1=_ints(accumulate((rows[i] for i in runs), initial=0), device),
        lengths_S=_ints((lengths[i] for i in runs), device),
        sources_S=_ints((sources[i] for i in runs), device),
        leaves=Leaves(
            _ints(range(len(runs) + 1), device), _ints(ends, device), _ints((targets[i] for i in runs), device)
        ),
        pages_SN=_pages(device)[runs],
    )
    return _batch(lengths, rows, None, prefill, vocab, generator, device)


def _decode(
    lengths: list[int], rows: tuple[int, ...], slots: list[int], vocab: int, generator: torch.Generator,
    device: torch.device,
) -> StepBatch:  # fmt: skip
    starts = _ints(accumulate(rows, initial=0), device)
    decode = DecodeRows(starts, _ints(lengths, device), _ints(slots, device), _pages(device))
    return _batch(lengths, rows, decode, None, vocab, generator, device)


def _batch(
    lengths: list[int], rows: list[int] | tuple[int, ...], decode: DecodeRows | None, prefill: PrefillRows | None,
    vocab: int, generator: torch.Generator, device: torch.device,
) -> StepBatch:  # fmt: skip
    places = [(run, lengths[run] + i) for run, n in enumerate(rows) for i in range(n)]
    table = _pages(torch.device("cpu"))
    total = len(places)
    return StepBatch(
        token_ids_T=torch.randint(vocab, (total,), generator=generator).to(device),
        positions_T=_ints((at for _, at in places), device),
        kv_rows_T=_ints((int(table[run, at // _PAGE]) * _PAGE + at % _PAGE for run, at in places), device),
        decode=decode,
        prefill=prefill,
        decode_rows=total if decode is not None else 0,
        logit_rows_R=torch.arange(total, device=device),
    )


def _pages(device: torch.device) -> Tensor:
    """Every sequence's pages, far more than it needs, in a mixed order."""
    order = torch.randperm(_PAGES, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    return order[: 3 * 40].view(3, 40).to(device)


def _ints(values: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)
