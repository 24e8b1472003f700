"""Turns a step's plan into the tensors of a forward pass.

Shapes: T tokens, S decoding sequences, N pages, R rows of logits, M rows of the page table.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from divisi.cluster.engine.plan import Chunk, PageGrowth, StepPlan
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.kernels.gated_delta.layout import Leaves
from divisi.model.batch import DecodeRows, PrefillRows, StepBatch


class BatchBuilder:
    """Builds batches in preallocated buffers: a batch is valid until the next one is built.

    The page table lives on the device, one row per admitted sequence, and only its new entries are written.
    """

    def __init__(self, config: SchedulerConfig, device: torch.device) -> None:
        self._page_size = config.page_size
        self._device = device
        size = config.max_step_tokens
        # Pageable on purpose: a copy from pinned memory could still be reading when the next step is laid out.
        self._token_ids_T = torch.zeros(size, dtype=torch.int64)
        self._ints_4T = torch.zeros((4, size), dtype=torch.int32)
        self._token_ids = self._token_ids_T.numpy()
        self._positions, self._kv_rows, self._slots, self._rows = self._ints_4T.numpy()
        self._offsets_T = np.arange(size, dtype=np.int32)
        self._starts_T1 = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._logit_rows_T = torch.arange(size, dtype=torch.int64, device=device)
        shape = (config.max_seqs, config.max_pages_per_sequence)
        self._page_table_MN = torch.zeros(shape, dtype=torch.int32, device=device)

    def grow(self, growths: tuple[PageGrowth, ...]) -> None:
        """Write the pages that sequences got since the last call."""
        if not growths:
            return
        width = self._page_table_MN.shape[1]
        entries: list[int] = []
        for row, start, pages in growths:
            entries += range(row * width + start, row * width + start + len(pages))
        values = [page for growth in growths for page in growth.pages]
        changed = torch.tensor([entries, values]).to(self._device)
        self._page_table_MN.view(-1).index_copy_(0, changed[0], changed[1].int())

    def build(self, plan: StepPlan) -> StepBatch:
        """Lay out the decodes' tokens first, one row each, then the chunks'."""
        num_decodes = len(plan.decodes)
        if num_decodes:
            self._fill_decodes(plan)
        first = num_decodes
        for chunk in plan.chunks:
            first = self._fill_chunk(chunk, first)
        positions_T, kv_rows_T, slots_T, rows_T = self._ints_4T[:, : plan.num_tokens].to(self._device).unbind(0)
        return StepBatch(
            token_ids_T=self._token_ids_T[: plan.num_tokens].to(self._device),
            positions_T=positions_T,
            kv_rows_T=kv_rows_T,
            decode=self._decode_rows(plan, positions_T, slots_T, rows_T) if num_decodes else None,
            prefill=self._prefill_rows(plan) if plan.chunks else None,
            decode_rows=num_decodes,
            logit_rows_R=self._logit_rows(plan),
        )

    def _fill_decodes(self, plan: StepPlan) -> None:
        count, page_size = len(plan.decodes), self._page_size
        lengths = [sequence.length for sequence in plan.decodes]
        self._token_ids[:count] = [sequence.tokens[-1] for sequence in plan.decodes]
        self._positions[:count] = lengths
        self._kv_rows[:count] = [
            sequence.pages[length // page_size] * page_size + length % page_size
            for sequence, length in zip(plan.decodes, lengths, strict=True)
        ]
        self._slots[:count] = [sequence.slot for sequence in plan.decodes]
        self._rows[:count] = [sequence.row for sequence in plan.decodes]

    def _fill_chunk(self, chunk: Chunk, first: int) -> int:
        """Write a chunk's rows from row `first` on; return the row after them."""
        count, page_size = chunk.end - chunk.start, self._page_size
        rows = slice(first, first + count)
        positions = self._offsets_T[:count] + np.int32(chunk.start)
        first_page = chunk.start // page_size
        pages = np.array(chunk.sequence.pages[first_page : -(-chunk.end // page_size)], dtype=np.int32)
        self._token_ids[rows] = chunk.sequence.tokens[chunk.start : chunk.end]
        self._positions[rows] = positions
        self._kv_rows[rows] = pages[positions // page_size - first_page] * page_size + positions % page_size
        return first + count

    def _decode_rows(self, plan: StepPlan, positions_T: Tensor, slots_T: Tensor, rows_T: Tensor) -> DecodeRows:
        count = len(plan.decodes)
        num_pages = max([len(sequence.pages) for sequence in plan.decodes])
        return DecodeRows(
            starts_S1=self._starts_T1[: count + 1],
            lengths_S=positions_T[:count],
            slots_S=slots_T[:count],
            pages_SN=self._page_table_MN[:, :num_pages].index_select(0, rows_T[:count]),
        )

    def _prefill_rows(self, plan: StepPlan) -> PrefillRows:
        def ints(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=self._device)

        chunks = plan.chunks
        counts = [chunk.end - chunk.start for chunk in chunks]
        num_pages = -(-max(chunk.end for chunk in chunks) // self._page_size)
        table_rows = torch.tensor([chunk.sequence.row for chunk in chunks], device=self._device)
        return PrefillRows(
            starts_S1=ints(accumulate(counts, initial=0)),
            lengths_S=ints(chunk.start for chunk in chunks),
            sources_S=ints(chunk.sequence.slot if chunk.start else -1 for chunk in chunks),
            leaves=Leaves(
                self._starts_T1[: len(chunks) + 1],
                ints(chunk.end for chunk in chunks),
                ints(chunk.sequence.spare for chunk in chunks),
            ),
            pages_SN=self._page_table_MN[:, :num_pages].index_select(0, table_rows),
            most_rows=max(counts),
        )

    def _logit_rows(self, plan: StepPlan) -> Tensor:
        if not plan.chunks:
            return self._logit_rows_T[: len(plan.decodes)]
        rows = [self._offsets_T[: len(plan.decodes)]]
        start = len(plan.decodes)
        for chunk in plan.chunks:
            rows.append(np.array(chunk.logit_positions(), dtype=np.int32) + (start - chunk.start))
            start += chunk.end - chunk.start
        return torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(self._device)
