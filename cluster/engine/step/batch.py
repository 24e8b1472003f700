"""Turns a step's plan into the tensors of a forward pass.

Shapes: T rows, S sequences, N pages, R rows of logits, M page tables, L states that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.cluster.engine.memory.sequence_memory import PageGrowth
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.engine.step.buckets import bucket
from divisi.cluster.engine.step.drafts import Drafts
from divisi.cluster.engine.step.plan import Run, StepPlan
from divisi.kernels.gated_delta.layout import Leaves
from divisi.model.batch import DecodeRows, PrefillRows, StepBatch

_ALIGNED = 4
"""Integers; 16 bytes, at which GPU kernels like their arrays to begin."""


_MOST_KEPT = 4096
"""Shapes of batches."""
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class BatchBuilder:
    """Builds batches in preallocated buffers: a batch is valid until the next one is built.

    The page tables live on the device, one per admitted sequence, and only their new entries are written. What decoding
    rows need lies at the same addresses for as many rows and sequences, and on a GPU their page tables are as wide as
    the next power of two: two steps then differ in numbers only.
    """

    def __init__(self, config: SchedulerConfig, device: torch.device, *, padded: bool = False) -> None:
        """``padded``: steps of decoding rows alone are filled up to a bucket; see DecodeRows."""
        self._page_size = config.page_size
        self._device, self._padded = device, padded
        self._most_sequences, self._most_rows = min(config.max_seqs, config.max_step_tokens), config.max_step_tokens
        size = config.max_step_tokens
        self._token_ids_T = _Mirrored(size, torch.int64, device)
        self._token_ids = self._token_ids_T.host.numpy()
        # Of a full pass eleven integers a row at most, four of its own, five of a run, two of a state that is left; of
        # all draft passes two a run and three for each of its drafts; and rounding.
        rounding = 64 * (1 + config.max_draft_tokens)
        self._ints = _IntBuffer(max(12, 4 + 3 * config.max_draft_tokens) * size + rounding, device)
        self._starts_S1 = torch.arange(config.max_seqs + 1, dtype=torch.int32, device=device)
        self._offsets_T = np.arange(size, dtype=np.int32)
        self._logit_rows_T = torch.arange(size, dtype=torch.int64, device=device)
        self.draft_passes: list[StepBatch] = []
        """Of the step under way, once the first of them was built."""
        self._decoding: dict[tuple[int, int, int], StepBatch] = {}
        self._drafts: dict[tuple[tuple[int, ...], int], list[StepBatch]] = {}
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
        positions, kv_rows = ints.reserve(num_rows), ints.reserve(num_rows)
        self._fill_rings(plan.rings, ints[positions], ints[kv_rows])
        for run in plan.scans:
            self._fill_scan(run, ints[positions], ints[kv_rows])
        decode = self._decode_slices(plan.rings, sequences) if plan.rings else []
        if padded:
            decode.append(self._pad(plan.rings, ints[positions], ints[kv_rows]))
        prefill = self._prefill_slices(plan.scans) if plan.scans else []
        drafted, drafts_by_pass = ints.put(_drafted_rows(plan)), drafts.by_pass
        if drafts.told is not None:
            self._token_ids[ints[drafted]] = [token for tokens in drafts.told for token in tokens]
        on_device, token_ids_T = ints.on_device(), self._token_ids_T.on_device(num_rows)
        if drafts_by_pass:
            token_ids_T.index_copy_(0, on_device[drafted].long(), torch.cat(drafts_by_pass).clamp_(min=0))
        width = self._take_tables("decode", plan.rings, decode.pop(0), on_device) if plan.rings else 0
        shape = num_rows, sequences, width
        if not plan.scans and (known := self._decoding.get(shape)) is not None:
            return known
        batch = StepBatch(
            token_ids_T=token_ids_T,
            positions_T=on_device[positions],
            kv_rows_T=on_device[kv_rows],
            decode=self._decode_rows(width, [on_device[part] for part in decode]) if plan.rings else None,
            prefill=self._prefill_rows(plan.scans, [on_device[part] for part in prefill]) if plan.scans else None,
            decode_rows=plan.scans[0].row if plan.scans else num_rows,
            logit_rows_R=self._logit_rows(plan) if plan.scans else self._logit_rows_T[:num_rows],
        )
        if not plan.scans:
            _keep(self._decoding, shape, batch)
        return batch

    def build_draft(self, plan: StepPlan, index: int, drafts: Drafts) -> StepBatch:
        """Lay out a draft pass: a row for each run that drafts so far, of its last token or its last draft.

        The first pass of a step comes first: what stays is laid out by it, and those that draft on are its first rows.
        """
        count = plan.counts[index]
        if index == 0:
            self.draft_passes = self._lay_out_drafting(plan)
            self._token_ids[:count] = [run.sequence.tokens[run.start] for run in plan.drafting[:count]]
            self._token_ids_T.on_device(count)
        else:
            torch.clamp(drafts.by_pass[-1][:count], min=0, out=self._token_ids_T.device[:count])
        return self.draft_passes[index]

    def _lay_out_drafting(self, plan: StepPlan) -> list[StepBatch]:
        """Slots and page tables of a step's draft passes, and positions and KV rows of each; its passes."""
        runs, ints, page_size = plan.drafting, self._ints, self._page_size
        sizes = tuple([bucket(n, self._most_sequences) if self._padded else n for n in plan.counts[:-1]])
        ints.clear()
        arrays = [
            _filled([run.source for run in runs], sizes[0], -1),
            _filled([run.sequence.holding.table for run in runs], sizes[0], 0),
        ]
        for index, (count, size) in enumerate(zip(plan.counts, sizes, strict=False)):
            arrays.append(_filled([*range(count)], size + 1, count) if self._padded else [])
            arrays.append(_filled([run.start + index for run in runs[:count]], size, 0))
            arrays.append(_filled([_kv_row(run, run.start + index, page_size) for run in runs[:count]], size, -1))
        slots, tables, *of_passes = ints.put_all(arrays)
        on_device = ints.on_device()
        width = self._take_tables("draft", runs, tables, on_device)
        if (known := self._drafts.get((sizes, width))) is not None:
            return known
        pages_SN = self._tables["draft"][: sizes[0] * width].view(sizes[0], width)
        passes = [
            self._draft_pass(on_device[starts], on_device[positions], on_device[kv_rows], on_device[slots], pages_SN)
            for starts, positions, kv_rows in zip(of_passes[::3], of_passes[1::3], of_passes[2::3], strict=True)
        ]
        _keep(self._drafts, (sizes, width), passes)
        return passes

    def _draft_pass(
        self, starts_S1: Tensor, positions_T: Tensor, kv_rows_T: Tensor, slots_S: Tensor, pages_SN: Tensor
    ) -> StepBatch:
        count = len(positions_T)
        slots_S, starts_S1 = slots_S[:count], starts_S1 if self._padded else self._starts_S1[: count + 1]
        return StepBatch(
            token_ids_T=self._token_ids_T.device[:count],
            positions_T=positions_T,
            kv_rows_T=kv_rows_T,
            decode=DecodeRows(starts_S1, positions_T, slots_S, pages_SN[:count], slots_S if self._padded else None),
            prefill=None,
            decode_rows=count,
            logit_rows_R=self._logit_rows_T[:count],
        )

    def _fill_rings(self, runs: Sequence[Run], positions: NDArray[np.int32], kv_rows: NDArray[np.int32]) -> None:
        """All but the drafts, which are on the device."""
        size, count = self._page_size, _end(runs)
        rows = [(run, position) for run in runs for position in range(run.start, run.end)]
        self._token_ids[:count] = 0
        self._token_ids[[run.row for run in runs]] = [run.sequence.tokens[run.start] for run in runs]
        positions[:count] = [position for _, position in rows]
        kv_rows[:count] = [_kv_row(run, position, size) for run, position in rows]

    def _pad(self, runs: Sequence[Run], positions: NDArray[np.int32], kv_rows: NDArray[np.int32]) -> slice:
        """Rows that are nobody's, after those of the runs; returns where the slots of all rows are."""
        count, num_rows = _end(runs), len(positions)
        self._token_ids[count:num_rows] = 0
        positions[count:] = 0
        kv_rows[count:] = -1
        return self._ints.put(_filled([run.source for run in runs for _ in range(run.num_rows)], num_rows, -1))

    def _fill_scan(self, run: Run, positions_T: NDArray[np.int32], kv_rows: NDArray[np.int32]) -> None:
        page_size, rows = self._page_size, slice(run.row, run.row + run.num_rows)
        positions = self._offsets_T[: run.num_rows] + np.int32(run.start)
        first_page = run.start // page_size
        pages = np.array(run.sequence.holding.pages[first_page : -(-run.end // page_size)], dtype=np.int32)
        self._token_ids[rows] = run.sequence.tokens[run.start : run.end]
        positions_T[rows] = positions
        kv_rows[rows] = pages[positions // page_size - first_page] * page_size + positions % page_size

    def _decode_slices(self, runs: Sequence[Run], sequences: int) -> list[slice]:
        """Page tables first, then as in DecodeRows."""
        arrays = [
            _filled([run.sequence.holding.table for run in runs], sequences, 0),
            _filled([run.row for run in runs], sequences + 1, _end(runs)),
            _filled([run.start for run in runs], sequences, 0),
            _filled([run.source for run in runs], sequences, -1),
        ]
        return self._ints.put_all(arrays)

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
        """Have the page tables of some runs lie side by side; returns their width: on a GPU a power of two."""
        width, most = -(-max([run.end for run in runs]) // self._page_size), self._page_tables_MN.shape[1]
        if not self._on_host:
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


class _Mirrored:
    """Integers on the host, and their copy on the device."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        # Pageable on purpose: a copy from pinned memory could still be reading when the next step is laid out. What is
        # copied from here is in the driver's own memory when the call returns, which waits for no work of the device.
        self.host = torch.zeros(size, dtype=dtype)
        self.device = self.host if device.type == "cpu" else torch.zeros_like(self.host, device=device)

    def on_device(self, count: int) -> Tensor:
        """The first so many, at the same address each time."""
        if self.device is self.host:
            return self.host[:count]
        return self.device[:count].copy_(self.host[:count], non_blocking=True)


class _IntBuffer:
    """Arrays of int32 side by side, so that they reach the device in one copy."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._mirrored = _Mirrored(size, torch.int32, device)
        self._values = self._mirrored.host.numpy()
        self._used = 0

    def clear(self) -> None:
        self._used = 0

    def reserve(self, count: int) -> slice:
        start = self._used
        self._used = start + -(-count // _ALIGNED) * _ALIGNED
        return slice(start, start + count)

    def put(self, values: list[int], *more: int) -> slice:
        values = [*values, *more]
        part = self.reserve(len(values))
        self._values[part] = values
        return part

    def put_all(self, arrays: Sequence[list[int]]) -> list[slice]:
        """Several at once, which takes little longer than one."""
        first, parts, values = self._used, [], []
        for array in arrays:
            parts.append(self.reserve(len(array)))
            values += array
            values += [0] * (self._used - first - len(values))
        self._values[first : self._used] = values
        return parts

    def __getitem__(self, part: slice) -> NDArray[np.int32]:
        return self._values[part]

    def on_device(self) -> Tensor:
        return self._mirrored.on_device(self._used)


def _drafted_rows(plan: StepPlan) -> list[int]:
    """The rows of drafts, pass by pass."""
    return [run.row + 1 + index for index, count in enumerate(plan.counts[:-1]) for run in plan.drafting[:count]]


def _filled(values: list[int], count: int, filler: int) -> list[int]:
    return values + [filler] * (count - len(values))


def _keep(known: dict[KeyT, ValueT], key: KeyT, value: ValueT) -> None:
    """Remember a value, and forget all others once there are too many."""
    if len(known) >= _MOST_KEPT:
        known.clear()
    known[key] = value


def _kv_row(run: Run, position: int, page_size: int) -> int:
    return run.sequence.holding.pages[position // page_size] * page_size + position % page_size


def _end(runs: Sequence[Run]) -> int:
    """One past the last row."""
    return runs[-1].row + runs[-1].num_rows if runs else 0
