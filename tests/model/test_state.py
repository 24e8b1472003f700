"""Operations on the memory of sequences, over all layers: flush and copies, and done twice."""

from __future__ import annotations

import pytest
import torch

from divisi.kernels.select import select_kernels
from divisi.model.config import ModelConfig
from divisi.model.random_checkpoint import SMALL_CONFIG
from divisi.model.state import StateStore

CPU = torch.device("cpu")


@pytest.fixture
def store() -> StateStore:
    """Random numbers everywhere; slot s stands at position s + 1."""
    torch.manual_seed(1)
    store = StateStore(
        ModelConfig.from_hf(SMALL_CONFIG), num_pages=6, page_size=4, num_slots=6, max_rows=6, dtype=torch.bfloat16,
        device=CPU,
    )  # fmt: skip
    for pool in store.kv.values():
        pool.key_PJD.normal_(), pool.value_PJD.normal_()
    for state in store.delta.values():
        for tensor in state.tensors[:-1]:
            tensor.uniform_(0, 1)
        state.position_S.copy_(torch.arange(1, 7))
    return store


def test_copied_slots_stand_where_their_sources_do(store: StateStore) -> None:
    before = {layer: [tensor.clone() for tensor in state.tensors] for layer, state in store.delta.items()}
    for _ in range(2):
        store.copy_slots([(4, 1), (4, 0), (2, 5)])
        for layer, state in store.delta.items():
            for tensor, old in zip(state.tensors, before[layer], strict=True):
                assert torch.equal(tensor, old[[4, 4, 2, 3, 4, 2]])


def test_copied_pages(store: StateStore) -> None:
    before = [(pool.key_PJD.clone(), pool.value_PJD.clone()) for pool in store.kv.values()]
    rows = torch.arange(24).view(6, 4)[[0, 1, 5, 3, 0, 5]].flatten()
    for _ in range(2):
        store.copy_pages([(5, 2), (0, 4)])
        for pool, (key, value) in zip(store.kv.values(), before, strict=True):
            assert torch.equal(pool.key_PJD, key[rows])
            assert torch.equal(pool.value_PJD, value[rows])


def test_what_is_copied_may_not_be_written(store: StateStore) -> None:
    with pytest.raises(AssertionError, match="copied"):
        store.copy_pages([(1, 2), (2, 3)])


def test_flush_replays_in_every_layer(store: StateStore) -> None:
    kernels, moves = select_kernels(CPU), [(0, 7), (3, 4), (5, 8)]
    before = {layer: state.state_SHKV.clone() for layer, state in store.delta.items()}
    store.flush(kernels, moves)
    after = {layer: state.state_SHKV.clone() for layer, state in store.delta.items()}
    store.flush(kernels, moves)
    for layer, state in store.delta.items():
        assert state.position_S.tolist() == [7, 2, 3, 4, 5, 8]
        changed = [not torch.equal(*states) for states in zip(before[layer], after[layer], strict=True)]
        assert changed == [True, False, False, False, False, True]
        assert torch.equal(state.state_SHKV, after[layer])
