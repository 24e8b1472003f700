"""Turns a step's plan into the tensors of a forward pass.

Shapes: T rows, S sequences, N pages, R rows of logits, M page tables, L states that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.cluster.engine.memory.sequence_memory import PageGrowth
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.engine.step.buckets import bucket
from divisi.cluster.engine.step.drafts import Drafts
from divisi.cluster.engine.step.int_buffer import IntBuffer, Mirrored, filled, keep
from divisi.cluster.engine.step.plan import Run, StepPlan
from divisi.kernels.gated_delta.layout import Leaves
from divisi.model.batch import DecodeRows, PrefillRows, StepBatch


class BatchBuilder:
    """Builds batches in preallocated buffers: a batch is valid until the next one is built.

    The page tables live on the device, one per admitted sequence, and only their new entries are written. What decoding
    rows need lies at the same addresses for as many rows and sequences, and their page tables are as wide as the next
    power of two: two steps then mostly differ in numbers only, and share their batches.
    """

    def __init__(self, config: SchedulerConfig, device: torch.device, *, padded: bool = False) -> None:
        """``padded``: steps of decoding rows alone are filled up to a bucket; see DecodeRows."""
        self._page_size = config.page_size
        self._device, self._padded = device, padded
        self._most_sequences, self._most_rows = min(config.max_seqs, config.max_step_tokens), config.max_step_tokens
        size = config.max_step_tokens
        self._token_ids_T = Mirrored(size, torch.int64, device)
        self._token_ids = self._token_ids_T.host.numpy()
        # Of a full pass eleven integers a row at most, four of its own, five of a run, two of a state that is left; of
        # all draft passes two a run and three for each of its drafts; and rounding.
        rounding = 64 * (1 + config.max_draft_tokens)
        self._ints = IntBuffer(max(12, 4 + 3 * config.max_draft_tokens) * size + rounding, device)
        self._starts_S1 = torch.arange(config.max_seqs + 1, dtype=torch.int32, device=device)
        self._offsets_T = np.arange(size, dtype=np.int32)
        self._logit_rows_T = torch.arange(size, dtype=torch.int64, device=device)
        self._draft_passes: list[StepBatch] = []
        """Of the step under way, once the first of them was built."""
        self._decoding: dict[tuple[int, int, int], StepBatch] = {}
        self._drafts: dict[tuple[tuple[int, ...], int], list[StepBatch]] = {}
        self._first_drafts: dict[tuple[int, int], StepBatch] = {}
        """Batches of decoding rows and of draft passes, by their shapes: the same memory with other numbers in it."""
        shape = (config.max_seqs, config.max_pages_per_sequence)
        self._page_tables_MN = torch.zeros(shape, dtype=torch.int32, device=device)
        self._tables = {kind: torch.empty(0, dtype=torch.int32, device=device) for kind in ("decode", "draft")}
        """Of the passes under way."""
        self._on_host = device.type == "cpu"
        """Where numpy moves page tables: few numbers take it a fraction of the time."""
        self._page_tables = self._page_tables_MN.numpy() if self._on_host else np.empty((0, 0), dtype=np.int32)
        self._host_tables: dict[str, NDArray[np.int32]] = {}
        self._grown = 0
        """How often page tables have changed."""
        self._rows: tuple[StepPlan | None, list[int], list[int]] = None, [], []
        """Of ring runs: positions and KV rows, and in which plan."""
        self._taken: dict[str, tuple[list[int], int, int]] = {}
        """Which tables lie side by side on the host, how wide, and what had changed by then."""

    def grow(self, growths: tuple[PageGrowth, ...]) -> None:
        """Write the pages that sequences got since the last call."""
        if not growths:
            return
        self._grown += 1
        if self._on_host:
            for table, start, pages in growths:
                self._page_tables[table, start : start + len(pages)] = pages
            return
        width = self._page_tables_MN.shape[1]
        entries: list[int] = []
        for table, start, pages in growths:
            entries += range(table * width + start, table * width + start + len(pages))
        values = [page for growth in growths for page in growth.pages]
        changed = torch.tensor([entries, values]).to(self._device)
        self._page_tables_MN.view(-1).index_copy_(0, changed[0], changed[1].int())

    def build(self, plan: StepPlan, drafts: Drafts) -> StepBatch:
        """Lay out tokens, positions and memory of the rows of a plan's full pass."""
        ints, padded = self._ints, self._padded and not plan.scans
        num_rows, sequences = plan.num_rows, len(plan.rings)
        if padded:
            num_rows, sequences = bucket(num_rows, self._most_rows), bucket(sequences, self._most_sequences)
        ints.clear()
        positions, kv_rows, *decode = self._lay_out_rings(plan, num_rows, sequences)
        for run in plan.scans:
            self._fill_scan(run, ints[positions], ints[kv_rows])
        prefill = self._prefill_slices(plan.scans) if plan.scans else []
        self._fill_ring_tokens(plan, drafts, num_rows)
        drafts_by_pass = drafts.by_pass
        drafted = ints.put(_drafted_rows(plan)) if drafts_by_pass else slice(0)
        on_device, token_ids_T = ints.sent(), self._token_ids_T.sent(num_rows)
        if drafts_by_pass:
            token_ids_T.index_copy_(0, on_device[drafted].long(), torch.cat(drafts_by_pass).clamp_(min=0))
        width = self._take_tables("decode", plan.rings, decode.pop(0), on_device) if plan.rings else 0
        shape = num_rows, sequences, width
        if not plan.scans and (known := self._decoding.get(shape)) is not None:
            return known
        batch = StepBatch(
            token_ids_T=token_ids_T[:num_rows],
            positions_T=on_device[positions],
            kv_rows_T=on_device[kv_rows],
            decode=self._decode_rows(width, [on_device[part] for part in decode]) if plan.rings else None,
            prefill=self._prefill_rows(plan.scans, [on_device[part] for part in prefill]) if plan.scans else None,
            decode_rows=plan.scans[0].row if plan.scans else num_rows,
            logit_rows_R=self._logit_rows(plan) if plan.scans else self._logit_rows_T[:num_rows],
        )
        if not plan.scans:
            keep(self._decoding, shape, batch)
        return batch

    def build_draft(self, plan: StepPlan, index: int, drafts: Drafts) -> StepBatch:
        """Lay out a draft pass: a row for each run that drafts so far, of its last token or its last draft.

        The first pass of a step comes first: what stays is laid out by it, and those that draft on are its first rows.
        """
        count = plan.counts[index]
        if index == 0:
            self._draft_passes = self._lay_out_drafting(plan)
            self._token_ids[:count] = [run.sequence.tokens[run.start] for run in plan.drafting[:count]]
            self._token_ids_T.sent(count)
        else:
            torch.clamp(drafts.by_pass[-1][:count], min=0, out=self._token_ids_T.device[:count])
        return self._draft_passes[index]

    def build_first_draft(self, plan: StepPlan) -> StepBatch:
        """Lay out the first draft pass alone, with all pages that the others reach: these follow from it."""
        runs, ints = plan.drafting, self._ints
        positions, kv_rows = self._ring_rows(plan)
        count = len(runs)
        self._token_ids[:count] = [run.sequence.tokens[run.start] for run in runs]
        arrays = [
            [run.sequence.holding.table for run in runs],
            [positions[run.row] for run in runs],
            [kv_rows[run.row] for run in runs],
            [run.source for run in runs],
        ]
        ints.clear()
        tables, *parts = ints.put_all(arrays)
        on_device = ints.sent()
        width = self._take_tables("draft", runs, tables, on_device)
        if (known := self._first_drafts.get((count, width))) is None:
            pages_SN = self._tables["draft"][: count * width].view(count, width)
            positions_T, kv_rows_T, slots_S = (on_device[part] for part in parts)
            known = self._draft_pass(self._starts_S1[: count + 1], positions_T, kv_rows_T, slots_S, pages_SN)
            keep(self._first_drafts, (count, width), known)
        return known

    def _lay_out_drafting(self, plan: StepPlan) -> list[StepBatch]:
        """Slots and page tables of a step's draft passes, and positions and KV rows of each; its passes."""
        runs, counts, ints = plan.drafting, plan.counts[:-1], self._ints
        sizes = tuple([bucket(count, self._most_sequences) for count in counts]) if self._padded else counts
        positions, kv_rows = self._ring_rows(plan)
        rows = [run.row for run in runs]
        arrays = [
            filled([run.source for run in runs], sizes[0], -1),
            filled([run.sequence.holding.table for run in runs], sizes[0], 0),
        ]
        for ahead, (count, size) in enumerate(zip(counts, sizes, strict=True)):  # the full pass has the same positions
            arrays.append(filled([positions[row + ahead] for row in rows[:count]], size, 0))
            arrays.append(filled([kv_rows[row + ahead] for row in rows[:count]], size, -1))
        if self._padded:
            arrays += [filled([*range(count)], size + 1, count) for count, size in zip(counts, sizes, strict=True)]
        ints.clear()
        slots, tables, *of_passes = ints.put_all(arrays)
        on_device = ints.sent()
        width = self._take_tables("draft", runs, tables, on_device)
        if (known := self._drafts.get((sizes, width))) is not None:
            return known
        parts, pages_SN = [on_device[part] for part in of_passes], self._tables["draft"][: sizes[0] * width]
        starts = parts[2 * len(sizes) :] or [self._starts_S1[: size + 1] for size in sizes]
        rows_of_passes = zip(starts, parts[::2], parts[1::2], strict=False)
        passes = [self._draft_pass(*own, on_device[slots], pages_SN.view(sizes[0], width)) for own in rows_of_passes]
        keep(self._drafts, (sizes, width), passes)
        return passes

    def _draft_pass(
        self, starts_S1: Tensor, positions_T: Tensor, kv_rows_T: Tensor, slots_S: Tensor, pages_SN: Tensor
    ) -> StepBatch:
        count = len(positions_T)
        slots_S = slots_S[:count]
        return StepBatch(
            token_ids_T=self._token_ids_T.device[:count],
            positions_T=positions_T,
            kv_rows_T=kv_rows_T,
            decode=DecodeRows(starts_S1, positions_T, slots_S, pages_SN[:count], slots_S if self._padded else None),
            prefill=None,
            decode_rows=count,
            logit_rows_R=self._logit_rows_T[:count],
        )

    def _ring_rows(self, plan: StepPlan) -> tuple[list[int], list[int]]:
        """Positions and KV rows of the rows of ring runs; the passes of a plan share them."""
        if self._rows[0] is not plan:
            positions: list[int] = []
            kv_rows: list[int] = []
            for run in plan.rings:
                positions += range(run.start, run.end)
                kv_rows += _kv_rows(run, self._page_size)
            self._rows = plan, positions, kv_rows
        return self._rows[1:]

    def _lay_out_rings(self, plan: StepPlan, num_rows: int, sequences: int) -> list[slice]:
        """Positions and KV rows of the step's rows, those of prefills left open; of its ring runs the page tables, then
        as in DecodeRows. Rows and sequences that are nobody's come last.
        """
        runs, ints = plan.rings, self._ints
        positions, kv_rows = self._ring_rows(plan)
        if not runs:
            return [ints.reserve(num_rows), ints.reserve(num_rows)]
        arrays = [
            filled([run.sequence.holding.table for run in runs], sequences, 0),
            filled([run.row for run in runs], sequences + 1, len(positions)),
            filled([run.start for run in runs], sequences, 0),
            filled([run.source for run in runs], sequences, -1),
        ]
        if plan.scans:
            of_rows = [ints.reserve(num_rows), ints.reserve(num_rows)]
            for part, values in zip(of_rows, (positions, kv_rows), strict=True):
                ints[part][: len(values)] = values
            return of_rows + ints.put_all(arrays)
        if self._padded:
            arrays.append(filled([run.source for run in runs for _ in range(run.num_rows)], num_rows, -1))
        return ints.put_all([filled(positions, num_rows, 0), filled(kv_rows, num_rows, -1), *arrays])

    def _fill_ring_tokens(self, plan: StepPlan, drafts: Drafts, num_rows: int) -> None:
        """Those of ring runs, drafts where they are known here, and of rows that are nobody's."""
        tokens: list[int] = []
        for run in plan.rings:
            tokens.append(run.sequence.tokens[run.start])
            tokens += drafts.here(run)
        tokens = tokens if plan.scans else filled(tokens, num_rows, 0)
        self._token_ids[: len(tokens)] = tokens

    def _fill_scan(self, run: Run, positions_T: NDArray[np.int32], kv_rows: NDArray[np.int32]) -> None:
        page_size, rows = self._page_size, slice(run.row, run.row + run.num_rows)
        positions = self._offsets_T[: run.num_rows] + np.int32(run.start)
        first_page = run.start // page_size
        pages = np.array(run.sequence.holding.pages[first_page : -(-run.end // page_size)], dtype=np.int32)
        self._token_ids[rows] = run.sequence.tokens[run.start : run.end]
        positions_T[rows] = positions
        kv_rows[rows] = pages[positions // page_size - first_page] * page_size + positions % page_size

    def _decode_rows(self, width: int, parts: Sequence[Tensor]) -> DecodeRows:
        starts_S1, lengths_S, slots_S, *slots_T = parts
        sequences = len(slots_S)
        pages_SN = self._tables["decode"][: sequences * width].view(sequences, width)
        return DecodeRows(starts_S1, lengths_S, slots_S, pages_SN, *slots_T)

    def _prefill_slices(self, runs: Sequence[Run]) -> list[slice]:
        put = self._ints.put
        first = runs[0].row if runs else 0
        ends = np.cumsum([len(run.leaves) for run in runs]).tolist()
        return [
            put([run.row - first for run in runs], _end(runs) - first),
            put([run.start for run in runs]),
            put([run.source for run in runs]),
            put([run.sequence.holding.table for run in runs]),
            put([0, *ends]),
            put([leave.position for run in runs for leave in run.leaves]),
            put([leave.slot for run in runs for leave in run.leaves]),
        ]

    def _prefill_rows(self, runs: Sequence[Run], parts: Sequence[Tensor]) -> PrefillRows:
        starts_S1, lengths_S, sources_S, tables_S, *leaves = parts
        return PrefillRows(starts_S1, lengths_S, sources_S, Leaves(*leaves), self._pages(runs, tables_S))

    def _pages(self, runs: Sequence[Run], tables_S: Tensor) -> Tensor:
        """The page tables [S, N] as far as the runs need them."""
        num_pages = -(-max([run.end for run in runs]) // self._page_size)
        return self._page_tables_MN[:, :num_pages].index_select(0, tables_S)

    def _take_tables(self, kind: str, runs: Sequence[Run], tables: slice, on_device: Tensor) -> int:
        """Have the page tables of some runs lie side by side; returns their width, a power of two."""
        width, most = -(-max([run.end for run in runs]) // self._page_size), self._page_tables_MN.shape[1]
        width = min(1 << (width - 1).bit_length(), most)
        if not self._tables[kind].numel():
            self._tables[kind] = torch.empty_like(self._page_tables_MN).flatten()
            if self._on_host:
                self._host_tables[kind] = self._tables[kind].numpy()
        count = tables.stop - tables.start
        if self._on_host:
            wanted = [run.sequence.holding.table for run in runs], width, self._grown
            if self._taken.get(kind) != wanted:
                self._taken[kind] = wanted
                taken = self._host_tables[kind][: count * width].reshape(count, width)
                taken[:] = self._page_tables[self._ints[tables], :width]
        else:
            pages_SN = self._tables[kind][: count * width].view(count, width)
            torch.index_select(self._page_tables_MN[:, :width], 0, on_device[tables], out=pages_SN)
        return width

    def _logit_rows(self, plan: StepPlan) -> Tensor:
        rows = [self._offsets_T[: plan.scans[0].row]]
        rows += [np.array(run.logit_positions, dtype=np.int32) + (run.row - run.start) for run in plan.scans]
        return torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(self._device)


def _drafted_rows(plan: StepPlan) -> list[int]:
    """The rows of drafts, pass by pass."""
    return [run.row + 1 + index for index, count in enumerate(plan.counts[:-1]) for run in plan.drafting[:count]]


def _kv_rows(run: Run, page_size: int) -> Iterator[int]:
    """Where its rows' keys and values lie, page by page."""
    pages, at = run.sequence.holding.pages, run.start
    while at < run.end:
        page = at // page_size
        end, shift = min(run.end, (page + 1) * page_size), (pages[page] - page) * page_size
        yield from range(at + shift, end + shift)
        at = end


def _end(runs: Sequence[Run]) -> int:
    """One past the last row."""
    return runs[-1].row + runs[-1].num_rows if runs else 0
