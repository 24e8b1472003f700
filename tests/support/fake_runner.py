"""A stand-in for the model whose answer depends on every token of the history, as found in its memory.

It keeps memory by the rules of the real one: two layers, each with KV pages, state slots that stand at a position, and
a ring of what the last decodes brought. Wrong pages, positions, slots, or a step applied twice change the answer.

Its drafts are scripted: each is what the model will say with a given probability, and otherwise anything. What they go
on from is kept as the MTP layer keeps it, entries in pages and hidden states by position in the slot, and checked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request
from divisi.kernels.native.passes import AllDrafted
from divisi.kernels.sampling.layout import Draws
from divisi.model.batch import PrefillRows, StepBatch
from divisi.model.dispatcher import Dispatcher, Pending
from divisi.model.mtp import Drafted
from divisi.model.sampling.sampler import Sampler, SamplingBatch, SequenceSampling
from tests.support.sampling_oracle import ruled_logits

VOCAB = 61
_LAYERS = 2
DRAFT_LAYER = _LAYERS
_BANK = torch.from_numpy(np.random.default_rng(7).normal(size=(4093, VOCAB)).astype(np.float32) * 3)
_GARBAGE = 0x5EED


class PlainDispatcher:
    """A dispatcher that never fails."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        return _Done(x_TD)


class FailingDispatcher(PlainDispatcher):
    """Aborts the step at one layer."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        if layer == self._layer:
            raise StepAborted("injected", seat="expert:0")
        return _Done(x_TD)


class FailsAtLast(PlainDispatcher):
    """Aborts a step at one of its layers, counted over all of its passes."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        if not self._left:
            raise StepAborted("injected", seat="expert:0")
        self._left -= 1
        return _Done(x_TD)


class _Done:
    def __init__(self, y_TD: Tensor) -> None:
        self._y_TD = y_TD

    def combine(self) -> Tensor:
        return self._y_TD


class _Layer:
    def __init__(self, number: int, num_pages: int, page_size: int, num_slots: int, ring: int) -> None:
        self.number, self.page_size, self.ring = number, page_size, ring
        self.kv = np.full(num_pages * page_size, -1, dtype=np.int64)
        self.positions = [_GARBAGE] * num_slots
        self.states = [_GARBAGE] * num_slots
        self.rings: list[dict[int, tuple[int, int]]] = [{} for _ in range(num_slots)]

    def history(self, pages: Tensor, length: int) -> int:
        positions = np.arange(length)
        rows = pages.numpy()[positions // self.page_size] * self.page_size + positions % self.page_size
        return hash((self.number, *self.kv[rows].tolist()))

    def decode(self, slot: int, length: int, tokens: list[int]) -> list[int]:
        """Bring the slot up to `length` from the ring; return the state after each token; these go to the ring only."""
        ring = self.rings[slot]
        while self.positions[slot] < length:
            position, earlier = ring.get(self.positions[slot] % self.ring, (_GARBAGE, 0))
            if position != self.positions[slot]:
                self.states[slot], self.positions[slot] = _GARBAGE, length
                break
            self.states[slot] = _after(self.states[slot], earlier)
            self.positions[slot] += 1
        if self.positions[slot] != length:
            self.states[slot] = _GARBAGE
        state, states = self.states[slot], []
        for position, token in enumerate(tokens, length):
            ring[position % self.ring] = (position, token)
            state = _after(state, token)
            states.append(state)
        return states

    def prefill(self, source: int, length: int, tokens: list[int], leaves: dict[int, int]) -> list[int]:
        """Return the state after each token; leave those at the positions that are asked for."""
        state = self.number
        if length:
            state = self.states[source] if self.positions[source] == length else _GARBAGE
        states = []
        for position, token in enumerate(tokens, length + 1):
            state = _after(state, token)
            states.append(state)
            if (slot := leaves.get(position)) is not None:
                self.states[slot], self.positions[slot], self.rings[slot] = state, position, {}
        return states


class FakeRunner:
    """Runs `StepBatch`es; see the module."""

    def __init__(
        self, *, num_pages: int, page_size: int, num_slots: int, max_rows: int = 1, right: float = 0.5, seed: int = 0
    ) -> None:
        """Drafts are `right` with that probability."""
        self.layers = [_Layer(number, num_pages, page_size, num_slots, 2 * max_rows) for number in range(_LAYERS)]
        self.batches = 0
        self._right, self._random = right, random.Random(seed)
        self._entries = np.full(num_pages * page_size, -1, dtype=np.int64)
        self._hidden: list[dict[int, tuple[int, int]]] = [{} for _ in range(num_slots)]
        self._hidden_entries = max_rows + 1

    def forward(self, batch: StepBatch, dispatcher: Dispatcher) -> Tensor:
        self.batches += 1
        wanted = batch.logit_rows_R.tolist()
        found: list[list[int]] = [[] for _ in wanted]
        for layer in self.layers:
            states = self._layer(layer, batch)
            for index, row in enumerate(wanted):
                found[index] += states[row]
            empty = torch.zeros(batch.num_tokens, 1)
            dispatcher.dispatch(layer.number, empty, empty.int(), empty).combine()
        self._record(batch)
        return _BANK[[hash(tuple(values)) % len(_BANK) for values in found]]

    def draw(self, batch: StepBatch, dispatcher: Dispatcher, draws: Draws) -> None:
        """Tokens are drawn from logits."""

    def forward_in_turns(self, batches: Sequence[StepBatch], dispatcher: Dispatcher) -> Tensor:
        """One after another: the fake's experts give nothing."""
        return torch.cat([self.forward(batch, dispatcher) for batch in batches])

    def drafts_at_once(self, rows: int, dispatcher: Dispatcher) -> bool:
        """Passes are run one by one."""
        return False

    def draft_all(
        self, batch: StepBatch, counts: tuple[int, ...], dispatcher: Dispatcher, draws: Draws
    ) -> AllDrafted:
        raise AssertionError("passes are run one by one")

    def draft(self, batch: StepBatch, dispatcher: Dispatcher, hidden_SD: Tensor | None) -> Drafted:
        """One scripted draft of each row."""
        rows = batch.decode
        assert rows is not None
        self._entries[batch.kv_rows_T.numpy()] = batch.token_ids_T.numpy()
        size, logits, histories = self.layers[0].page_size, [], []
        for row, (position, slot) in enumerate(zip(batch.positions_T.tolist(), rows.slots_S.tolist(), strict=True)):
            at = np.arange(position + 1)
            kv_rows = rows.pages_SN[row].numpy()[at // size] * size + at % size
            tokens = [int(self.layers[0].kv[kv_rows[0]]), *self._entries[kv_rows[1:]].tolist()]
            before = hash(tuple(tokens[:-1])) if hidden_SD is None else int(hidden_SD[row, 0])
            if hidden_SD is None:
                kept = self._hidden[slot].get((position - 1) % self._hidden_entries)
                assert kept == (position - 1, before), "the hidden state is not that of the token before"
            assert before == hash(tuple(tokens[:-1])), "a draft goes on from another one"
            histories.append([hash(tuple(tokens))])
            right = self._random.random() < self._right
            logits.append(logits_after(tokens) if right else _BANK[self._random.randrange(len(_BANK))])
        empty = torch.zeros(batch.num_tokens, 1)
        dispatcher.dispatch(DRAFT_LAYER, empty, empty.int(), empty).combine()
        return Drafted(torch.stack(logits), torch.tensor(histories))

    def _record(self, batch: StepBatch) -> None:
        """What every step leaves for drafts to come: an entry of each row, hidden states in the slots."""
        self._entries[batch.kv_rows_T.numpy()] = batch.token_ids_T.numpy()
        positions, size = batch.positions_T.tolist(), self.layers[0].page_size

        def keep(slot: int, position: int, pages_N: Tensor) -> None:
            at = np.arange(position + 1)
            tokens = self.layers[0].kv[pages_N.numpy()[at // size] * size + at % size]
            self._hidden[slot][position % self._hidden_entries] = (position, hash(tuple(tokens.tolist())))

        if batch.decode is not None:
            starts = batch.decode.starts_S1.tolist()
            for run, slot in enumerate(batch.decode.slots_S.tolist()):
                for row in range(starts[run], starts[run + 1]):
                    keep(slot, positions[row], batch.decode.pages_SN[run])
        if (rows := batch.prefill) is not None:
            firsts = rows.leaves.starts_S1.tolist()
            leaves = list(zip(rows.leaves.positions_L.tolist(), rows.leaves.slots_L.tolist(), strict=True))
            for run in range(len(firsts) - 1):
                for position, slot in leaves[firsts[run] : firsts[run + 1]]:
                    self._hidden[slot].clear()
                    keep(slot, position - 1, rows.pages_SN[run])

    def prepare(self, flushes: object, slot_copies: object, page_copies: object) -> None:
        raise AssertionError("no plan asks for it")

    def _layer(self, layer: _Layer, batch: StepBatch) -> list[list[int]]:
        """Per row: the hash of its history in the KV, and the state after it."""
        tokens = batch.token_ids_T.tolist()
        positions = batch.positions_T.tolist()
        layer.kv[batch.kv_rows_T.numpy()] = batch.token_ids_T.numpy()
        results: list[list[int]] = []
        if batch.decode is not None:
            rows = batch.decode
            starts = rows.starts_S1.tolist()
            for run, (length, slot) in enumerate(zip(rows.lengths_S.tolist(), rows.slots_S.tolist(), strict=True)):
                own = range(starts[run], starts[run + 1])
                assert [positions[row] for row in own] == [length + ahead for ahead in range(len(own))]
                states = layer.decode(slot, length, [tokens[row] for row in own])
                for row, state in zip(own, states, strict=True):
                    results.append([layer.history(rows.pages_SN[run], positions[row] + 1), state])
        assert len(results) == batch.decode_rows
        for run, pages_N, states in _prefills(layer, batch.prefill, tokens[batch.decode_rows :]):
            assert len(results) == batch.decode_rows + run
            for state in states:
                results.append([layer.history(pages_N, positions[len(results)] + 1), state])
        assert len(results) == batch.num_tokens
        return results


def _prefills(layer: _Layer, rows: PrefillRows | None, tokens: list[int]) -> Iterator[tuple[int, Tensor, list[int]]]:
    """Of each prefilling sequence: its first row, its page table, the state after each of its tokens."""
    if rows is None:
        return
    starts, of_leaves = rows.starts_S1.tolist(), rows.leaves.starts_S1.tolist()
    positions, slots = rows.leaves.positions_L.tolist(), rows.leaves.slots_L.tolist()
    for index, (length, source) in enumerate(zip(rows.lengths_S.tolist(), rows.sources_S.tolist(), strict=True)):
        part = slice(of_leaves[index], of_leaves[index + 1])
        leaves = dict(zip(positions[part], slots[part], strict=True))
        start, end = starts[index], starts[index + 1]
        yield start, rows.pages_SN[index], layer.prefill(source, length, tokens[start:end], leaves)


def logits_after(tokens: Sequence[int]) -> Tensor:
    """The logits [V] that the fake model gives after these tokens, computed from nothing else."""
    found = []
    for number in range(_LAYERS):
        state = number
        for token in tokens:
            state = _after(state, token)
        found += [hash((number, *tokens)), state]
    return _BANK[hash(tuple(found)) % len(_BANK)]


def solo_answer(request: Request, max_model_len: int) -> list[int]:
    """The tokens that a request without a grammar gets when it is alone; its rules are applied by the oracle."""
    tokens = list(request.prompt)
    sampling = request.sampling
    row = SamplingBatch(
        [SequenceSampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, min_p=sampling.min_p)]
    )
    while len(tokens) < min(len(request.prompt) + request.max_tokens, max_model_len):
        logits = ruled_logits(logits_after(tokens).numpy(), request, tokens)
        sampled = Sampler().sample(torch.from_numpy(logits)[None], row, np.array([len(tokens)]))
        token = int(sampled.token_ids_R[0])
        if token in request.stop_ids:
            break
        tokens.append(token)
    return tokens[len(request.prompt) :]


def _after(state: int, token: int) -> int:
    return hash((state, token))
